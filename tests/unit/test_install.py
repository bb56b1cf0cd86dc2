"""install() and uninstall() in fresh processes: any order of imports, everything put back."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

SNAPSHOT = """
    import types
    def snapshot():
        import megatron.core.optimizer as factory
        import megatron.core.optimizer.emerging_optimizers as emerging
        import megatron.core.optimizer.layer_wise_optimizer as layer_wise
        import megatron.core.optimizer.optimizer as optimizer
        import megatron.core.optimizer.distrib_optimizer as distributed
        import megatron.core.ssm.gated_delta_net.common as gdn
        import megatron.training.arguments as arguments
        import megatron.training.training as training
        import megatron.core.timers as timers
        import megatron.core.dist_checkpointing as dist_checkpointing
        import megatron.core.dist_checkpointing.serialization as serialization
        import megatron.training.checkpointing as checkpointing
        found = {}
        core = (factory, emerging, layer_wise, optimizer, distributed, gdn, timers, dist_checkpointing, serialization)
        for module in (*core, arguments, training, checkpointing):
            for name, value in vars(module).items():
                found[module.__name__, name] = id(value)
                if isinstance(value, type):
                    for member, inner in vars(value).items():
                        found[module.__name__, name, member] = id(inner)
        return found
"""


def run(code: str) -> str:
    """Run ``code`` in a new interpreter; its output."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SNAPSHOT) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


CHECK = """
    import megatron.core.optimizer as factory
    import megatron.training.training as training
    from megatron_muon import Muon
    from megatron_muon.routing import _is_nonlinear_or_embedding
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS as entries
    assert entries["muon"].optimizer_cls is Muon and factory._EMERGING_OPTIMIZERS is entries
    for entry in entries.values():
        for key in entry.default_param_overrides:
            assert key.predicate.fn is _is_nonlinear_or_embedding
    managed = factory.is_managed_by_layer_wise_optimizer
    assert managed is factory.layer_wise_optimizer.is_managed_by_layer_wise_optimizer
    assert managed.__module__ == "megatron_muon.plugin.ownership"
    assert training.tag_params_for_buffer_routing is factory.layer_wise_optimizer.tag_params_for_buffer_routing
    assert factory.distrib_optimizer.copy_optimizer_param_metadata.__wrapped__
    print("ok")
"""


@pytest.mark.parametrize(
    "order",
    [
        "import megatron_muon; megatron_muon.install()",
        "import megatron.core; import megatron_muon; megatron_muon.install()",
        "import megatron.training.training; import megatron_muon; megatron_muon.install()",
        "import megatron_muon; import megatron.core.optimizer; megatron_muon.install(); megatron_muon.install()",
    ],
)
def test_any_order_of_imports(order: str) -> None:
    assert run(order + "\n" + textwrap.dedent(CHECK)).endswith("ok\n")


def test_uninstall_puts_everything_back() -> None:
    code = """
        before = snapshot()
        import megatron_muon
        megatron_muon.install()
        during = snapshot()
        assert before != during and megatron_muon.is_installed()
        megatron_muon.uninstall()
        assert not megatron_muon.is_installed()
        after = snapshot()
        assert before == after, [key for key in before if before[key] != after.get(key)]
        megatron_muon.uninstall()
        megatron_muon.install()
        assert snapshot() != before
        print("ok")
    """
    assert run(code).endswith("ok\n")


def test_uninstall_before_the_import_leaves_nothing() -> None:
    code = """
        import sys
        finders = list(sys.meta_path)
        import megatron_muon
        megatron_muon.install()
        megatron_muon.uninstall()
        assert sys.meta_path == finders
        from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS as entries
        print(entries["muon"].optimizer_cls.__module__)
    """
    assert run(code) == "megatron.core.optimizer.emerging_optimizers\n"


def test_install_imports_neither_megatron_core_nor_training() -> None:
    code = """
        import sys, megatron_muon
        megatron_muon.install()
        print([name for name in sys.modules if name.startswith("megatron.")])
    """
    assert run(code) == "[]\n"


@pytest.mark.parametrize(
    "version,message,known",
    [
        ((0, 18, 2), "megatron-core 0.18.2 in ", "GatedDeltaNet's base class"),
        ((0, 20, 0), "megatron-core 0.20.0 in ", "use_muon = False"),
        ((0, 21, 1), "megatron-core 0.21.1 in ", "first on the path. docs/upgrading.md says"),
    ],
)
def test_other_versions_are_refused(tmp_path, version: tuple[int, int, int], message: str, known: str) -> None:
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('must not be imported')\n")
    lines = [f"{name} = {number}" for name, number in zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)]
    (package / "package_info.py").write_text("\n".join(lines) + "\n")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import megatron_muon
        try:
            megatron_muon.install()
        except megatron_muon.ConfigError as error:
            print(error, megatron_muon.is_installed())
    """
    output = run(code)
    assert output.startswith(message) and "hooks megatron-core 0.19.x" in output and output.endswith("False\n")
    assert known in output and "docs/upgrading.md says how to find what has moved" in output


def test_missing_megatron_core_is_refused() -> None:
    code = """
        import importlib.util, megatron_muon
        importlib.util.find_spec = lambda name: None
        try:
            megatron_muon.install()
        except megatron_muon.ConfigError as error:
            print(error)
    """
    assert run(code) == "megatron-core is not installed: pip install 'megatron-core==0.19.*'.\n"


def test_a_moved_seam_is_an_error_with_the_name_of_the_hook() -> None:
    code = """
        import megatron.core.optimizer.emerging_optimizers as emerging
        del emerging._is_nonlinear_or_embedding
        import megatron_muon
        try:
            megatron_muon.install()
        except AttributeError as error:
            print(error, megatron_muon.is_installed())
    """
    output = run(code)
    assert "emerging_optimizers:_is_nonlinear_or_embedding does not exist" in output and output.endswith("False\n")

"""install() and uninstall() in fresh processes: any order of imports, everything put back."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

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
    def check():
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
        assert managed.__code__.co_filename.endswith("megatron_muon/_patching.py")
        assert training.tag_params_for_buffer_routing is factory.layer_wise_optimizer.tag_params_for_buffer_routing
        assert factory.distrib_optimizer.copy_optimizer_param_metadata.__wrapped__
"""


@pytest.mark.parametrize(
    "order",
    [
        "import megatron_muon; megatron_muon.install()",
        "import megatron.core; import megatron_muon; megatron_muon.install()",
        "import megatron_muon; import megatron.core.optimizer; megatron_muon.install(); megatron_muon.install()",
    ],
)
@pytest.mark.slow
def test_any_order_of_imports(order: str) -> None:
    """The order that the next test does not have."""
    assert run(f"{order}\n{textwrap.dedent(CHECK)}\ncheck(); print('ok')").endswith("ok\n")


def test_everything_is_hooked_and_put_back() -> None:
    """After Megatron's imports; after an install() that failed at a function that has moved; by two threads at once."""
    code = """
        before = snapshot()
        import megatron_muon
        megatron_muon.install()
        check()
        during = snapshot()
        assert before != during and megatron_muon.is_installed()
        megatron_muon.uninstall()
        assert not megatron_muon.is_installed()
        after = snapshot()
        assert before == after, [key for key in before if before[key] != after.get(key)]
        megatron_muon.uninstall()

        import megatron.core.optimizer.emerging_optimizers as emerging
        moved = emerging._is_nonlinear_or_embedding
        del emerging._is_nonlinear_or_embedding
        try:
            megatron_muon.install()
        except AttributeError as error:
            print(error, megatron_muon.is_installed())
        emerging._is_nonlinear_or_embedding = moved
        after = snapshot()
        assert before == after, [key for key in before if before[key] != after.get(key)]
        megatron_muon.install()
        check()

        import sys, threading
        sys.setswitchinterval(1e-5)
        def both():
            for _ in range(3):
                megatron_muon.install()
                megatron_muon.uninstall()
        threads = [threading.Thread(target=both) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = snapshot()
        assert before == after, [key for key in before if before[key] != after.get(key)]
        print("ok")
    """
    output = run(textwrap.dedent(CHECK) + textwrap.dedent(code))
    error, ok = output.splitlines()[-2:]
    assert "emerging_optimizers:_is_nonlinear_or_embedding does not exist" in error and error.endswith("False")
    assert ok == "ok"


def test_threads_that_build_optimizers_at_once_leave_nothing() -> None:
    """What others gather from all ranks would be gathered among those of a model that is gone."""
    import torch.distributed as dist

    from megatron_muon.agree import Ranks
    from megatron_muon.plugin.factory import _aligning_among as aligning

    original, turns = dist.all_gather_object, [threading.Barrier(2, timeout=10) for _ in range(3)]
    found: list[int] = []

    def build(number: int) -> None:
        mine = [-1]
        if number == 1:
            turns[0].wait()
        with aligning(Ranks(())):
            if number == 0:
                turns[0].wait()
            turns[1].wait()
            dist.all_gather_object(mine, number)
            found.extend(mine)
            if number == 1:
                turns[2].wait()
        if number == 0:
            turns[2].wait()

    threads = [threading.Thread(target=build, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1] and dist.all_gather_object is original


def test_before_the_imports_nothing_is_imported_and_uninstall_leaves_nothing() -> None:
    code = """
        import sys
        finders = list(sys.meta_path)
        import megatron_muon
        megatron_muon.install()
        print([name for name in sys.modules if name.startswith("megatron.")], sys.meta_path == finders)
        megatron_muon.uninstall()
        assert sys.meta_path == finders
        from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS as entries
        print(entries["muon"].optimizer_cls.__module__)
    """
    assert run(code) == "[] False\nmegatron.core.optimizer.emerging_optimizers\n"


VERSIONS = {
    (0, 18, 2): "GatedDeltaNet's base class",
    (0, 20, 0): "use_muon = False",
    (0, 21, 1): "first on the path. To carry the hooks over",
}


def test_other_versions_and_none_at_all_are_refused(tmp_path: Path) -> None:
    folders = []
    for version in VERSIONS:
        folders.append(tmp_path / ".".join(map(str, version)))
        package = folders[-1] / "megatron" / "core"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise AssertionError('must not be imported')\n")
        lines = [f"{name} = {number}" for name, number in zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)]
        (package / "package_info.py").write_text("\n".join(lines) + "\n")
    code = f"""
        import importlib.util, sys
        import megatron_muon

        def refusal():
            try:
                megatron_muon.install()
            except megatron_muon.ConfigError as error:
                print(error, megatron_muon.is_installed())

        for folder in {list(map(str, folders))!r}:
            sys.path.insert(0, folder)
            refusal()
            sys.path.remove(folder)
        importlib.util.find_spec = lambda name: None
        refusal()
    """
    *others, missing = run(code).splitlines()
    assert len(others) == len(VERSIONS)
    for output, (version, known) in zip(others, VERSIONS.items(), strict=True):
        assert output.startswith(f"megatron-core {'.'.join(map(str, version))} in ")
        assert "hooks megatron-core 0.19.x" in output and output.endswith("False")
        assert known in output and "python -m tools.upstream seams" in output
    assert missing == "megatron-core is not installed: pip install 'megatron-core==0.19.*'. False"

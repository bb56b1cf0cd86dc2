"""What ``docs/frameworks.md`` prints, run as it is printed: files, code and the options of command lines."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients import bridge, needs, swift, verl
from tests.launch import ROOT
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool

pytestmark = needs("transformer_engine", "megatron.bridge", "swift.megatron", "verl")

PAGE = (ROOT / "docs" / "frameworks.md").read_text()
LAYER_WISE = Layout(layer_wise=True)


def block(first: str) -> str:
    """The fenced block of Python that begins with the comment ``first``."""
    return next(text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if text.startswith(f"# {first}\n"))


def command(start: str) -> str:
    """The indented command line that begins with ``start``, in one line."""
    found = re.search(rf"^    {start}.*?(?=\n\n)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, start
    return found.group().replace("\\\n", " ")


def table_of(build: Any, *args: Any, **kwargs: Any) -> tuple[Any, str]:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        built = build(*args, **kwargs)
    return built, output.getvalue()


def by_file(folder: str, framework: str) -> list[Any]:
    """Import ``use_muon.py`` as the framework does; what a config then has."""
    import importlib

    path = Path(folder) / "use_muon.py"
    sys.path.insert(0, folder)
    try:
        if framework == "verl":
            importlib.import_module("verl.utils.import_utils").import_external_libs("use_muon")
        else:
            importlib.import_module("swift.utils").import_external_file(str(path))
    finally:
        sys.path.remove(folder)
        sys.modules.pop("use_muon", None)
    from megatron.core.optimizer import OptimizerConfig

    config: Any = OptimizerConfig(optimizer="muon", lr=0.1)
    return [config.muon_router, config.muon_extra_scale_factor, config.muon_nesterov]


@pytest.mark.parametrize("framework", ["verl", "swift"])
def test_use_muon(pool: RankPool, tmp_path: Path, framework: str) -> None:
    (tmp_path / "use_muon.py").write_text(block("use_muon.py"))
    assert pool.run(by_file, 1, str(tmp_path), framework)[0] == ["adam", 0.2, True]


def bridge_as_printed(code: str) -> tuple[list[float], str]:
    config = bridge.recipe(LAYER_WISE, steps=3)
    exec(code, {"config": config})
    return table_of(bridge.pretrain, config)


def test_bridge(pool: RankPool) -> None:
    losses, report = pool.run(bridge_as_printed, 2, block("Megatron-Bridge"))[0]
    assert losses[-1] < losses[0]
    assert "update scale spectral x 0.2" in report


def swift_as_printed(flags: dict[str, str]) -> tuple[list[float], str]:
    """The rates of its param groups after a step, and the report."""
    from swift.megatron.arguments.megatron_args import MegatronArguments

    fields = {each.name for each in dataclasses.fields(MegatronArguments)}
    assert set(flags) <= fields, set(flags) - fields
    import yaml  # comes with the frameworks

    values = {name: float(value) if "e-" in value else yaml.safe_load(value) for name, value in flags.items()}
    (run, scheduler, _), report = table_of(swift.start, LAYER_WISE, **values)
    swift.train(run, scheduler, 1)
    parts = run.optimizer.chained_optimizers
    return sorted({group["max_lr"] for part in parts for group in part.param_groups}), report


def test_swift(pool: RankPool) -> None:
    printed = dict(re.findall(r"--(\w+) (\S+)", command("megatron sft")))
    assert printed.pop("external_plugins") == "use_muon.py"
    rates, report = pool.run(swift_as_printed, 2, printed)[0]
    assert rates == [3e-4, 3e-3]
    assert "update scale spectral x 0.2" in report and "momentum 0.95, Nesterov" in report


def verl_as_printed(overrides: list[str], weights: str) -> tuple[list[float], str]:
    """Its YAML and the printed keys, through its own way to a dataclass."""
    import importlib.resources

    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    defaults = importlib.resources.files("verl") / "trainer" / "config" / "optim" / "megatron.yaml"
    config = OmegaConf.merge(OmegaConf.load(str(defaults)), OmegaConf.from_dotlist(overrides))
    options = dataclasses.asdict(omega_conf_to_dataclass(config))
    options |= {"lr_decay_steps": 20, "total_training_steps": 20, "lr_warmup_steps": 0, "lr": 0.01}
    options.pop("_target_", None)
    (run, scheduler), report = table_of(verl.start, LAYER_WISE, weights, options=options)
    return verl.train(run, scheduler, 3), report


def test_verl(pool: RankPool, tmp_path: Path) -> None:
    weights = str(tmp_path / "weights")
    pool.run(harness.save_initial_weights, 1, weights)
    line = command("python -m verl")
    assert "actor_rollout_ref.model.external_lib=use_muon" in line
    overrides = re.findall(r"actor_rollout_ref\.actor\.optim\.(\S+=\S+)", line)
    losses, report = pool.run(verl_as_printed, 2, overrides, weights)[0]
    assert losses[-1] < losses[0]
    assert "update scale spectral x 0.2294" in report

"""Passes of frameworks that move what Adam has: Muon's state goes along, without a line of theirs or of the user's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, Muon
from megatron_muon.optimizers.handled import ASLEEP
from megatron_muon.plugin import frameworks
from megatron_muon.plugin.sleeping import give_calls

UTILS = """
passes = []

def offload_megatron_optimizer(optimizers):
    passes.append("offload")

def load_megatron_optimizer(optimizers):
    passes.append("load")
"""


@pytest.fixture
def verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "verl" / "utils"
    folder.mkdir(parents=True)
    (folder / "megatron_utils.py").write_text(UTILS)
    (folder / "engine.py").write_text("from verl.utils.megatron_utils import offload_megatron_optimizer as offload")
    for package in (folder, folder.parent):
        (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    frameworks.PATCHES.revert()
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        del sys.modules[name]


class Part:
    """As Megatron-Core's optimizers."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def chain(inner: torch.optim.Optimizer) -> Any:
    """One optimizer that has another."""
    return Part(chained_optimizers=[Part(optimizer=inner, config=Part())])


def muon() -> Muon:
    param = torch.nn.Parameter(torch.randn(8, 4))
    param.grad = torch.ones_like(param)
    optimizer = Muon([param])
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("is_first", [True, False], ids=["imported before", "imported after"])
def test_all_state_goes_along(verl: Path, is_first: bool) -> None:
    modules = [f"verl.utils.{name}" for name in ("megatron_utils", "engine")]
    if is_first:
        [*map(importlib.import_module, modules)]
    frameworks.PATCHES.apply()
    utils, engine = map(importlib.import_module, modules)
    ours, others = muon(), torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    optimizer = chain(ours)
    give_calls(optimizer)
    for optimizers in (optimizer, [optimizer]):
        engine.offload(optimizers)
        with pytest.raises(ConfigError, match="asleep on the host"):
            ours.step()
        utils.load_megatron_optimizer(optimizers)
        ours.step()
    engine.offload(chain(others))
    assert others not in ASLEEP  # a run without Muon is as ever
    assert utils.passes == ["offload", "load", "offload", "load", "offload"]  # theirs are made all the same


def test_versions_without_these_functions_are_left_alone(verl: Path) -> None:
    (verl / "megatron_utils.py").write_text("def offload_megatron_optimizer(optimizers): ...")
    frameworks.PATCHES.apply()
    utils = importlib.import_module("verl.utils.megatron_utils")
    assert not hasattr(utils, "load_megatron_optimizer")
    assert utils.offload_megatron_optimizer(chain(muon())) is None

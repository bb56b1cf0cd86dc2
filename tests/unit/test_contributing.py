"""The rule that CONTRIBUTING.md writes as an example does what the page says."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError
from megatron_muon.config import MuonConfig
from megatron_muon.routing import annotate, layout, treatment
from megatron_muon.routing.layout import layout_of
from megatron_muon.routing.rules import linear
from tests.unit.small_modules import Wrapper, megatron_class, sections
from tools.splitting import split

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """Makes the page's module with so many rows, while its rule holds."""
    (code,) = re.findall(r"^( +@rule.*?)\n\n", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(treatment, "OF_MEGATRON", dict(treatment.OF_MEGATRON))
    monkeypatch.setattr("megatron_muon.routing.rules.OF_MEGATRON", treatment.OF_MEGATRON)
    names = {**vars(layout), **vars(linear), **vars(treatment)}
    exec(textwrap.dedent(code), {**names, "Iterator": Iterator, "MuonConfig": MuonConfig})

    def made(rows: int) -> Any:
        module = megatron_class("GatedRouter", "transformer.moe.gated_router")()
        module.config = SimpleNamespace(num_moe_experts=4)
        module.score_and_gate = torch.nn.Linear(6, rows, bias=False)
        return module

    return made


def test_its_rows_are_two_matrices(router: Callable[[int], Any]) -> None:
    module = router(8)
    annotate(module)
    weight = module.score_and_gate.weight
    score, gate = split(layout_of(weight), weight.detach())
    assert torch.equal(score.squeeze(0), weight[0::2]) and torch.equal(gate.squeeze(0), weight[1::2])


def test_another_height_stops_by_name(router: Callable[[int], Any]) -> None:
    with pytest.raises(ConfigError, match=r"score_and_gate\.weight.* has 10 rows, but num_moe_experts 4 implies 8"):
        annotate(router(10))


def test_an_adapter_on_the_layer(router: Callable[[int], Any]) -> None:
    module = router(8)
    a, b = torch.nn.Linear(6, 3, bias=False), torch.nn.Linear(3, 8, bias=False)
    module.score_and_gate = Wrapper(to_wrap=module.score_and_gate, adapter=Wrapper(linear_in=a, linear_out=b))
    annotate(module)
    assert sections(b.weight) == ["score", "gate"], "B has the rows of the layer"


def test_a_layer_with_a_rule_is_no_adapter_whatever_its_parts_are_called(router: Callable[[int], Any]) -> None:
    module = router(8)
    module.linear_in, module.linear_out = torch.nn.Linear(6, 4), torch.nn.Linear(4, 6)
    annotate(module)
    assert not any(hasattr(param, linear.LORA_FACTOR) for param in module.parameters())

"""Muon by itself, on groups of a model that has more than matrices: somebody is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_muon import Muon, param_groups


def train(others: Callable[[Any], Any], steps: int = 6) -> list[str]:
    """Warnings of a run in which Muon has the matrices, and ``others`` makes what steps beside it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    groups = param_groups(model)
    muon, other = Muon(groups.muon), others(groups.scalar)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            model.zero_grad()
            model(torch.arange(8)).square().sum().backward()
            muon.step()
            if other is not None:
                other.step()
    return [str(each.message) for each in told]


def test_weights_that_nothing_changes_are_named_once() -> None:
    """As with ``Trainer(optimizers=(Muon(groups.muon), None))``."""
    (told,) = train(lambda groups: None)
    assert told.startswith("0.weight, 1.bias, 2.weight, 2.bias: trained, and not changed in 3 steps of Muon")
    assert "optimizer_for(model)" in told
    assert not train(lambda groups: None, steps=2)


def test_one_that_is_left_out_is_named() -> None:
    (told,) = train(lambda groups: torch.optim.AdamW(groups[1:]))  # vectors alone
    assert told.startswith("0.weight: trained")


class Quiet(torch.optim.SGD):
    """Writes to weights as kernels of other packages do, without autograd's notice."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.sub_(param.grad, alpha=0.01)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, lambda groups: Quiet(groups, 0.1)])
def test_another_optimizer_is_noticed(make: Callable[[Any], Any]) -> None:
    assert not train(make)

"""Optimizers that were copied or pickled go on as the original does, to the bit, and leave it alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.routing.layout import SCALAR, WHOLE, MatrixLayout, Section

GATED = MatrixLayout("in_proj", (Section("q", 8), Section("beta", 2, SCALAR)))
STIEFEL = replace(WHOLE, direction="stiefel")


def give_gradients(optimizer: Muon, step: int) -> list[torch.Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in enumerate(params):
        generator = torch.Generator().manual_seed(10 * step + number)
        param.grad = torch.randn(param.shape, generator=generator)
    return params


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (GATED, {"weight_decay_method": "independent_scheduled"}),
        (WHOLE, {"variant": "hyperball", "scale_mode": "none"}),
        (replace(WHOLE, direction="sign"), {"scale_mode": "spectral_norm"}),
        *((GATED, {"variant": name}) for name in ("adamuon", "normuon")),
        (WHOLE, {"variant": "spectral_sphere"}),
        (STIEFEL, {"variant": "stiefel"}),
    ],
)
def test_a_copy_goes_on_as_the_original(
    layout: MatrixLayout, options: dict[str, Any], copied: Callable[[Muon], Muon]
) -> None:
    params = [torch.nn.Parameter(torch.randn(10, 6)), torch.nn.Parameter(torch.randn(6, 8))]
    params[0].matrix_layout = layout
    original = Muon(params, lr=0.1, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(original, 0.5)  # replaces ``step`` of this one object
    original.finals.append(lambda done: told.extend(done))
    original.register_step_pre_hook(lambda *_: told.append("hook"))
    told: list[Any] = []
    for step in range(2):
        give_gradients(original, step)
        original.step()
        schedule.step()
    other = copied(original)
    told.clear()
    before = [param.detach().clone() for param in params]
    copies = give_gradients(other, 2)
    other.step()
    assert told == [] and all(map(torch.equal, params, before))
    give_gradients(original, 2)
    original.step()
    assert all(map(torch.equal, params, copies))
    assert told[0] == "hook" and set(told[1:]) == set(params)
    give_gradients(other, 3), give_gradients(original, 3)
    other.load_state_dict(copy.deepcopy(original.state_dict()))
    other.step(), original.step()
    assert all(map(torch.equal, params, copies))


def test_namo_goes_on_from_a_second_moment_of_older_versions() -> None:
    """They kept v itself. From a v of zero the next steps would be several times as large."""
    weights = [torch.nn.Parameter(torch.eye(8, 4)) for _ in range(2)]
    optimizers = [Muon([weight], lr=0.1, variant="namo", ns_dtype="fp32") for weight in weights]

    def step(index: int, number: int) -> None:
        weights[index].grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        optimizers[index].step()

    for number in range(3):
        step(0, number)
    older = copy.deepcopy(optimizers[0].state_dict())
    state = older["state"][0]
    state["namo_moment2"] = state.pop("namo_root").square()
    optimizers[1].load_state_dict(older)
    weights[1].data.copy_(weights[0].data)
    for index in range(2):
        step(index, 3)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    assert list(optimizers[1].state[weights[1]]) == list(optimizers[0].state[weights[0]])

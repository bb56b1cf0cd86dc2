"""Momentum that has only faded since gradients stopped is forgotten; small gradients are none of that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.optimizers import fading
from megatron_muon.optimizers.fading import EVERY, PEAK
from megatron_muon.optimizers.graph import capture
from megatron_muon.routing.layout import BALLS, ORTHOGONALIZE, SCALAR, TABLE, WHOLE, MatrixLayout, Section
from tests.recorded import recorded

MOMENTUM = 0.8
LAST = 10
"""The last step with a gradient."""
# 0.8^(k / 2) is a thousandth for k = 62; the look after that, of a peak that is up to half a look behind.
SOONEST, LATEST = LAST + 63, LAST + 126
GATED = MatrixLayout("in_proj", (Section("q", 4), Section("beta", 2, SCALAR)))
LAYOUTS: dict[str, tuple[tuple[int, ...], MatrixLayout]] = {
    "plain": ((8, 12), WHOLE),
    "stack": ((3, 4, 8), WHOLE.stack()),
    "fused": ((12, 8), MatrixLayout("qkv", (Section("q", 4), Section("k", 2)))),
    "gated": ((12, 8), GATED),
    **{name: ((8, 12), MatrixLayout(TABLE, direction=name)) for name in BALLS},
}


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(name: str = "plain", **options: Any) -> tuple[torch.nn.Parameter, Muon]:
    shape, layout = LAYOUTS[name]
    param = torch.nn.Parameter(random(shape, 1))
    param.matrix_layout = layout
    return param, Muon([param], **{"lr": 0.01, "weight_decay": 0.0, "momentum": MOMENTUM, **options})


Size = Callable[[int], float]


def steps(param: torch.nn.Parameter, muon: Muon, size: Size, first: int = 1, last: int = 200) -> Iterator[torch.Tensor]:
    """The update of each step; its gradient is noise of this size."""
    for number in range(first, last + 1):
        before = param.detach().clone()
        param.grad = random(tuple(param.shape), number) * size(number)
        muon.step()
        yield param.detach() - before


def then_none(number: int) -> float:
    return float(number <= LAST)


@pytest.mark.parametrize("name", LAYOUTS)
def test_updates_end_some_time_after_the_last_gradient(name: str) -> None:
    """Of each row; Adam's rows go by Adam's own rule. The next gradient has the first update of a fresh optimizer."""
    param, muon = made(name)
    updates = list(steps(param, muon, then_none))
    rows_of = param.matrix_layout.rows_by_rule
    matrices = [torch.cat([rows.flatten() for rows in rows_of(update, ORTHOGONALIZE)]) for update in updates]
    moving = [number for number, update in enumerate(matrices, 1) if update.any()]
    assert moving[-1] == len(moving) and SOONEST <= len(moving) <= LATEST
    usual = matrices[LAST].norm()
    assert all(matrices[number - 1].norm() > 0.8 * usual for number in moving), "in full until then"
    fresh, other = made(name)
    fresh.data.copy_(param.data)
    (late,), (first,) = steps(param, muon, lambda _: 1.0, 7, 7), steps(fresh, other, lambda _: 1.0, 7, 7)
    is_matrix = torch.zeros_like(late)
    torch._foreach_add_(rows_of(is_matrix, ORTHOGONALIZE), 1.0)
    assert torch.equal(late * is_matrix, first * is_matrix)
    if name == "gated":
        assert muon.state[param]["momentum_buffer"][4:6].any(), "Adam's rows have their own rule"


def test_rows_and_experts_end_by_themselves() -> None:
    """AdaMuon takes the sign of what is left of a row, however little it is beside the others."""
    param, muon = made("stack", variant="adamuon")
    for number in range(1, LATEST + 1):
        before = param.detach().clone()
        param.grad = random(tuple(param.shape), number)
        if number > LAST:
            param.grad[0] = 0.0
            param.grad[1, 2] = 0.0
        muon.step()
    moved = (param.detach() - before).norm(dim=-1)
    assert not moved[0].any() and moved[1, 2] == 0.0 and (moved > 0).sum() == 7


SIZES: dict[str, Size] = {
    "a fall to 1e-9 for good": lambda number: 1.0 if number <= 70 else 1e-9,
    "a fall to 1e-9 for one step": lambda number: 1e-9 if number == 70 else 1.0,
    "a fall to 1e-5 for good": lambda number: 1.0 if number <= 70 else 1e-5,
    "one huge gradient": lambda number: 1e9 if number == 60 else 1.0,
    "tokens by turns": lambda number: float(number // 30 % 2 == 0),
    "from 1 to 1e-12": lambda number: 10.0 ** (-number / 16),
}
ALIKE = ("a fall to 1e-9 for one step", "a fall to 1e-5 for good", "tokens by turns", "from 1 to 1e-12")


@pytest.mark.parametrize("name", SIZES)
def test_small_gradients_have_updates_in_full(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In each step; but for falls by more than 1e-6 that last, to the bit as if nothing were ever forgotten."""
    found = list(steps(*made(), SIZES[name]))
    assert all(update.norm() > 0.8 * found[0].norm() for update in found)
    monkeypatch.setattr(fading, "EVERY", 10**9)
    assert all(map(torch.equal, found, steps(*made(), SIZES[name]))) == (name in ALIKE)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_other_momentum(momentum: float) -> None:
    """With none there is nothing to forget; of more, longer gaps are bridged. The first look begins the history."""
    moving = [bool(update.any()) for update in steps(*made(momentum=momentum), then_none, last=LAST + 2 * EVERY)]
    assert sum(moving) == {0.0: LAST, 0.5: 2 * EVERY, 0.99: LAST + 2 * EVERY}[momentum]


def test_a_weight_without_gradients_keeps_its_momentum() -> None:
    """None, not zeros: it is in no step, and its own steps are counted."""
    param, muon = made()
    beside = torch.nn.Parameter(random((4, 4), 2))
    muon.add_param_group({"params": [beside]})
    list(steps(param, muon, lambda _: 1.0, last=LAST))
    kept = muon.state[param]["momentum_buffer"].clone()
    for _ in range(3 * EVERY):
        param.grad, beside.grad = None, torch.ones_like(beside)
        muon.step()
    assert torch.equal(muon.state[param]["momentum_buffer"], kept) and muon.state[param]["step"] == LAST


def test_nan_is_not_forgotten() -> None:
    param, muon = made()
    param.grad = torch.full_like(param, float("nan"))
    muon.step()
    list(steps(param, muon, then_none, 100))
    assert muon.state[param]["momentum_buffer"].isnan().all()


@pytest.mark.parametrize("known", [True, False])
def test_a_resumed_run_forgets_in_the_same_step(known: bool) -> None:
    """With what ``state_dict()`` has; one of older versions knows nothing of the past, and begins its own."""
    param, muon = made()
    list(steps(param, muon, then_none, last=70))
    other, resumed = made()
    other.data.copy_(param.data)
    saved = copy.deepcopy(muon.state_dict())
    for state in saved["state"].values() if not known else ():
        del state[PEAK], state["step"]
    resumed.load_state_dict(saved)
    went_on, pairs = list(steps(param, muon, then_none, 71)), list(steps(other, resumed, then_none, 71))
    same = [torch.equal(*pair) for pair in zip(went_on, pairs, strict=True)]
    assert all(same) == known and not went_on[-1].any()
    assert not pairs[-1].any(), "after a look and 62 steps"


def test_beside_a_captured_step() -> None:
    """It is the host that knows whose turn it is: before the graph is launched."""
    (param, muon), (other, usual) = made(), made()
    param.grad, other.grad = torch.zeros_like(param), torch.zeros_like(other)
    graph = capture(muon, 2, how=recorded())
    for number in range(1, LATEST + 2):
        for each, optimizer in ((param, muon), (other, usual)):
            each.grad.copy_(random(tuple(each.shape), number) * then_none(number))
            optimizer.step()
        # A rate on the device is rounded elsewhere, in each step.
        torch.testing.assert_close(param, other, rtol=0, atol=1e-5)
    assert graph.is_captured and not muon.state[param]["momentum_buffer"].any()

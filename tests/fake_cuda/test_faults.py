"""Faults that are put into the step by hand: each is seen by what the other files of this folder check.

Those of a rank alone are put into one of the ranks that communicate; the others into both steps of an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon.engine.exchange import Exchange, Members, Pending
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers import param_step, step
from tests.fake_cuda.cases import FEW
from tests.fake_cuda.test_sequences import grid_rank, meeting, tensor_rank
from tests.fake_cuda.test_steps import two_steps
from tests.fake_cuda.world import DeviceError

Patch = pytest.MonkeyPatch


def before(target: object, name: str, fault: Callable[..., object]) -> Callable[[Patch], None]:
    """A fault that happens before a function does its work, with the same arguments."""

    def put(patch: Patch) -> None:
        original = getattr(target, name)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            fault(*args, **kwargs)
            return original(*args, **kwargs)

        patch.setattr(target, name, faulty)

    return put


def instead(target: object, name: str, fault: Callable[..., Any]) -> Callable[[Patch], None]:
    """A fault that gets the function, to call it otherwise."""

    def put(patch: Patch) -> None:
        original = getattr(target, name)
        patch.setattr(target, name, lambda *args, **kwargs: fault(original, *args, **kwargs))

    return put


def sent_early(original: Any, exchange: Exchange, send: torch.Tensor, *args: Any) -> Pending:
    pending = original(exchange, send, *args)
    send.zero_()
    return pending


def with_another(original: Any, exchange: Exchange, send: torch.Tensor, *args: Any) -> Pending:
    dist.all_reduce(torch.zeros_like(send), group=exchange.group, async_op=True)
    return original(exchange, send, *args)


def unwaited(original: Any, pending: Pending) -> torch.Tensor:
    assert pending.buffer is not None
    return pending.buffer


def strided(original: Any, exchange: Exchange, tensor: torch.Tensor) -> Pending:
    return original(exchange, torch.stack([tensor, tensor], dim=-1)[..., 0])


IN_STEP: dict[str, tuple[Callable[[Patch], None], str]] = {
    "item": (before(step, "add", lambda weights, slices, directions, *_: directions[0].sum().item()), "the host reads"),
    "float": (before(step, "damp", lambda weights, slices, batches: float(batches[0].sum())), "the host reads"),
    "if of a tensor": (before(step, "damp", lambda weights, slices, batches: bool(batches[0].any())), "the host reads"),
    "cpu": (before(step, "pack", lambda weights, slices, batches, **_: batches[0].cpu()), "to the host"),
    "nonzero": (before(step, "pack", lambda weights, slices, batches, **_: batches[0].nonzero()), "nonzero"),
    "mask": (before(step, "pack", lambda weights, slices, batches, **_: batches[0][batches[0] > 0]), "the host reads"),
    "index of the host": (
        before(step, "pack", lambda weights, slices, batches, **_: batches[0][torch.tensor([0])]),
        "indices in the memory of the host",
    ),
    "tensor made on the device": (
        before(step, "add", lambda *args: torch.tensor([0.1, 0.2], device="cuda")),
        "from the host",
    ),
    "rate of the host": (
        before(step, "add", lambda weights, slices, directions, *_: directions[0] * torch.tensor(0.1)),
        "with a tensor of the host",
    ),
    "synchronize": (before(param_step, "by_param_group", lambda *args: torch.cuda.synchronize()), "synchronize"),
    "read before its wait": (instead(Pending, "wait", unwaited), "reads a buffer of all_to_all .* before its wait"),
    "sent buffer reused": (instead(Exchange, "all_to_all", sent_early), "writes to a buffer of all_to_all"),
    "never waited": (instead(Exchange, "all_to_all", with_another), "that nobody has waited for"),
    "strided": (instead(Exchange, "all_reduce", strided), "not contiguous"),
    "from the host": (
        instead(Exchange, "all_reduce", lambda original, exchange, tensor: original(exchange, torch.zeros(3))),
        "a tensor on cpu",
    ),
}


@pytest.mark.parametrize("name", IN_STEP)
def test_a_fault_in_the_step_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put, message = IN_STEP[name]
    put(monkeypatch)
    with pytest.raises(DeviceError, match=message):
        two_steps(FEW, scale_mode="update_norm", tp_mode="owner")


def test_a_wrong_dtype_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On all ranks alike: nothing but the plan tells."""
    original = Exchange._start

    def wide(self: Exchange, collective: Any, *args: torch.Tensor) -> Any:
        return original(
            self, collective, *(torch.zeros(len(each), dtype=torch.float16, device="cuda") for each in args)
        )

    monkeypatch.setattr(Exchange, "_start", wide)
    with pytest.raises(AssertionError, match=r"all_gather of torch\.float16"):
        two_steps(FEW, tp_mode="duplicated", ns_dtype="bf16")


def on_rank_1(put: Callable[..., Any]) -> Callable[..., Any]:
    """A fault of one rank: ``put`` gets the function and its arguments, and the others the function alone."""
    return lambda original, *args, **kwargs: (put if dist.get_rank() == 1 else _as_it_is)(original, *args, **kwargs)


def _as_it_is(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def fewer(original: Any, exchange: Exchange, send: torch.Tensor, to: Any, *others: Any) -> Pending:
    to = [list(each) for each in to]
    to[0], to[1] = [], [*to[1], *to[0]]
    return original(exchange, send, to, *others)


ON_ONE_RANK: dict[str, tuple[Callable[[Patch], None], str]] = {
    "other order": (
        instead(StepEngine, "_chunks", on_rank_1(lambda original, *args: original(*args)[::-1])),
        "differ|wait for one another|expects",
    ),
    "a collective is left out": (
        instead(Exchange, "sum", on_rank_1(lambda original, exchange, tensor: tensor)),
        "differ|wait for one another|expects",
    ),
    "parts go elsewhere": (instead(Exchange, "all_to_all", on_rank_1(fewer)), "expects"),
    "another dtype": (
        instead(
            Exchange, "all_reduce", on_rank_1(lambda original, exchange, x: original(exchange, x.view(torch.int32)))
        ),
        "dtypes differ",
    ),
    "another group": (
        instead(
            Exchange, "sum", on_rank_1(lambda original, exchange, x: dist.all_reduce(x, group=dist.group.WORLD) or x)
        ),
        "wait for one another|differ",
    ),
}


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_a_fault_of_one_rank_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put, message = ON_ONE_RANK[name]
    put(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        meeting(2, lambda rank: tensor_rank(rank, 2, range(2)))


def test_a_message_between_two_ranks_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    instead(Members, "sum", on_rank_1(lambda original, members, tensor: tensor))(monkeypatch)
    with pytest.raises(AssertionError, match=r"wait for one another|not what is expected"):
        meeting(2, lambda rank: grid_rank(rank, 1, 2, 1, range(2)))

"""One rank of a tensor-parallel group in one process: every other rank is taken to hold what this one does.

Messages are copies on the device. So a rank's share of a step can be timed without the time of communication, on
numbers as they occur: buffers without contents would hold zeros, or NaN, on which products are faster or slower. The
updates mean nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


class _Done:
    """A message that has arrived."""

    def wait(self, *args: Any) -> bool:
        """At once."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


def _filled(target: torch.Tensor, source: torch.Tensor) -> None:
    """As often as it fits, and the beginning of it."""
    into, of = target.view(-1), source.reshape(-1)
    whole = into.numel() // max(1, of.numel())
    if whole:
        into[: whole * of.numel()].view(whole, -1).copy_(of.expand(whole, -1))
    into[whole * of.numel() :].copy_(of[: into.numel() - whole * of.numel()])


def _answer(async_op: bool) -> _Done | None:
    return _Done() if async_op else None


def _all_to_all_single(
    output: torch.Tensor, input: torch.Tensor, *splits: Any, group: Any = None, async_op: bool = False, **_: Any
) -> _Done | None:
    _filled(output, input)
    return _answer(async_op)


def _all_gather_into_tensor(
    output: torch.Tensor, input: torch.Tensor, group: Any = None, async_op: bool = False
) -> _Done | None:
    _filled(output, input)
    return _answer(async_op)


def _all_gather(
    outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> _Done | None:
    for each in outputs:
        each.copy_(tensor)
    return _answer(async_op)


def _all_reduce(
    tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> _Done | None:
    if op == dist.ReduceOp.SUM:
        tensor.mul_(dist.get_world_size(group))
    return _answer(async_op)


def _all_gather_object(outputs: list[Any], value: Any, group: Any = None) -> None:
    outputs[:] = [value] * len(outputs)


_FUNCTIONS = {
    "all_to_all_single": _all_to_all_single,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "all_gather": _all_gather,
    "all_reduce": _all_reduce,
    "all_gather_object": _all_gather_object,
}


@contextlib.contextmanager
def loopback(ranks: int) -> Iterator[dist.ProcessGroup | None]:
    """The group of rank 0 of so many; None for one."""
    if ranks == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with contextlib.ExitStack() as stack:
            for name, function in _FUNCTIONS.items():
                stack.enter_context(mock.patch.object(dist, name, function))
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()

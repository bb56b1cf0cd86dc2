"""What a CUDA graph does, on the CPU: the operations of a piece of work, done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "item")


class Recorder(TorchDispatchMode):
    """Takes note of operations, with their tensors and with the numbers that the host had for them.

    Attributes:
        calls: operation, arguments, results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.strip("_") in {name.strip("_") for name in HOST_READS}:
            raise AssertionError(f"captured work is read on the host: {func}")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found


def tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, torch.Tensor)]


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def do_again(calls: list[tuple[Any, Any, Any, Any]]) -> None:
    """What was done once, with the same memory and the same numbers, and with nothing of Python's between."""
    for func, args, kwargs, found in calls:
        given = tensors((args, kwargs))
        # A replay on a GPU leaves no trace in autograd's counters.
        with torch.autograd._unsafe_preserve_version_counter(tuple(given)):
            again = func(*args, **kwargs)
        for work in pytree.tree_leaves(again):
            if isinstance(work, torch.ScriptObject):  # a collective
                work.wait()  # type: ignore[attr-defined]
        if "empty" in func.overloadpacket.__name__:
            continue
        places = set(map(place, given))
        for old, new in zip(tensors(found), tensors(again), strict=True):
            if place(old) not in places:  # otherwise a view of what it was given, or the same
                old.copy_(new)


def recorded(replays: list[int] | None = None) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """How to capture on the CPU, see :data:`megatron_muon.optimizers.graph.Capture`.

    What is captured is undone: on a GPU it has not run.

    Args:
        replays: gets the number of operations of each replay.
    """

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        recorder, before = Recorder(), _Writes()
        with before, recorder:
            work()
        before.undo()

        def replay() -> None:
            do_again(recorder.calls)
            if replays is not None:
                replays.append(len(recorder.calls))

        return replay

    return capture


class _Writes(TorchDispatchMode):
    """Keeps what tensors held before they were written to: those alone, not what lies beside them in a buffer.

    Others may be writing there meanwhile, as gathers do that are under way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | (kwargs or {})
        written = [each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
        mutated = tensors([given.get(name) for name in written])
        self._kept += [(tensor.detach(), tensor.detach().clone()) for tensor in mutated]
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, kept in reversed(self._kept):
            tensor.copy_(kept)

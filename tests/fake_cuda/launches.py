"""How many kernels torch launches for an operation of the device, by the rules of its own sources.

Most operations that are no views launch one. A ``_foreach`` launches few for the whole list where its tensors are of
one dtype and lie in memory alike and without gaps, and one for each tensor elsewhere (``can_use_fast_route`` of
``ForeachUtils.h``, ``multi_tensor_apply`` of ``MultiTensorApply.cuh``).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

_CHUNK, _BLOCKS = 1 << 16, 320
"""Elements of a block of a kernel for lists, and how many blocks a launch has."""

_TENSORS = (110, 64, 48, 36, 30)
"""How many tensors a launch takes, by the number of lists."""

_CAT = 128
"""How many tensors a launch of ``cat`` takes."""


def launches(name: str, args: Any, result: Any) -> int:
    """Launches of an operation that is no view.

    Args:
        name: of the operation, ``_foreach_add_``.
        args: what it was given.
        result: what it gave.
    """
    if name == "cat":
        return -(-len(args[0]) // _CAT)
    if name in ("addmm", "baddbmm"):
        return 2  # the addend is copied into the result first
    if not name.startswith("_foreach_"):
        return 1
    lists = [arg for arg in args if _is_tensors(arg)]
    others = lists if name.endswith("_") or name == "_foreach_norm" else [*lists, result]
    return _of_lists(others, name == "_foreach_copy_") + (name == "_foreach_norm")


def _of_lists(lists: list[Any], converts: bool) -> int:
    if not _is_fast(lists, converts):
        return len(lists[0])
    blocks = sum(-(-tensor.numel() // _CHUNK) for tensor in lists[0])
    return max(-(-blocks // _BLOCKS), -(-len(lists[0]) // _TENSORS[len(lists) - 1]))


def _is_fast(lists: list[Any], converts: bool) -> bool:
    """Whether all tensors are of one dtype (of each list, where ``converts``), dense, and pairs of them alike."""
    kinds = [{tensor.dtype for tensor in some} for some in lists]
    if not (all(len(its) == 1 for its in kinds) if converts else len(set.union(*kinds)) == 1):
        return False
    return all(
        _is_dense(tensor) and _steps(tensor) == _steps(some[0]) for some in zip(*lists, strict=True) for tensor in some
    )


def _steps(tensor: torch.Tensor) -> list[tuple[int, int]]:
    return [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def _is_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for size, step in sorted(_steps(tensor), key=lambda each: each[1]):
        if step != expected:
            return False
        expected *= size
    return True


def _is_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], torch.Tensor)


def hidden_bytes(name: str, args: Any, kwargs: Any) -> int:
    """Memory that an operation takes and frees by itself, past all modes.

    Reductions in another dtype than their input's convert all of it first, but for 16 bits to float32
    (``make_reduction`` of ``ReduceOpsUtils.h``).
    """
    dtype = kwargs.get("dtype")
    if name not in ("linalg_vector_norm", "sum", "mean") or dtype is None:
        return 0
    x = next(arg for arg in itertools.chain(args) if isinstance(arg, torch.Tensor))
    is_direct = x.dtype == dtype or (x.dtype.itemsize == 2 and dtype == torch.float32)
    return 0 if is_direct else x.numel() * dtype.itemsize

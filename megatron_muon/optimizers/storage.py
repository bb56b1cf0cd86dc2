"""In what form an optimizer keeps the numbers of a weight: its momentum, and the master weight.

A step computes in float32 (float64 for weights of that type). What is kept between steps may be less: momentum in
bfloat16, or as int8 in blocks; the master weight as what it has beside the model's bfloat16 weight. Whoever reads or
writes either of them goes through this module; how each form does it is in :mod:`megatron_muon.optimizers.forms`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch

from megatron_muon.optimizers.forms import BFLOAT16, BLOCK, INT8, PLAIN, REMAINDERS, Form, Planes

MOMENTUM = "momentum_buffer"
"""State: momentum, of the weight's shape; float32 or wider, bfloat16, or int8 with :data:`SCALE`."""

SCALE = "momentum_scale"
"""State: what one unit of int8 momentum stands for, float32, (..., rows, columns / :data:`BLOCK` rounded up)."""

REMAINDER = "master_remainder"
"""State: int16, of the weight's shape: bits of the float32 master less those of the bfloat16 weight, modulo 2^16."""

TIES = "master_ties"
"""State: uint8, (..., rows, columns / 8 rounded up): a bit for each element whose master lies half way between two
bfloat16 numbers and above the weight."""

_AT_ONCE = {"cpu": 1 << 15, "cuda": 1 << 24}
"""How many numbers are converted at once, where the whole would take much memory: on CPUs they fit into a cache."""

OF_FORMS = (SCALE, REMAINDER, TIES)
"""State that says numbers with momentum or a weight: checkpoints have the numbers."""


class Kept(NamedTuple):
    """Numbers of a weight, as they are kept between steps.

    Attributes:
        form: how.
        planes: in which tensors.
    """

    form: Form
    planes: tuple[torch.Tensor, ...]


class _Windows(Protocol):
    def kept(self, kept: Kept, first: int) -> Kept: ...


WINDOWS: ContextVar[_Windows | None] = ContextVar("megatron_muon_windows", default=None)
"""In a step of an optimizer whose state is on the host, see :class:`megatron_muon.optimizers.windows.Windows`."""

_NEW = tuple.__new__
"""Makes a :class:`Kept` without another call, for each weight in each step."""


def momentum_of(state: dict[str, Any]) -> Kept:
    """The momentum in the state of a weight."""
    buffer = state[MOMENTUM]
    if buffer.dtype == torch.int8:
        kept = _NEW(Kept, (INT8, (buffer, state[SCALE])))
    else:
        kept = _NEW(Kept, (BFLOAT16 if buffer.dtype == torch.bfloat16 else PLAIN, (buffer,)))
    return kept if (windows := WINDOWS.get()) is None else windows.kept(kept, 0)


def master_of(param: torch.Tensor, state: dict[str, Any]) -> Kept:
    """What an optimizer updates: the weight itself, or a master weight in the weight and its state."""
    if REMAINDER in state:
        kept = _NEW(Kept, (REMAINDERS, (param, state[REMAINDER], state[TIES])))
        return kept if (windows := WINDOWS.get()) is None else windows.kept(kept, 1)
    return _NEW(Kept, (PLAIN, (param,)))


def init_momentum(param: torch.Tensor, state: dict[str, Any], dtype: str) -> None:
    """Add momentum of zeros to a weight's state.

    Args:
        param: the weight that the optimizer updates.
        state: of the weight; with its master, if that is kept here.
        dtype: of :data:`megatron_muon.choices.MOMENTUM_DTYPES`.
    """
    own = torch.float32 if REMAINDER in state else param.dtype
    state[MOMENTUM] = torch.zeros_like(param, dtype=_MOMENTUM_DTYPES[dtype, own])
    state.pop(SCALE, None)
    if dtype == "int8":
        state[SCALE] = param.new_zeros((*param.shape[:-1], -(-param.size(-1) // BLOCK)), dtype=torch.float32)


def _momentum_dtypes(own: torch.dtype) -> dict[str, torch.dtype]:
    wide = torch.promote_types(own, torch.float32)
    return {"auto": own, "fp32": wide, "bf16": torch.bfloat16, "int8": torch.int8}


_MOMENTUM_DTYPES = {
    (name, own): dtype
    for own in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, dtype in _momentum_dtypes(own).items()
}
"""The dtype of momentum, by what is asked for and the dtype of the master weight."""


def init_remainder(param: torch.Tensor, state: dict[str, Any]) -> None:
    """Add a master weight to the state of a bfloat16 weight: what the weight is."""
    state[REMAINDER] = torch.zeros_like(param, dtype=torch.int16)
    state[TIES] = param.new_zeros((*param.shape[:-1], -(-param.size(-1) // 8)), dtype=torch.uint8)


def initial(param: torch.Tensor, master: str, dtype: str) -> dict[str, Any]:
    """The state in which a run keeps the numbers of a new weight, which may be on no device.

    Args:
        param: the weight that the optimizer updates.
        master: as of :func:`settle`.
        dtype: likewise.
    """
    state: dict[str, Any] = {}
    settle(param, state, master, dtype, {})
    return state


def remainder_of(master: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state that a master weight is, beside the weight to which it rounds."""
    weight, state = master.bfloat16(), dict[str, torch.Tensor]()
    init_remainder(weight, state)
    write(master_of(weight, state), master)
    return state


def settle(
    param: torch.Tensor, state: dict[str, Any], master: str, dtype: str, had_master: MutableMapping[torch.Tensor, bool]
) -> str:
    """Give a weight's state the form that this run has: create what is missing, and keep what is there in that form.

    Args:
        param: the weight that the optimizer updates.
        state: of the weight.
        master: of :data:`megatron_muon.choices.MASTERS`.
        dtype: of :data:`megatron_muon.choices.MOMENTUM_DTYPES`.
        had_master: weights that had a remainder in this run; this one is added if it gets one.

    Returns:
        what had another form, and what has become of it; empty where nothing had.
    """
    told = ""
    if master == "remainder" and param.dtype == torch.bfloat16:
        if REMAINDER not in state or TIES not in state:
            if MOMENTUM in state or param in had_master:
                told = "had no master_remainder: their masters are the weights as they are"
            init_remainder(param, state)
            had_master[param] = True
    elif REMAINDER in state:
        told = f"had a master_remainder, which is left out: the weights are kept in {_named(param.dtype)} alone"
        del state[REMAINDER], state[TIES]
    buffer, own = state.get(MOMENTUM), torch.float32 if REMAINDER in state else param.dtype
    if buffer is None or (buffer.dtype == torch.int8 and SCALE not in state):
        init_momentum(param, state, dtype)
    elif buffer.dtype != _MOMENTUM_DTYPES[dtype, own]:
        values = read(momentum_of(state))
        init_momentum(param, state, dtype)
        write(momentum_of(state), values)
        now = f"had momentum in {_named(buffer.dtype)}, which is kept in {_named(state[MOMENTUM].dtype)} from now on"
        told = "; ".join(filter(None, (told, now)))
    return told


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def read(kept: Kept) -> torch.Tensor:
    """The numbers of a whole weight: float32 or wider; the tensor itself if they are kept so.

    Of planes in several places they are made where the first is.
    """
    return kept.form.decode(_together(kept.planes))


@torch.no_grad()
def write(kept: Kept, values: torch.Tensor) -> None:
    """Keep the numbers of a whole weight, which may be anywhere, and of 16 bits."""
    planes = _together(kept.planes)
    kept.form.encode(values.to(planes[0].device, torch.promote_types(values.dtype, torch.float32)), planes)
    for own, plane in zip(kept.planes, planes, strict=True):
        if own is not plane:
            own.copy_(plane)


def _together(planes: Planes) -> Planes:
    return [plane.to(planes[0].device) for plane in planes]


Cutter = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""Gives views of parts, rows with all columns, of a tensor of each weight, which has the weight's rows. It is called
once for each plane of a form."""


@contextlib.contextmanager
def opened(kept: Sequence[Kept], cut: Cutter, *, writes: bool = True) -> Iterator[list[torch.Tensor]]:
    """Within, numbers of parts of weights, to be read and changed in place; kept again when it is left.

    Args:
        kept: of each weight, all in one form: see :func:`megatron_muon.optimizers.param_step.by_param_group`.
        cut: to the parts.
        writes: whether they are changed.
    """
    form = kept[0].form if kept else PLAIN
    if form is PLAIN:
        yield cut([each.planes[0] for each in kept])
        return
    with form.near(_cut(kept, cut), writes) as parts:
        numbers = form.decode_all(parts)
        yield numbers
        if writes:
            form.encode_all(numbers, parts)


def _cut(kept: Sequence[Kept], cut: Cutter) -> list[Planes]:
    """The planes of each part."""
    return list(zip(*[cut(list(each)) for each in zip(*(each.planes for each in kept), strict=True)], strict=True))


Take = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
"""Gives the rows that numbers are of, from views of all parts."""


def opened_in_turn(
    kept: Sequence[Kept], cut: Cutter, *, writes: bool = True, copies: bool = False, times: int = 1
) -> Iterator[tuple[list[torch.Tensor], Take]]:
    """As :func:`opened`, a few rows of the parts at a time, so that copies of numbers take little memory.

    Args:
        kept: as there.
        cut: as there.
        writes: as there.
        copies: whether the caller makes copies. Otherwise parts that are numbers as they are kept come all at once.
        times: how many times as much comes at once on CPUs, whose caches are large: fewer calls.

    Yields:
        numbers, and what gives the same rows of other views of the parts' shapes but for columns.
    """
    form = kept[0].form if kept else PLAIN
    if form is PLAIN and not copies:
        yield cut([each.planes[0] for each in kept]), list
        return
    parts = _cut(kept, cut)
    for some in _rows_at_once([planes[0] for planes in parts], form, times):
        planes = [[plane[..., rows, :] for plane in parts[index]] for index, rows in some]
        with form.near(planes, writes) as near:
            numbers = form.decode_all(near)
            yield numbers, functools.partial(_rows, some)
            if writes and form is not PLAIN:
                form.encode_all(numbers, near)
            numbers = []


def _rows(some: Sequence[tuple[int, slice]], views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [views[index][..., rows, :] for index, rows in some]


def at_once(like: torch.Tensor) -> int:
    """How many numbers are converted at once."""
    return _AT_ONCE["cuda" if like.is_cuda else "cpu"]


def _rows_at_once(views: Sequence[torch.Tensor], form: Form, times: int) -> Iterator[list[tuple[int, slice]]]:
    """Rows of views, by the index of a view, so many at a time as are to be converted at once."""
    some, total = list[tuple[int, slice]](), 0
    for index, view in enumerate(views):
        # What a form's bound lets through at once is that many bytes of numbers: a whole chunk.
        own = form.bound // max(4, view.element_size())
        rows, bound = view.size(-2), own or at_once(view) * (1 if view.is_cuda else times)
        each = max(1, bound * rows // max(1, view.numel()))
        for first in range(0, rows, each):
            count = view.numel() // rows * min(each, rows - first)
            if some and total + count > bound:
                yield some
                some, total = [], 0
            some.append((index, slice(first, first + each)))
            total += count
    if some:
        yield some


def gradient_of(param: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a weight: ``grad``, of its dtype, or Megatron-Core's ``decoupled_grad``, of any.

    Megatron-Core's loop leaves no ``grad`` beside the other; in a loop of one's own the other may be left of before.
    """
    return gradients_of([param])[0]


def gradients_of(params: Iterable[torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradients of many weights, without a call for each."""
    return [getattr(param, "decoupled_grad", None) if param.grad is None else param.grad for param in params]


def having_gradients(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those weights that have a gradient."""
    return [param for param, grad in zip(params, gradients_of(params), strict=True) if grad is not None]

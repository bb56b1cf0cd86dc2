"""In what form an optimizer keeps the numbers of a weight: its momentum, and the master weight.

A step computes in float32 (float64 for weights of that type). What is kept between steps may be less: momentum in
bfloat16, or as int8 in blocks; the master weight as what it has beside the model's bfloat16 weight. Whoever reads or
writes either of them goes through this module.

Master weights as remainders are exact: the float32 value is the bfloat16 weight's bits, times 2^16, plus a signed
number of 16 bits. Rounding to nearest even leaves 65,537 values that round to an even bfloat16, one more than 16 bits
tell apart: a value half way that was rounded down has the same 16 bits as one that was rounded up. One bit more says
which (:data:`TIES`), so that a run has the very bits of one with float32 copies.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from megatron_muon.optimizers.handled import HostReads
from megatron_muon.orthogonalize.kernels import is_capturing

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

BLOCK = 256
"""Columns of a row that have one scale in int8 momentum."""

Planes = Sequence[torch.Tensor]
"""The tensors in which a form keeps its numbers; all have the same rows."""


class Form:
    """How numbers are kept: here as they are."""

    name = "plain"

    def decode(self, planes: Planes) -> torch.Tensor:
        """The numbers that planes, or views of the same rows of each, stand for: float32 or wider, of a new tensor
        unless the form is plain.
        """
        return planes[0]

    def encode(self, values: torch.Tensor, planes: Planes) -> None:
        """Keep numbers in planes, or in views of the same rows of each."""
        if values is not planes[0]:
            planes[0].copy_(values)

    def decode_all(self, parts: Sequence[Planes]) -> list[torch.Tensor]:
        """Of many parts, by one launch where there is a kernel for it."""
        kernels = _kernels(self, parts)
        found = kernels and kernels.read(self.name, parts)
        return [self.decode(each) for each in parts] if found is None else found

    def encode_all(self, numbers: Sequence[torch.Tensor], parts: Sequence[Planes]) -> None:
        """Keep numbers of many parts."""
        kernels = _kernels(self, parts)
        if not (kernels and kernels.keep(self.name, parts, numbers)):
            for values, each in zip(numbers, parts, strict=True):
                self.encode(values, each)

    @property
    def bound(self) -> int:
        """Bytes of parts that are opened at once, as far as there is a choice; 0: any number."""
        return 0

    def near(self, parts: Sequence[Planes], writes: bool) -> contextlib.AbstractContextManager[Sequence[Planes]]:
        """The planes of parts where a step works on them; within, and kept again if they are changed."""
        return contextlib.nullcontext(parts)


class Bfloat16(Form):
    """Rounded to the nearest bfloat16."""

    name = "bf16"

    def decode_all(self, parts: Sequence[Planes]) -> list[torch.Tensor]:
        """See :meth:`Form.decode_all`."""
        found = [torch.empty(planes[0].shape, dtype=torch.float32, device=planes[0].device) for planes in parts]
        if found:
            torch._foreach_copy_(found, [planes[0] for planes in parts])
        return found

    def encode_all(self, numbers: Sequence[torch.Tensor], parts: Sequence[Planes]) -> None:
        """See :meth:`Form.encode_all`."""
        if parts:
            torch._foreach_copy_([planes[0] for planes in parts], list(numbers))

    def decode(self, planes: Planes) -> torch.Tensor:
        """See :meth:`Form.decode`."""
        return planes[0].float()


class Int8(Form):
    """In units of 1/127 of the largest entry of each block of :data:`BLOCK` columns, rounded to nearest.

    Units are rounded up to 16 significant bits. So products with up to 127 are exact, the largest entry is 127 units,
    and what has been kept is kept again without a change.
    """

    name = "int8"

    def decode(self, planes: Planes) -> torch.Tensor:
        """See :meth:`Form.decode`."""
        values = planes[0].float()
        for part, scale in _blocks(values, planes[1]):
            part.mul_(scale)
        return values

    def encode(self, values: torch.Tensor, planes: Planes) -> None:
        """See :meth:`Form.encode`."""
        units = torch.empty_like(values, memory_format=torch.contiguous_format)
        for (part, scale), (own, _) in zip(_blocks(units, planes[1]), _blocks(values, planes[1]), strict=True):
            unit = torch.maximum(own.amax(-1, keepdim=True), own.amin(-1, keepdim=True).neg_()).float()
            unit.div_(unit.new_full((), 127.0))  # by a number, GPUs would multiply by its reciprocal
            unit = unit.view(torch.int32).add_(0xFF).bitwise_and_(~0xFF).view(torch.float32)
            torch.div(own, torch.where(unit > 0, unit, 1.0), out=part)
            scale.copy_(unit)
        planes[0].copy_(units.round_())


class Remainder(Form):
    """A float32 master weight: planes are the bfloat16 weight, :data:`REMAINDER` and :data:`TIES`.

    A weight that somebody has set to zero, or to another number, is its own master, or as near as half a unit.
    """

    name = "remainder"

    def decode(self, planes: Planes) -> torch.Tensor:
        """See :meth:`Form.decode`."""
        weight, remainder, ties = planes
        values = weight.to(torch.float32, memory_format=torch.contiguous_format)
        bits = values.view(torch.int32).add_(remainder)
        if _is_unread(ties):
            bits.add_(_unpacked(ties, weight.size(-1)).int().mul_(1 << 16))
            return torch.where(values.isnan(), weight, values)
        # On the host it costs next to nothing to know that there is nothing to do: one element in 131,072 is one.
        if ties.any():
            *row, byte = ties.nonzero(as_tuple=True)
            found, place = _unpacked(ties[(*row, byte)].unsqueeze(-1), 8).nonzero(as_tuple=True)
            bits[(*(index[found] for index in row), byte[found] * 8 + place)] += 1 << 16
        if not values.sum().isfinite():
            values = torch.where(values.isnan(), weight, values)
        return values

    def encode(self, values: torch.Tensor, planes: Planes) -> None:
        """See :meth:`Form.encode`."""
        weight, remainder, ties = planes
        bits = values.contiguous().view(torch.int32)
        weight.copy_(values)
        remainder.copy_(bits)  # modulo 2^16, of which the weight's bits are a multiple
        if _is_unread(ties):
            ties.copy_(_packed(bits.bitwise_and(0x1FFFF) == 1 << 15))
            return
        ties.zero_()
        if remainder.numel() and (least := remainder.amin(-1)).min() == _HALF_WAY:  # in one row of some
            row = (least == _HALF_WAY).nonzero(as_tuple=True)
            found, column = (bits[row].bitwise_and_(0x1FFFF) == 1 << 15).nonzero(as_tuple=True)
            byte = (*(index[found] for index in row), column >> 3)
            ties.index_put_(byte, torch.bitwise_left_shift(1, column & 7).to(torch.uint8), accumulate=True)


_HALF_WAY = -(1 << 15)
"""The remainder of what lies half way between two bfloat16 numbers."""

PLAIN, BFLOAT16, INT8, REMAINDERS = Form(), Bfloat16(), Int8(), Remainder()


KERNELS: dict[tuple[str, torch.device], Any] = {}
"""By form and device, what :func:`megatron_muon.optimizers.codecs.prepare` has found to give the same bits, and faster:
:mod:`megatron_muon.orthogonalize.kernels.triton_codecs`."""


def _kernels(form: Form, parts: Sequence[Planes]) -> Any:
    """Kernels for parts of weights; none while a step is captured, as their tables are copied from the host."""
    if not KERNELS or not parts or is_capturing(device := parts[0][0].device):
        return None
    return KERNELS.get((form.name, device))


def _is_unread(ties: torch.Tensor) -> bool:
    """Whether the host does not know what is in a tensor: on a device, and while a step is captured."""
    return ties.is_cuda or HostReads.forbidden


def _packed(bits: torch.Tensor) -> torch.Tensor:
    columns = bits.size(-1)
    whole = functional.pad(bits.to(torch.uint8), (0, -columns % 8)).unflatten(-1, (-1, 8))
    return whole.mul_(_places(bits.device)).sum(-1, dtype=torch.uint8)


def _unpacked(packed: torch.Tensor, columns: int) -> torch.Tensor:
    return packed.unsqueeze(-1).bitwise_and(_places(packed.device)).ne(0).flatten(-2)[..., :columns]


def _places(device: torch.device) -> torch.Tensor:
    return torch.bitwise_left_shift(torch.ones(8, dtype=torch.uint8, device=device), torch.arange(8, device=device))


def _blocks(values: torch.Tensor, scale: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views: (..., rows, blocks, columns of a block) of values and (..., rows, blocks, 1) of their scales."""
    whole = values.size(-1) // BLOCK
    if whole:
        yield values[..., : whole * BLOCK].unflatten(-1, (whole, BLOCK)), scale[..., :whole].unsqueeze(-1)
    if values.size(-1) % BLOCK:
        yield values[..., whole * BLOCK :].unsqueeze(-2), scale[..., whole:].unsqueeze(-1)


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

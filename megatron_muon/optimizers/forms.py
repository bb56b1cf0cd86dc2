"""How float32 numbers are kept in fewer bits: in bfloat16, as int8 in blocks, or as what a bfloat16 weight lacks.

Master weights as remainders are exact: the float32 value is the bfloat16 weight's bits, times 2^16, plus a signed
number of 16 bits. Rounding to nearest even leaves 65,537 values that round to an even bfloat16, one more than 16 bits
tell apart: a value half way that was rounded down has the same 16 bits as one that was rounded up. One bit more says
which (:data:`megatron_muon.optimizers.storage.TIES`), so that a run has the very bits of one with float32 copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from megatron_muon.optimizers.handled import HostReads
from megatron_muon.orthogonalize.kernels import is_capturing

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
    """A float32 master weight: planes are the bfloat16 weight, its remainder (int16) and its ties (uint8), see
    :data:`megatron_muon.optimizers.storage.REMAINDER`, :data:`megatron_muon.optimizers.storage.TIES`.

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

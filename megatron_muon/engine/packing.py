"""Tensors in the form in which they are sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

Shapes = Sequence[tuple[int, ...]]
"""The shapes of tensors that lie one after the other in a buffer."""


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor of ``shape``."""
    product = 1
    for size in shape:
        product *= size
    return product


def even_part(total: int, parts: int, number: int) -> int:
    """Size of part ``number`` of ``total`` cut into ``parts``: as in ``torch.tensor_split`` the first are larger."""
    return total // parts + (number < total % parts)


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(elements,): one tensor after the other; a view if there is only one tensor, and it is contiguous."""
    if len(tensors) == 1 or all(tensor.is_contiguous() for tensor in tensors):
        return torch.cat([tensor.view(-1) for tensor in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)
    buffer = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    torch._foreach_copy_(cut(buffer, [[tuple(tensor.shape) for tensor in tensors]])[0], list(tensors))
    return buffer


def interleaved(pieces: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """(elements,): the first tensor of each list, then the second of each, and so on."""
    return flat([piece for some in zip(*pieces, strict=True) for piece in some])


def cut(buffer: torch.Tensor, shapes: Iterable[Shapes]) -> list[list[torch.Tensor]]:
    """Views of the tensors that lie one after the other in a buffer, in lists as their shapes are."""
    found, offset = [], 0
    for some in shapes:
        views = []
        for shape in some:
            views.append(buffer[offset : offset + numel(shape)].view(shape))
            offset += numel(shape)
        found.append(views)
    return found


def padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """(length,): zeros behind the elements of a one-dimensional tensor."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.numel())) if tensor.numel() < length else tensor


def lower_triangle(symmetric: torch.Tensor) -> torch.Tensor:
    """(batch, p (p + 1) / 2): each element of symmetric matrices (batch, p, p) once.

    The lower triangle of the left half of the columns leaves room for one triangle of the rest: a few copies of blocks,
    no indices, which would take more memory than the matrices. Source: the rectangular full packed format of LAPACK.
    """
    batch, p = symmetric.shape[:2]
    packed = symmetric.new_empty(batch, triangle_numel(p))
    left, corner = _halves(packed, p)
    left.copy_(symmetric[:, :, : left.size(-1)])
    corner.tril_(-1).add_(symmetric[:, left.size(-1) :, left.size(-1) :].triu())
    return packed


def from_triangle(triangle: torch.Tensor, p: int) -> torch.Tensor:
    """(batch, p, p): the inverse of :func:`lower_triangle`."""
    left, corner = _halves(triangle, p)
    h = left.size(-1)
    whole = triangle.new_empty(triangle.size(0), p, p)
    whole[:, h:, :h] = left[:, h:]
    whole[:, :h, h:] = left[:, h:].mT
    whole[:, :h, :h] = left[:, :h].tril().add_(left[:, :h].tril(-1).mT)
    whole[:, h:, h:] = corner.triu().add_(corner.triu(1).mT)
    return whole


def triangle_numel(p: int) -> int:
    """Elements of :func:`lower_triangle` of one matrix."""
    return p * (p + 1) // 2


def _halves(packed: torch.Tensor, p: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a packed triangle: the left half of the columns, which counts up to the diagonal, and the rest's square.

    Of that the upper triangle counts, with the diagonal: the two do not overlap.
    """
    odd = p % 2
    rectangle = packed.view(-1, p + 1 - odd, (p + 1) // 2)
    return rectangle[:, 1 - odd :], rectangle[:, : p // 2, odd:]

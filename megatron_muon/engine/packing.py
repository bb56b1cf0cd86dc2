"""Tensors in the form in which they are sent."""

from __future__ import annotations

import torch

__all__ = ["even_part", "flat", "from_triangle", "joined", "lower_triangle", "numel", "padded"]


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor of ``shape``."""
    product = 1
    for size in shape:
        product *= size
    return product


def even_part(total: int, parts: int, number: int) -> int:
    """Size of part ``number`` of so many, the first ones larger by one, as ``torch.tensor_split`` has it."""
    return total // parts + (number < total % parts)


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All elements, one tensor after the other; a view where there is but one, contiguous tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)


def joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    """(matrices, ...) of all pieces, some of which may have no matrices; no copy where only one has."""
    filled = [piece for piece in pieces if piece.size(0)] or pieces[:1]
    return torch.cat(filled) if len(filled) > 1 else filled[0]


def padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """(length,): zeros behind the elements of a one-dimensional tensor."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.numel())) if tensor.numel() < length else tensor


def lower_triangle(symmetric: torch.Tensor) -> torch.Tensor:
    """(batch, p (p + 1) / 2): the rows of the lower triangles."""
    i, j = torch.tril_indices(symmetric.size(-1), symmetric.size(-1), device=symmetric.device)
    return symmetric[:, i, j]


def from_triangle(triangle: torch.Tensor, p: int) -> torch.Tensor:
    """(batch, p, p): the inverse of :func:`lower_triangle`."""
    rows = torch.arange(p, dtype=torch.int32, device=triangle.device)
    # The place of (i, j) in the triangle: i (i + 1) / 2 + j, or the same with i and j exchanged, which is greater.
    places = (rows * (rows + 1) // 2).unsqueeze(-1) + rows
    # Read by index, not written: in the deterministic mode of torch writes sort all indices.
    places = torch.maximum(places, places.mT).view(-1)
    return triangle.index_select(1, places).view(-1, p, p)

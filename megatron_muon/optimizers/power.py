"""Spectral norms of many weights by power iterations that start where the last step ended."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence

import torch

from megatron_muon.optimizers.handled import HostReads
from megatron_muon.optimizers.matrices import Matrices, Update, divide_, is_nonzero
from megatron_muon.routing.blocks import BlockRange

_COLD_ITERATIONS = 64
"""Power iterations where nothing is known of the singular vectors."""

_LOOKS = 4
"""In how many steps a matrix of zeros is looked at again: experts may get no tokens for long."""

_BITS = 0xFFFFFFFF


class WarmStarts:
    """Tells how many power iterations matrices need, by whether they have singular vectors to start from.

    A weight may be without at any step: a checkpoint of another optimizer, or of another split, has none for it. So may
    updates of zeros, which the first steps of a weight can have.
    """

    def __init__(self) -> None:
        self._looks: dict[torch.Tensor, dict[BlockRange, int]] = defaultdict(dict)

    def forget(self, param: torch.Tensor) -> None:
        """Look at a weight's matrices again: somebody else has written to their vectors."""
        self._looks.pop(param, None)

    def iterations(self, matrices: Matrices, tensors: Sequence[torch.Tensor], state: str, usual: int) -> int:
        """``usual``, or more if some of the matrices have no vector; alike on all ranks that hold parts of them.

        Args:
            matrices: the updates.
            tensors: as of :func:`top_singular`.
            state: as of :func:`top_singular`.
            usual: iterations from a vector of the step before.
        """
        updates = matrices.updates
        looks = [(self._looks[param], piece) for update in updates for param, piece in update.keys]
        if all(found.get(piece, 0) >= _LOOKS for found, piece in looks):
            return usual
        stored = matrices.norms_over_rows([update.gather(update.named(state)) for update in updates])
        pairs = list(zip(stored, matrices.norms(tensors), strict=True))
        counts = [count for update in updates for count in update.slices.counts]
        are_missing = torch.cat([(size == 0) & (norm > 0) for size, norm in pairs]).split(counts)
        are_known = torch.cat([(size > 0) | (norm > 0) for size, norm in pairs]).split(counts)
        found_out = [torch.stack([each.any() for each in are_missing]), torch.stack([each.all() for each in are_known])]
        HostReads.note("which matrices have singular vectors")
        # Waits for the device, once for each matrix until it is forgotten, and a few times for one of zeros.
        missing, known = torch.stack(found_out).tolist()
        for (found, piece), is_known in zip(looks, known, strict=True):
            found[piece] = _LOOKS if is_known else found.get(piece, 0) + 1
        return max(usual, _COLD_ITERATIONS) if any(missing) else usual


def top_singular(
    matrices: Matrices, tensors: Sequence[torch.Tensor], state: str, iterations: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Power iteration on A A^T from the stored left vector, or from noise that is the same at every layout.

    Args:
        matrices: the updates.
        tensors: A of each, (matrices, rows on this rank, columns on this rank).
        state: where the left vector was stored: (rows, 1); zeros: nothing yet.
        iterations: at least 1.

    Returns:
        u (matrices, rows on this rank, 1), v (matrices, columns on this rank, 1) and the norm (matrices, 1, 1) of each,
        which is never above the spectral norm.
    """
    pairs = zip(matrices.updates, tensors, strict=True)
    left = [update.gather(update.named(state)).to(a.dtype) for update, a in pairs]
    for number in range(iterations):
        right = matrices.column_products(tensors, left)
        norms = matrices.norms_over_columns(right)
        right = _unit(right, norms)
        if number == 0:
            # Nothing stored, or what is stored is orthogonal to A.
            starts = _first_vectors(matrices, tensors)
            right = [
                torch.where(is_nonzero(norm), v, start) for norm, v, start in zip(norms, right, starts, strict=True)
            ]
        left = matrices.row_products(tensors, right)
        sizes = matrices.norms_over_rows(left)
        left = _unit(left, sizes)
    return left, right, sizes


def store_vector(update: Update, name: str, left: torch.Tensor, size: torch.Tensor) -> None:
    """Write left vectors, (matrices, rows on this rank, 1); matrices of size 0 keep the vectors that they have."""
    kept = update.gather(update.named(name)).to(left.dtype)
    update.store(update.named(name), torch.where(size > 0, left, kept))


def _first_vectors(matrices: Matrices, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Unit vectors to start from, (columns on this rank, 1)."""
    pairs = zip(matrices.updates, tensors, strict=True)
    return [_first_vector(each.columns, each.first_column, a.size(-1), a.device, a.dtype) for each, a in pairs]


@functools.cache  # never freed: a captured step reads it where it lies
def _first_vector(columns: int, first: int, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Noise by the number of the column in the whole matrix, the same on all devices: it is made on the host, once.

    Not ones: there are matrices whose rows sum to 0.
    """
    noise = noise_of(max(columns, first + size))
    return (noise[first : first + size, None] / noise[:columns].square().sum().sqrt()).to(device, dtype)


def noise_of(count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(count,): numbers from -1 to 1, Wang's hash of 0, 1, ..., so that nothing depends on random generators."""
    x = torch.arange(count, dtype=torch.int64, device=device)
    x = ((x ^ 61) ^ (x >> 16)) * 9 & _BITS
    x = ((x ^ (x >> 4)) * 0x27D4EB2D) & _BITS
    return (x ^ (x >> 15)).double() / 2**31 - 1.0


def _unit(vectors: list[torch.Tensor], norms: list[torch.Tensor]) -> list[torch.Tensor]:
    return [divide_(v, norm) for v, norm in zip(vectors, norms, strict=True)]

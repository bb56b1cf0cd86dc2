"""Momentum of a training, read from its checkpoints: how its singular values lie, and what an iteration makes of it."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import TorchProducts

MOMENTUM = "optimizer.state.momentum_buffer."
HEAD, GROUPS, QUERIES = 32, 2, 3
"""Of the examples' attention: rows of a head, query groups, heads of queries in each."""

Matrices = dict[str, torch.Tensor]
"""Name -> (m, n): the logical matrices, as they are orthogonalized."""


class HalvedProducts(TorchProducts):
    """Counts a symmetric product as the half of one that is not, as kernels for GPUs have it."""

    def symmetric_flops(self, p: int, inner: int) -> int:
        """See :class:`TorchProducts`."""
        return p * p * inner


def read(folder: Path) -> Matrices:
    """The momentum of a checkpoint of an example's model, one process wide.

    Args:
        folder: of one iteration.
    """
    reader = FileSystemReader(str(folder))
    found = {
        key: torch.empty(entry.size)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(MOMENTUM)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads
        load(found, storage_reader=reader, no_dist=True)
    return {
        ".".join(filter(None, [name, part])): matrix.clone()
        for key, tensor in sorted(found.items())
        for name, weight in layers(key.removeprefix(MOMENTUM).removesuffix(".weight"), tensor)
        for part, matrix in split(name, weight)
    }


def layers(name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    """Name and weight of each layer, of what a checkpoint has under a name."""
    if tensor.dim() == 2:
        return [(name, tensor)]
    # Layers that are all alike are saved as one tensor.
    return [(name.replace("layers.", f"layers.{number}."), each) for number, each in enumerate(tensor)]


def split(name: str, weight: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    """The logical matrices of a weight, with short names; one without a name if it is not fused."""
    if "linear_fc1" in name:
        return zip(("gate", "up"), weight.chunk(2), strict=True)
    if "linear_qkv" not in name:
        return [("", weight)]
    heads = weight.view(GROUPS, -1, HEAD, weight.size(1))  # of a group: queries, perhaps as many of a gate, key, value
    names = {"q": heads[:, :QUERIES], "gate": heads[:, QUERIES:-2], "k": heads[:, -2:-1], "v": heads[:, -1:]}
    return [(name, rows.reshape(-1, weight.size(1))) for name, rows in names.items() if rows.size(1)]


@dataclass(frozen=True)
class Spread:
    """A number of each of several matrices.

    Attributes:
        low: the smallest.
        middle: the median.
        high: the largest.
    """

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Iterable[torch.Tensor]) -> Spread:
        """Of a number of each matrix."""
        numbers = [float(value) for value in values]
        return cls(min(numbers), statistics.median(numbers), max(numbers))


def kinds(found: Matrices) -> dict[str, list[torch.Tensor]]:
    """The matrices of all layers, by the last part of their names."""
    result: dict[str, list[torch.Tensor]] = {}
    for name, matrix in found.items():
        result.setdefault(name.rpartition("linear_")[2].rpartition("self_attention.")[2], []).append(matrix.double())
    return result


def stable_rank(matrix: torch.Tensor) -> torch.Tensor:
    """Square of the Frobenius norm over that of the spectral norm."""
    squares = torch.linalg.svdvals(matrix).square()
    return squares.sum() / squares.max()


def smallest(matrix: torch.Tensor) -> torch.Tensor:
    """The smallest singular value of the matrix over its Frobenius norm: where an iteration begins with it."""
    values = torch.linalg.svdvals(matrix)
    return values.min() / torch.linalg.vector_norm(values)


@dataclass(frozen=True)
class Quality:
    """What an iteration makes of matrices, m x n with p the shorter side.

    Attributes:
        defect: Frobenius norm of O O^T - I, or O^T O - I, over sqrt(p).
        distance: Frobenius norm of O - U V^T over sqrt(p).
        size: Frobenius norm of O over sqrt(p): the update's, where an exact one has 1.
    """

    defect: Spread
    distance: Spread
    size: Spread


def quality(orthogonalizer: Orthogonalizer, given: Iterable[torch.Tensor]) -> Quality:
    """Of an iteration, on float64 matrices that are rounded to its dtype."""
    defects, distances, sizes = [], [], []
    for matrix in given:
        root = min(matrix.shape) ** 0.5
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        out = orthogonalizer(matrix.to(orthogonalizer.dtype)[None])[0].double()
        squares = torch.linalg.svdvals(out).square()
        defects.append((squares - 1).norm() / root)
        distances.append((out - left @ right).norm() / root)
        sizes.append(squares.sum().sqrt() / root)
    return Quality(Spread.of(defects), Spread.of(distances), Spread.of(sizes))

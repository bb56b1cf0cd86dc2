"""What a measured step has found of matrices, and its numbers: see :mod:`megatron_muon.optimizers.probe`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_muon.monitor.schema import STATS
from megatron_muon.optimizers.quadrature import Diagonals, evaluated

_NORMS = ("gradient", "momentum", "weight", "added")
"""Of which matrices Frobenius norms are told."""


@dataclass(frozen=True)
class Sample:
    """Numbers of some matrices, all of one weight's block.

    Where ranks share the work of finding singular values, a block has two: what all of its ranks have, and what this
    one alone has found.

    Attributes:
        param: the weight (this rank's shard), a parameter of the optimizer.
        block: name of its block of rows (``q``); empty where the weight has one block.
        numbers: (matrices, len(STATS)), float32, on the device; NaN: not measured.
        ranks: how many ranks have parts of each of these matrices, and its numbers.
    """

    param: torch.Tensor
    block: str
    numbers: torch.Tensor
    ranks: int = 1


@dataclass
class Finding:
    """What was found of the matrices of one update.

    Attributes:
        places: weight, name of the block, and number of matrices, of each item.
        size: elements of a whole matrix.
        ranks: see :class:`Sample`.
        norms: Frobenius norms, by name, (matrices,).
        eps: lower bound of the norm of u, in its units; None: there is none.
        spectra: T of results, momenta and weights, by name, see :func:`spectra.tridiagonals`.
        cosine: with the result of the step before, (matrices,).
    """

    places: list[tuple[torch.Tensor, str, int]]
    size: int
    ranks: int
    norms: dict[str, torch.Tensor]
    eps: float | None = None
    spectra: dict[str, Diagonals] = field(default_factory=dict)
    cosine: torch.Tensor | None = None

    @property
    def shares(self) -> bool:
        """Whether ranks have found a share of the singular values each."""
        return any(diagonals.first is not None for diagonals in self.spectra.values())

    def rows(self, table: torch.Tensor, ranks: int) -> list[Sample]:
        """Of the rows of a table, (matrices, len(STATS))."""
        parts = table.split([count for *_, count in self.places])
        return [Sample(param, block, part, ranks) for (param, block, _), part in zip(self.places, parts, strict=True)]


def samples(found: Sequence[Finding]) -> list[Sample]:
    """The numbers of all that was found: a few hundred small kernels, however many matrices there are."""
    if not found:
        return []
    spectra = evaluated([each.spectra for each in found])
    norms = {name: _column(found, [each.norms.get(name) for each in found]) for name in _NORMS}
    alone, its = _of_norms(found, norms), _of_spectra(found, spectra, norms)
    counts, told = [len(each.norms["gradient"]) for each in found], list[Sample]()
    if not any(each.shares for each in found):
        for each, table in zip(found, _stacked(alone | its).split(counts), strict=True):
            told += each.rows(table, each.ranks)
        return told
    tables = (_stacked(columns).split(counts) for columns in (alone | its, alone, its))
    for each, both, of_all, of_this in zip(found, *tables, strict=True):
        parts = [(of_all, each.ranks), (of_this, 1)] if each.shares else [(both, each.ranks)]
        for table, ranks in parts:
            told += each.rows(table, ranks)
    return told


def _of_norms(found: Sequence[Finding], norms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The numbers of STATS that norms tell, and products with those of the step before."""
    root = _column(found, [each.size**0.5 for each in found])
    eps = _column(found, [each.eps for each in found])
    known = [_column(found, [each.norms.get(name) for each in found], 0.0) for name in ("momentum", "result", "added")]
    return {
        "gradient_norm": norms["gradient"],
        "zero_gradient": norms["gradient"] == 0,
        "nonfinite": ~torch.stack(known).isfinite().all(dim=0),
        "momentum_norm": norms["momentum"],
        "at_bound": torch.where(eps.isnan(), torch.nan, (norms["momentum"] < eps).double()),
        "weight_rms": norms["weight"] / root,
        "update_rms": norms["added"] / root,
        "update_ratio": norms["added"] / norms["weight"],
        "cosine": _column(found, [each.cosine for each in found]),
    }


def _of_spectra(
    found: Sequence[Finding], spectra: Sequence[dict[str, torch.Tensor]], norms: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The numbers of STATS that singular values tell."""
    names = ("unlifted", "defect", "result", "momentum", "weight")
    its = {name: _column(found, [each.get(name) for each in spectra]) for name in names}
    top = its["momentum"].square()  # of u / |u|
    return {
        "unlifted": its["unlifted"],
        "defect": its["defect"],
        "largest_singular": its["result"],
        "spectral_norm": its["weight"] * norms["weight"],
        "stable_rank": torch.where(top > 0, top.reciprocal(), torch.nan),
    }


def _column(
    found: Sequence[Finding], values: Sequence[torch.Tensor | float | None], missing: float = math.nan
) -> torch.Tensor:
    """A number of each of all matrices, (matrices,), float64, from those of each finding, or one for all of them."""
    parts = []
    for each, value in zip(found, values, strict=True):
        norm, number = each.norms["gradient"], missing if value is None else value
        parts.append(number.double() if isinstance(number, torch.Tensor) else norm.new_full(norm.shape, number))
    return torch.cat(parts)


def _stacked(columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """(matrices, len(STATS)), float32; NaN: not measured."""
    unknown = torch.full_like(next(iter(columns.values())), torch.nan)
    return torch.stack([columns.get(name, unknown).double() for name in STATS], dim=-1).float()

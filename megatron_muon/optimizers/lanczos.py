"""Singular values of many matrices at once, as far as products with a few vectors tell them, and nobody waits.

Each matrix A, of shorter side p, has the Gram matrix G of that side. Lanczos' iteration from a unit vector v leads to a
small tridiagonal matrix T, whose largest eigenvalue comes near to that of G from below, and which gives v^T f(G) v for
smooth functions f as e_1^T f(T) e_1 (Gauss quadrature: Golub and Meurant, *Matrices, Moments and Quadrature with
Applications*). The mean over vectors of random signs estimates tr f(G) / p (stochastic Lanczos quadrature: Ubaru, Chen
and Saad, SIAM J. Matrix Anal. Appl. 38, 2017). With k vectors its relative standard deviation is at most
sqrt(2 / (k p_eff)), where p_eff is the number of directions that the trace is a sum of. Where p is small the vectors
are a basis, and nothing is random.

What T tells is found by :mod:`megatron_muon.optimizers.quadrature`.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from megatron_muon.optimizers.matrices import Matrices, Update, first_row_of
from megatron_muon.optimizers.power import noise_of
from megatron_muon.optimizers.quadrature import Diagonals, largest, of_each

STEPS = 8
"""Of the iteration. The largest eigenvalue of the Gram matrix of a large random square matrix, whose spectrum ends
without a gap, is found to about (pi / (2 STEPS + 1))^2 = 3.4 %, the singular value to half as much."""

Start = Callable[[Update, torch.Tensor], torch.Tensor]
"""Gives vectors to start from for a tensor of an update, (its shorter side on this rank, vectors)."""

_STEPS_ALONE = 12
"""Of :func:`spectral_norms`, which acts on updates."""

_IN_STEP = 16
"""Vectors that a CPU counts at least for products that wait for other ranks, each of which counts twice."""

_CACHED = 4 * 2**20
"""Bytes of matrices that a CPU multiplies eight times over before the next ones."""

_BUDGET = 4096
"""Vectors of signs times p, at least; see the module."""

_FEWEST, _MOST = 2, 64
"""Vectors of signs. Where p is ``_MOST`` or less they are a basis."""

_BROKEN = 1e-10
"""Norm of what is left of a vector that ends the iteration, where the matrix has a norm of about 1."""


class _Run:
    """The iterations of all matrices of one update: (matrices, vectors, .), vectors of all tensors one after the other.

    Attributes:
        sums_short: whether tensor parallelism divides the shorter side, the one of T's vectors, if any.
        alphas: the diagonals of T so far, (matrices, vectors, 1) each.
        betas: what is beside the diagonals, after the norms of the vectors that it started from.
    """

    def __init__(
        self,
        update: Update,
        tensors: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        starts: Sequence[torch.Tensor],
    ) -> None:
        is_wide = update.rows <= update.columns
        self.sums_short = update.divides_shorter
        self._tensors = [tensor if is_wide else tensor.mT for tensor in tensors]
        self._widths = [start.size(-1) for start in starts]
        pairs = zip(scales, self._widths, strict=True)
        self._scale = torch.cat([scale.expand(-1, width, 1) for scale, width in pairs], dim=-2)
        self._next = torch.cat([start.mT for start in starts], dim=-2).expand(tensors[0].size(0), -1, -1)
        self._vector = self._before = self._other = self._next
        self.alphas: list[torch.Tensor] = []
        self.betas: list[torch.Tensor] = []

    def to_longer(self) -> list[torch.Tensor]:
        """A^T z of this rank's z, and its square."""
        return [self._times(self._next, True), self._next.square().sum(dim=-1, keepdim=True)]

    def at_longer(self, product: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Take these sums over the shorter side; returns A (A^T v)."""
        beta = square.sqrt()
        factor = torch.where(beta > _BROKEN, beta.reciprocal(), 0.0)
        self.betas.append(beta)
        self._before, self._vector = self._vector, self._next * factor
        self._other = product.mul_(factor * self._scale)
        return self._times(self._other, False)

    def at_shorter(self, product: torch.Tensor) -> None:
        """Take this sum over the longer side: what is left of it is the next vector."""
        product = product.mul_(self._scale)
        # |A^T v|^2 = v^T A A^T v, by that of both sides which this rank has all of.
        pair = (self._other, self._other) if self.sums_short else (self._vector, product)
        alpha = (pair[0] * pair[1]).sum(dim=-1, keepdim=True)
        product.addcmul_(alpha, self._vector, value=-1.0)
        if self.alphas:
            product.addcmul_(self.betas[-1], self._before, value=-1.0)
        self.alphas.append(alpha)
        self._next = product

    def sketch(self) -> torch.Tensor:
        """A^T v of the first tensor and its first unit vectors: (matrices, vectors, longer side on this rank)."""
        return self._other[:, : self._widths[0]].clone()

    def results(self) -> list[Diagonals]:
        """Diagonals and what is beside them, for each tensor: (matrices, vectors, STEPS) and one less."""
        alphas = torch.cat(self.alphas, dim=-1).split(self._widths, dim=-2)
        betas = torch.cat(self.betas, dim=-1)[..., 1:].split(self._widths, dim=-2)
        return list(zip(alphas, betas, strict=True))

    def _times(self, vectors: torch.Tensor, transposed: bool) -> torch.Tensor:
        pairs = zip(self._tensors, vectors.split(self._widths, dim=-2), strict=True)
        # By rows: on CPUs products of transposed matrices with columns take three times as long.
        products = [vector @ (a if transposed else a.mT) for a, vector in pairs]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-2)


def tridiagonals(
    matrices: Matrices,
    tensors: Sequence[Sequence[torch.Tensor]],
    scales: Sequence[Sequence[torch.Tensor]],
    starts: Sequence[Start],
    steps: int = STEPS,
) -> tuple[list[list[Diagonals]], list[torch.Tensor]]:
    """Lanczos' iteration on the Gram matrices of the shorter sides: all ranks with parts of the matrices, together.

    Args:
        matrices: the updates.
        tensors: for each update some tensors A of its shape, (matrices, rows on this rank, columns on this rank).
        scales: (matrices, 1, 1) for each: what A is multiplied by, so that its norm is about 1 or less.
        starts: which vectors to start from, for each tensor of an update: :func:`signs`, :func:`noise`.
        steps: of the iteration; of 0 there is the sketch alone.

    Returns:
        for each update, for each of its tensors, the diagonals of T, (matrices, vectors, steps), and what is beside
        them, (matrices, vectors, steps - 1); and for each update the products of its first tensor with the unit vectors
        that it started from, (matrices, vectors, longer side on this rank).
    """
    if tensors[0][0].device.type == "cpu":
        return _few_at_a_time(matrices, tensors, scales, starts, steps)
    runs = [
        _Run(update, its, factors, [start(update, its[0]) for start in starts])
        for update, its, factors in zip(matrices.updates, tensors, scales, strict=True)
    ]
    return _together(matrices.add_up, runs, steps)


@dataclass
class _Part:
    """One tensor of one update, on a CPU.

    Attributes:
        index: of the update.
        number: of the tensor.
        tensor: A; whole in its shorter side, once it has been summed over the ranks.
        start: gives its vectors.
        by_gram: whether the Gram matrix is used.
        gram: that of the shorter side, without the scale, where it has been summed over the ranks.
        found: the sketch; the diagonals of T and what is beside them, if there are steps.
    """

    index: int
    number: int
    update: Update
    tensor: torch.Tensor
    scale: torch.Tensor
    start: Start
    by_gram: bool
    gram: torch.Tensor | None = None
    found: tuple[torch.Tensor, ...] = ()

    @property
    def kind(self) -> Hashable:
        """What tells it from those that it can be taken together with."""
        tensor, update = self.tensor, self.update
        return self.start, self.by_gram, tensor.shape[1:], tensor.dtype, update.rows, update.columns, update.ranks

    def share(self) -> torch.Tensor:
        """What is summed over the ranks: this rank's part of A among zeros, or of the Gram matrix."""
        if not self.update.divides_shorter:
            return _gram(self.update, self.tensor)
        p, first, size = _side(self.update, self.tensor)
        dim, shape = -2 if self.update.rows <= self.update.columns else -1, list(self.tensor.shape)
        shape[dim] = p
        whole = self.tensor.new_zeros(shape)
        whole.narrow(dim, first, size).copy_(self.tensor)
        return whole

    def take(self, total: torch.Tensor) -> None:
        """Take the sum of all ranks' :meth:`share`."""
        if self.update.divides_shorter:
            self.tensor = total
        else:
            self.gram = total


def _few_at_a_time(
    matrices: Matrices,
    tensors: Sequence[Sequence[torch.Tensor]],
    scales: Sequence[Sequence[torch.Tensor]],
    starts: Sequence[Start],
    steps: int,
) -> tuple[list[list[Diagonals]], list[torch.Tensor]]:
    """:func:`tridiagonals` as CPUs have it: few matrices of one shape at a time, which stay in their caches meanwhile.

    With all of them in each step, as GPUs have it for fewer kernels, products take two to five times as long. So small
    matrices that ranks divide, or their Gram matrices, are first brought together by one message for all; then each
    rank takes a share of them, and T is told by another message.
    """
    parts, divided = list[_Part](), dict[int, list[int]]()
    for index, (update, its, factors) in enumerate(zip(matrices.updates, tensors, scales, strict=True)):
        for number, (tensor, scale, start) in enumerate(zip(its, factors, starts, strict=True)):
            by_gram = _is_cheaper_by_gram(update, start(update, its[0]).size(-1), steps)
            if by_gram or update.ranks == 1:
                parts.append(_Part(index, number, update, tensor, scale, start, by_gram))
            else:
                divided.setdefault(index, []).append(number)
    shared = [part for part in parts if part.update.ranks > 1]
    for part, total in zip(shared, matrices.add_up([part.share() for part in shared]), strict=True):
        part.take(total)
    alike: dict[Hashable, list[_Part]] = defaultdict(list)
    for part in parts:
        alike[part.kind].append(part)
    for group in alike.values():
        _iterate(group, steps)
    sums = iter(matrices.add_up([each for part in shared for each in part.found[1:]]))
    for part in shared:
        part.found = (part.found[0], next(sums), next(sums))
    found = {(part.index, part.number): part.found for part in parts}
    runs = [
        _Run(
            matrices.updates[index],
            [tensors[index][number] for number in numbers],
            [scales[index][number] for number in numbers],
            [starts[number](matrices.updates[index], tensors[index][0]) for number in numbers],
        )
        for index, numbers in divided.items()
    ]
    spectra, sketches = _together(matrices.add_up, runs, steps) if runs else ([], [])
    for row, (index, numbers) in enumerate(divided.items()):
        for place, number in enumerate(numbers):
            found[index, number] = (sketches[row], *(spectra[row][place] if steps else ()))
    firsts = [found[index, 0][0] for index in range(len(tensors))]
    if not steps:
        return [], firsts
    pairs = [[found[index, number][1:] for number in range(len(its))] for index, its in enumerate(tensors)]
    return [[(alphas, betas) for alphas, betas in its] for its in pairs], firsts


def _is_cheaper_by_gram(update: Update, vectors: int, steps: int) -> bool:
    """By operations: few vectors do not make up for the Gram matrix, but where each product waits for other ranks."""
    p, q = sorted((update.rows, update.columns))
    if not steps or update.first_row is not None:
        return False
    counted = vectors if update.ranks == 1 else max(2 * vectors, _IN_STEP)
    return p * (p * q + p * vectors * steps) + p * q * vectors < 2 * p * q * counted * steps


def _iterate(parts: Sequence[_Part], steps: int) -> None:
    """Find what is asked of some that are alike; of T those of this rank's share of the matrices, zeros of others."""
    update, counts = parts[0].update, [part.tensor.size(0) for part in parts]
    start = parts[0].start(update, parts[0].tensor)
    tensor, scale = (_joined([getattr(part, name) for part in parts]) for name in ("tensor", "scale"))
    grams = [part.gram for part in parts if part.gram is not None]
    few = max(1, _CACHED * tensor.size(0) // max(1, tensor.nbytes))
    summed = _joined(grams).split(few) if grams else itertools.repeat(None)
    found = []
    for a, factor, gram in zip(tensor.split(few), scale.split(few), summed, strict=False):
        if not parts[0].by_gram:
            spectra, (sketch,) = _together(list, [_Run(update, [a], [factor], [start])], steps)
            found.append((sketch, *(spectra[0][0] if steps else ())))
            continue
        count = a.size(0)
        low, high = (count * rank // update.ranks for rank in (update.rank, update.rank + 1))
        mine = _gram(update, a[low:high]) if gram is None else gram[low:high]
        pair = _by_gram(mine * factor[low:high].square(), start, steps)
        found.append(
            (_sketch(update, a, factor, start), *(pad(each, (0, 0, 0, 0, low, count - high)) for each in pair))
        )
    each = [_joined(its).split(counts) for its in zip(*found, strict=True)]
    for part, its in zip(parts, zip(*each, strict=True), strict=True):
        part.found = its


def _gram(update: Update, tensor: torch.Tensor) -> torch.Tensor:
    return tensor @ tensor.mT if update.rows <= update.columns else tensor.mT @ tensor


def _sketch(update: Update, tensor: torch.Tensor, scale: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """As :meth:`_Run.sketch`, of matrices that are whole in their shorter sides."""
    norm = start.norm(dim=0)
    vectors = (start * torch.where(norm > _BROKEN, norm.reciprocal(), 0.0)).mT
    return (vectors @ (tensor if update.rows <= update.columns else tensor.mT)).mul_(scale)


def _by_gram(gram: torch.Tensor, start: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonals of T and what is beside them: with Gram matrices in place of two products a step."""
    vector = last = start.mT.expand(gram.size(0), -1, -1)
    alphas, betas = list[torch.Tensor](), list[torch.Tensor]()
    for _ in range(steps):
        beta = last.square().sum(dim=-1, keepdim=True).sqrt()
        before, vector = vector, last * torch.where(beta > _BROKEN, beta.reciprocal(), 0.0)
        last = vector @ gram
        alphas.append((vector * last).sum(dim=-1, keepdim=True))
        last.addcmul_(alphas[-1], vector, value=-1.0)
        if betas:
            last.addcmul_(beta, before, value=-1.0)
        betas.append(beta)
    return torch.cat(alphas, dim=-1), torch.cat(betas, dim=-1)[..., 1:]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _together(
    add_up: Callable[[list[torch.Tensor]], list[torch.Tensor]], runs: Sequence[_Run], steps: int
) -> tuple[list[list[Diagonals]], list[torch.Tensor]]:
    """Take the steps of some runs, each step of all together; see :func:`tridiagonals`."""
    sketches: list[torch.Tensor] = []
    for number in range(max(1, steps)):
        pairs = [(run, run.to_longer()) for run in runs]
        sums = iter(add_up([part for run, two in pairs if run.sums_short for part in two]))
        products = [run.at_longer(*([next(sums), next(sums)] if run.sums_short else two)) for run, two in pairs]
        if number == 0:
            sketches = [run.sketch() for run in runs]
        if not steps:
            return [], sketches
        sums = iter(add_up([z for run, z in zip(runs, products, strict=True) if not run.sums_short]))
        for run, product in zip(runs, products, strict=True):
            run.at_shorter(product if run.sums_short else next(sums))
    return [run.results() for run in runs], sketches


def spectral_norms(
    matrices: Matrices, tensors: Sequence[torch.Tensor], norms: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The largest singular value of each matrix, from below and to 1 %: (matrices, 1, 1) for each update.

    By twelve steps of the iteration, from two vectors of noise that are the same at every layout and in every step: of
    results of Newton-Schulz, the least estimate was 0.9915 of the norm (all sets of coefficients in 4, 5 and 8 steps,
    sides from 8 to 768, momenta with spectra from flat to 1 / k^2). It is never below |A|_F / sqrt(p).

    Args:
        matrices: the updates.
        tensors: A of each, (matrices, rows on this rank, columns on this rank).
        norms: |A|_F of each, (matrices, 1, 1).
    """
    scales = [[torch.where(norm > 0, norm.reciprocal(), 0.0).clamp_max(1e37)] for norm in norms]
    spectra, _ = tridiagonals(matrices, [[a] for a in tensors], scales, [noise], _STEPS_ALONE)
    # To the last digits: which copies of an eigenvalue float32 adds to T is rounding's, and that of the layout.
    tops = of_each(functools.partial(largest, squarings=20), [its[0] for its in spectra])[0]
    found = []
    for update, top, norm in zip(matrices.updates, tops, norms, strict=True):
        share = top.amax(dim=-1).sqrt().clamp_min(min(update.rows, update.columns) ** -0.5)
        found.append(norm * share.to(norm.dtype).view(-1, 1, 1))
    return found


def signs(update: Update, tensor: torch.Tensor) -> torch.Tensor:
    """Vectors for traces, (shorter side on this rank, vectors): random signs, or a basis where that is small."""
    p, first, size = _side(update, tensor)
    count = min(max(-(-_BUDGET // p), _FEWEST), _MOST)
    return _vectors(p, first, size, 0 if p <= _MOST else count, tensor.device, tensor.dtype)


def noise(update: Update, tensor: torch.Tensor) -> torch.Tensor:
    """Two vectors for largest singular values, (shorter side on this rank, 2): noise, orthogonal to no direction."""
    p, first, size = _side(update, tensor)
    return _vectors(p, first, size, -2, tensor.device, tensor.dtype)


def _side(update: Update, tensor: torch.Tensor) -> tuple[int, int, int]:
    """The shorter side p, the number of this rank's first entry of it, and how many it has."""
    if update.rows > update.columns:
        size = tensor.size(-1)
        return update.columns, update.first_column if size < update.columns else 0, size
    size = tensor.size(-2)
    if size == update.rows:
        return update.rows, 0, size
    return update.rows, first_row_of(update.slices), size


@functools.cache
def _vectors(p: int, first: int, size: int, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(size, vectors): of signs; noise where ``count`` is negative; a basis where it is 0. The same on all devices."""
    if count == 0:
        return torch.eye(p, device=device, dtype=dtype)[first : first + size]
    found = noise_of(max(p, first + size) * abs(count), device).view(-1, abs(count))[first : first + size].to(dtype)
    return found if count < 0 else torch.where(found < 0, -1.0, 1.0).to(dtype)

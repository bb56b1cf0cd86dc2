"""Singular values of many matrices at once, as far as products with a few vectors tell them, and nobody waits.

Each matrix A, of shorter side p, has the Gram matrix G of that side. Lanczos' iteration from a unit vector v leads to a
small tridiagonal matrix T, whose largest eigenvalue comes near to that of G from below, and which gives v^T f(G) v for
smooth functions f as e_1^T f(T) e_1 (Gauss quadrature: Golub and Meurant, *Matrices, Moments and Quadrature with
Applications*). The mean over vectors of random signs estimates tr f(G) / p (stochastic Lanczos quadrature: Ubaru, Chen
and Saad, SIAM J. Matrix Anal. Appl. 38, 2017). With k vectors its relative standard deviation is at most
sqrt(2 / (k p_eff)), where p_eff is the number of directions that the trace is a sum of. Where p is small the vectors
are a basis, and nothing is random.

Functions of T are found without its eigenvalues: e_1^T (T - x)^-1 e_1 is a continued fraction, computed for many x at
once, and f a sum of such terms.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

from megatron_muon.optimizers.matrices import Matrices, Update, first_row_of
from megatron_muon.optimizers.power import noise_of

STEPS = 8
"""Of the iteration. The largest eigenvalue of the Gram matrix of a large random square matrix, whose spectrum ends
without a gap, is found to about (pi / (2 STEPS + 1))^2 = 3.4 %, the singular value to half as much."""

_STEPS_ALONE = 12
"""Of :func:`spectral_norms`, which acts on updates."""

Diagonals = tuple[torch.Tensor, torch.Tensor]
"""Of T: (matrices, vectors, STEPS), and what is beside them, one less."""

_CACHED = 4 * 2**20
"""Bytes of matrices that a CPU multiplies eight times over before the next ones."""

_BUDGET = 4096
"""Vectors of signs times p, at least; see the module."""

_FEWEST, _MOST = 2, 64
"""Vectors of signs. Where p is ``_MOST`` or less they are a basis."""

_BROKEN = 1e-10
"""Norm of what is left of a vector that ends the iteration, where the matrix has a norm of about 1."""

_STEEPNESS = 32
"""n of 1 / (1 + (4 s^2)^n), which counts singular values s below 1/2: 0.96 at 0.475, 0.04 at 0.525."""


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
        self.sums_short = update.divides_columns != is_wide
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
    starts: Sequence[Sequence[torch.Tensor]],
    steps: int = STEPS,
) -> tuple[list[list[Diagonals]], list[torch.Tensor]]:
    """Lanczos' iteration on the Gram matrices of the shorter sides: all ranks with parts of the matrices, together.

    Args:
        matrices: the updates.
        tensors: for each update some tensors A of its shape, (matrices, rows on this rank, columns on this rank).
        scales: (matrices, 1, 1) for each: what A is multiplied by, so that its norm is about 1 or less.
        starts: vectors to start from for each, (shorter side on this rank, vectors): :func:`signs`, :func:`noise`.
        steps: of the iteration; of 0 there is the sketch alone.

    Returns:
        for each update, for each of its tensors, the diagonals of T, (matrices, vectors, steps), and what is beside
        them, (matrices, vectors, steps - 1); and for each update the products of its first tensor with the unit vectors
        that it started from, (matrices, vectors, longer side on this rank).
    """
    if are_whole(matrices.updates, tensors[0][0].device):
        return _in_turn(matrices.updates, tensors, scales, starts, steps)
    runs = [_Run(*each) for each in zip(matrices.updates, tensors, scales, starts, strict=True)]
    return _together(matrices.add_up, runs, steps)


def are_whole(updates: Sequence[Update], device: torch.device) -> bool:
    """Whether matrices are taken few at a time, those of one shape together: whole ones on CPUs."""
    return device.type == "cpu" and all(update.ranks == 1 for update in updates)


def _in_turn(
    updates: Sequence[Update],
    tensors: Sequence[Sequence[torch.Tensor]],
    scales: Sequence[Sequence[torch.Tensor]],
    starts: Sequence[Sequence[torch.Tensor]],
    steps: int,
) -> tuple[list[list[Diagonals]], list[torch.Tensor]]:
    """:func:`tridiagonals` of whole matrices, few at a time, which CPUs keep in their caches meanwhile.

    With all of them in each step, as GPUs have it for fewer kernels, products take two to five times as long.
    """
    spectra: list[list[Diagonals]] = [[] for _ in updates]
    sketches = [each[0] for each in tensors]  # in whose place they come
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for index, (update, its) in enumerate(zip(updates, tensors, strict=True)):
        alike[update.rows, update.columns, tuple(each.dtype for each in its)].append(index)
    for indices in alike.values():
        update, counts = updates[indices[0]], [tensors[index][0].size(0) for index in indices]
        for number, start in enumerate(starts[indices[0]]):
            tensor, scale = (_joined([each[index][number] for index in indices]) for each in (tensors, scales))
            few = max(1, _CACHED * tensor.size(0) // max(1, tensor.nbytes))
            pairs = zip(tensor.split(few), scale.split(few), strict=True)
            one_by_one = _by_gram if _is_cheaper_by_gram(update, start.size(-1), steps) else _by_products
            parts = [one_by_one(update, one, factor, start, steps) for one, factor in pairs]
            if steps:
                each = [_joined(found).split(counts) for found in zip(*(its for its, _ in parts), strict=True)]
                for index, pair in zip(indices, zip(*each, strict=True), strict=True):
                    spectra[index].append(pair)
            if number == 0:
                for index, sketch in zip(indices, _joined([its for _, its in parts]).split(counts), strict=True):
                    sketches[index] = sketch
    return spectra if steps else [], sketches


def _is_cheaper_by_gram(update: Update, vectors: int, steps: int) -> bool:
    """By operations: few vectors do not make up for the Gram matrix."""
    p, q = sorted((update.rows, update.columns))
    return steps > 0 and p * (p * q + p * vectors * steps) + p * q * vectors < 2 * p * q * vectors * steps


def _by_products(
    update: Update, tensor: torch.Tensor, scale: torch.Tensor, start: torch.Tensor, steps: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """T and the sketch of some whole matrices."""
    spectra, sketches = _together(list, [_Run(update, [tensor], [scale], [start])], steps)
    return spectra[0][0] if steps else (), sketches[0]


def _by_gram(
    update: Update, tensor: torch.Tensor, scale: torch.Tensor, start: torch.Tensor, steps: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The same, with the Gram matrix in place of two products a step."""
    a = tensor if update.rows <= update.columns else tensor.mT
    gram = (a @ a.mT).mul_(scale.square())
    vector = last = start.mT.expand(a.size(0), -1, -1)
    sketch, alphas, betas = vector, list[torch.Tensor](), list[torch.Tensor]()
    for _ in range(steps):
        beta = last.square().sum(dim=-1, keepdim=True).sqrt()
        before, vector = vector, last * torch.where(beta > _BROKEN, beta.reciprocal(), 0.0)
        if not alphas:
            sketch = (vector @ a).mul_(scale)
        last = vector @ gram
        alphas.append((vector * last).sum(dim=-1, keepdim=True))
        last.addcmul_(alphas[-1], vector, value=-1.0)
        if betas:
            last.addcmul_(beta, before, value=-1.0)
        betas.append(beta)
    return (torch.cat(alphas, dim=-1), torch.cat(betas, dim=-1)[..., 1:]), sketch


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
    starts = [[noise(update, a)] for update, a in zip(matrices.updates, tensors, strict=True)]
    spectra, _ = tridiagonals(matrices, [[a] for a in tensors], scales, starts, _STEPS_ALONE)
    # To the last digits: which copies of an eigenvalue float32 adds to T is rounding's, and that of the layout.
    tops = _of_each(functools.partial(largest, squarings=20), [its[0] for its in spectra])[0]
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


def evaluated(spectra: Sequence[dict[str, Diagonals]]) -> list[dict[str, torch.Tensor]]:
    """What all T together tell: largest singular values by name, and of results ``unlifted`` and ``defect``."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in spectra]
    places = [(its, name, pair) for its, each in zip(found, spectra, strict=True) for name, pair in each.items()]
    if not places:
        return found
    pairs = [pair for _, _, pair in places]
    for (its, name, _), top in zip(places, _of_each(largest, pairs)[0], strict=True):
        its[name] = top.amax(dim=-1).clamp_min(0.0).sqrt()
    results = [(its, pair) for its, name, pair in places if name == "result"]
    below, squares = _of_each(quadratures, [pair for _, pair in results])
    for (its, _), share, square in zip(results, below, squares, strict=True):
        its |= {"unlifted": share.mean(dim=-1).clamp(0.0, 1.0), "defect": square.mean(dim=-1).clamp_min(0.0).sqrt()}
    return found


def _of_each(
    function: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]], pairs: Sequence[Diagonals]
) -> list[list[torch.Tensor]]:
    """Numbers of each T, (matrices, vectors) for each pair: computed together, NaN where T is not finite."""
    alphas, betas = (torch.cat([each[index].flatten(0, 1) for each in pairs]).double() for index in (0, 1))
    are_finite, shapes = alphas.sum(dim=-1).isfinite(), [alphas.shape[:2] for alphas, _ in pairs]
    found, sizes = function(alphas, betas), [m * k for m, k in shapes]
    parts = (torch.where(are_finite, values, torch.nan).split(sizes) for values in found)
    return [[part.view(shape) for part, shape in zip(each, shapes, strict=True)] for each in parts]


def largest(alphas: torch.Tensor, betas: torch.Tensor, squarings: int = 8) -> tuple[torch.Tensor]:
    """The largest eigenvalue of each T, from below: to 1e-4 of it where the second is 2 % less, to 1 % anyhow.

    A mean of the eigenvalues with their 256th powers as weights, so that it takes a dozen kernels.

    Args:
        alphas: diagonals, (..., steps), float64.
        betas: what is beside them, (..., steps - 1).
        squarings: 8, or more for higher powers: with 20 of them it is to 4e-7, whatever else T has.
    """
    matrix = torch.diag_embed(alphas) + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)
    # No eigenvalue is larger, and the largest, as T has no negative ones, is a third of it or more.
    bound = matrix.sum(dim=-1).amax(dim=-1).clamp_min(torch.finfo(alphas.dtype).tiny)
    power = matrix / bound[..., None, None]
    for number in range(squarings):
        if number >= 8:  # before it is too small
            trace = power.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(torch.finfo(alphas.dtype).tiny)
            power = power / trace[..., None, None]
        power = power @ power
    weight = power.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (torch.where(weight > 0, (power * matrix).sum(dim=(-2, -1)) / weight, 0.0),)


def quadratures(alphas: torch.Tensor, betas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e_1^T f(T) e_1 for two functions of singular values s: below 1/2 or not, and (s - 1)^2.

    Args:
        alphas: diagonals, (..., steps), float64.
        betas: what is beside them, (..., steps - 1).
    """
    poles, distances, weights = _terms(alphas.device)
    shifts = torch.cat([poles, -distances.to(poles.dtype)])
    second = first = alphas.new_ones((), dtype=poles.dtype)
    for level in _levels(alphas.to(poles.dtype), betas.to(poles.dtype), shifts):
        second, first = first, level
    below = -(2.0 / _STEEPNESS) * (poles / first[..., : poles.numel()]).sum(dim=-1).real
    # (s - 1)^2 = (s^2 - 1)^2 / (1 + s)^2: the first factor as it is, so that nothing cancels near 1.
    first, second = first[..., poles.numel() :].real, second[..., poles.numel() :].real
    a, b = alphas[..., :1] - 1.0, betas[..., :1]
    if not betas.size(-1):
        return below, (weights * a.square() / first).sum(dim=-1)
    norm = a.square() * second - 2.0 * a * b.square() + b.square() * (alphas[..., :1] + distances)
    return below, (weights * norm / (first * second)).sum(dim=-1)


@functools.cache
def _terms(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Poles of the function that counts, above the real line; d and w of 1 / (1 + s)^2 = sum of w / (s^2 + d)."""
    each = torch.arange(_STEEPNESS // 2, device=device, dtype=torch.float64)
    poles = 0.25 * torch.polar(torch.ones_like(each), math.pi * (2.0 * each + 1.0) / _STEEPNESS)
    # 1 / (1 + s)^2 = (2 / pi) int_0^inf sqrt(d) / ((1 + d)^2 (s^2 + d)) dd, by the trapezoidal rule in log d.
    roots = torch.exp(0.5 * torch.arange(-16, 11, device=device, dtype=torch.float64))
    weights = (4.0 / math.pi) * 0.5 * roots**3 / (1.0 + roots.square()).square()
    return poles, roots.square(), weights


def _levels(alphas: torch.Tensor, betas: torch.Tensor, shifts: torch.Tensor) -> Iterator[torch.Tensor]:
    """The diagonal of U in T - x = U D U^T, from its last entry to its first: 1 / e_1^T (T - x)^-1 e_1.

    Args:
        alphas: (..., steps).
        betas: (..., steps - 1).
        shifts: x, (..., many).

    Yields:
        (..., many).
    """
    diagonals, squares = alphas[..., None] - shifts, betas[..., None].square()
    level = diagonals[..., -1, :]
    for index in range(alphas.size(-1) - 1, -1, -1):
        if index < alphas.size(-1) - 1:
            level = diagonals[..., index, :] - squares[..., index, :] / level
        level = torch.where(level == 0, 1e-300, level)
        yield level

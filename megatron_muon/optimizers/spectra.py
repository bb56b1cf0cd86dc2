"""What is asked of the singular values of a chunk's matrices, brought together so that few products and messages do.

GPUs take each step of :mod:`megatron_muon.optimizers.lanczos` for all matrices at once, for few kernels. CPUs take few
matrices at a time, which stay in their caches meanwhile: with all of them in each step, products take two to five times
as long. There, small matrices that ranks divide are brought together first, or their Gram matrices, by one message for
all; then each rank looks at a share of them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_muon.optimizers.lanczos import STEPS, Run, Start, by_gram, noise, side, signs, together
from megatron_muon.optimizers.matrices import Matrices, Update
from megatron_muon.optimizers.quadrature import Diagonals, largest, of_each

_STEPS_ALONE = 12
"""Of :func:`spectral_norms`, which acts on updates."""

_IN_STEP = 16
"""Vectors that a CPU counts at least for products that wait for other ranks, each of which counts twice."""

_CACHED = 4 * 2**20
"""Bytes of matrices that a CPU multiplies eight times over before the next ones."""


def tridiagonals(
    matrices: Matrices,
    tensors: Sequence[Sequence[torch.Tensor]],
    starts: Sequence[Start],
    steps: int = STEPS,
) -> list[list[Diagonals]]:
    """Lanczos' iteration on the Gram matrices of the shorter sides: all ranks with parts of the matrices, together.

    Args:
        matrices: the updates.
        tensors: for each update some tensors A of its shape, (matrices, rows on this rank, columns on this rank), of
            norms that are about 1 or those of results, so that their fourth powers have a place in float32.
        starts: which vectors to start from, for each tensor of an update: :func:`signs`, :func:`noise`.
        steps: of the iteration.

    Returns:
        T for each update, for each of its tensors.
    """
    parts = [
        _Part(update, tensor, start, steps)
        for update, its in zip(matrices.updates, tensors, strict=True)
        for tensor, start in zip(its, starts, strict=True)
    ]
    small, alone, in_step = list[_Part](), list[_Part](), list[_Part]()
    for part in parts:
        if part.tensor.device.type != "cpu":
            in_step.append(part)
        elif part.is_cheaper_by_gram:
            small.append(part)
        else:
            (alone if part.update.ranks == 1 else in_step).append(part)
    _find_by_grams(matrices, small)
    for group in _alike(alone):
        _find_few_at_a_time(group)
    _find_in_step(matrices, in_step)
    found = iter(parts)
    return [[next(found).found for _ in its] for its in tensors]


def sketched(update: Update, result: torch.Tensor) -> torch.Tensor:
    """A^T v and the unit vectors of :func:`signs`: (matrices, vectors, longer side on this rank).

    Where ranks divide the shorter side, it is this rank's part of the sum.
    """
    vectors, p = signs(update, result), min(update.rows, update.columns)
    unit = vectors if vectors.size(-1) == p else vectors * p**-0.5
    return unit.mT @ (result if update.rows <= update.columns else result.mT)


def spectral_norms(matrices: Matrices, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The largest singular value of matrices of Frobenius norm 1, from below and to 1 %: (matrices, 1, 1) for each.

    By twelve steps of the iteration, from two vectors of noise that are the same at every layout and in every step: of
    results of Newton-Schulz, the least estimate was 0.9915 of the norm (all sets of coefficients in 4, 5 and 8 steps,
    sides from 8 to 768, momenta with spectra from flat to 1 / k^2). It is never below 1 / sqrt(p), for zeros too.

    Args:
        matrices: the updates.
        tensors: A of each, (matrices, rows on this rank, columns on this rank).
    """
    diagonals = [its for (its,) in tridiagonals(matrices, [[a] for a in tensors], [noise], _STEPS_ALONE)]
    # To the last digits: which copies of an eigenvalue float32 adds to T is rounding's, and that of the layout.
    tops = [top.amax(dim=-1) for top in of_each(functools.partial(largest, squarings=20), diagonals)[0]]
    shared = [number for number, its in enumerate(diagonals) if its.first is not None]
    mine = [diagonals[number].of_all(tops[number], 0.0) for number in shared]
    for number, total in zip(shared, matrices.add_up(mine), strict=True):
        tops[number] = total
    found = []
    for update, top, tensor in zip(matrices.updates, tops, tensors, strict=True):
        least = min(update.rows, update.columns) ** -0.5
        found.append(top.sqrt().clamp_min(least).to(tensor.dtype).view(-1, 1, 1))
    return found


@dataclass
class _Part:
    """One tensor of one update: see :func:`tridiagonals`."""

    update: Update
    tensor: torch.Tensor
    start: Start
    steps: int
    found: Diagonals = field(init=False)

    @property
    def vectors(self) -> torch.Tensor:
        """To start from: (shorter side on this rank, vectors)."""
        return self.start(self.update, self.tensor)

    @property
    def p(self) -> int:
        """Of the shorter side."""
        return min(self.update.rows, self.update.columns)

    @property
    def dim(self) -> int:
        """Of the shorter side, in the tensor."""
        return -2 if self.update.rows <= self.update.columns else -1

    def wide(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view with the shorter side first."""
        return tensor if self.dim == -2 else tensor.mT

    @property
    def is_cheaper_by_gram(self) -> bool:
        """By operations: few vectors do not make up for the Gram matrix, but where each product waits for others."""
        update, p, vectors = self.update, self.p, self.vectors.size(-1)
        if update.first_row is not None:
            return False
        q, counted = max(update.rows, update.columns), vectors if update.ranks == 1 else max(2 * vectors, _IN_STEP)
        return p * (p * q + p * vectors * self.steps) + p * q * vectors < 2 * p * q * counted * self.steps

    @property
    def kind(self) -> Hashable:
        """What tells it from those that it can be taken together with: alike on all ranks with parts of it."""
        update, sums_grams = self.update, self.update.ranks > 1 and not self.update.divides_shorter
        size = (self.p,) if sums_grams else (update.rows, update.columns)
        return self.start, self.tensor.dtype, update.ranks, sums_grams, size


def _alike(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    groups: dict[Hashable, list[_Part]] = defaultdict(list)
    for part in parts:
        groups[part.kind].append(part)
    yield from groups.values()


def _find_by_grams(matrices: Matrices, parts: Sequence[_Part]) -> None:
    """With Gram matrices: those of matrices that ranks divide are added up by one message, for each dtype."""
    groups, divided = [*_alike(parts)], dict[torch.dtype, list[list[_Part]]]()
    for group in groups:
        if group[0].update.ranks > 1:
            divided.setdefault(group[0].tensor.dtype, []).append(group)
        else:
            tensor = _joined([part.tensor for part in group])
            _iterate(group, group[0].start(group[0].update, tensor), _grams(group, tensor), 0, tensor.size(0))
    for some in divided.values():
        shapes = [_shape_of_sum(group) for group in some]
        sizes = [shape.numel() for shape in shapes]
        buffer = some[0][0].tensor.new_empty(sum(sizes))
        for group, shape, summed in zip(some, shapes, buffer.split(sizes), strict=True):
            _fill(group, summed.view(shape))
        total = matrices.reduce(buffer)
        for group, shape, summed in zip(some, shapes, total.split(sizes), strict=True):
            update = group[0].update
            low, high = (shape[0] * rank // update.ranks for rank in (update.rank, update.rank + 1))
            own = summed.view(shape)[low:high]
            start = group[0].start(update, own if update.divides_shorter else group[0].tensor)
            _iterate(group, start, _grams(group, own) if update.divides_shorter else own.split(_few(own)), low, high)


def _shape_of_sum(group: Sequence[_Part]) -> torch.Size:
    """Of what ranks add up: whole matrices where they divide the shorter side, else Gram matrices of it."""
    update, p = group[0].update, group[0].p
    count = sum(part.tensor.size(0) for part in group)
    return torch.Size((count, update.rows, update.columns) if update.divides_shorter else (count, p, p))


def _fill(group: Sequence[_Part], target: torch.Tensor) -> None:
    """Write this rank's part of the sum."""
    for part, its in zip(group, target.split([part.tensor.size(0) for part in group]), strict=True):
        if part.update.divides_shorter:
            _, first, size = side(part.update, part.tensor)
            its.zero_().narrow(part.dim, first, size).copy_(part.tensor)
        else:
            torch.bmm(part.wide(part.tensor), part.wide(part.tensor).mT, out=its)


def _grams(group: Sequence[_Part], tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The Gram matrices of matrices that are whole in their shorter sides, of a few at a time."""
    return (group[0].wide(few) @ group[0].wide(few).mT for few in tensor.split(_few(tensor)))


def _few(tensor: torch.Tensor) -> int:
    """How many matrices stay in a CPU's caches."""
    return max(1, _CACHED * tensor.size(0) // max(1, tensor.nbytes))


def _iterate(group: Sequence[_Part], start: torch.Tensor, grams: Iterable[torch.Tensor], low: int, high: int) -> None:
    """Iterate with Gram matrices, some at a time, of the group's matrices from number ``low`` to ``high``."""
    pairs = [by_gram(some, start, group[0].steps) for some in grams]
    alphas, betas = (_joined(its) for its in zip(*pairs, strict=True))
    first, done = 0, 0
    for part in group:
        count = part.tensor.size(0)
        begin, end = (min(max(number - first, 0), count) for number in (low, high))
        mine = slice(done, done + end - begin)
        part.found = Diagonals(alphas[mine], betas[mine], begin if part.update.ranks > 1 else None, count)
        first, done = first + count, done + end - begin


def _find_few_at_a_time(group: Sequence[_Part]) -> None:
    """With the matrices themselves, where they are whole on their ranks."""
    tensor, part, found = _joined([part.tensor for part in group]), group[0], list[Diagonals]()
    for some in tensor.split(_few(tensor)):
        found += together(list, [Run(part.update, [some], [part.vectors])], part.steps)[0]
    counts = [part.tensor.size(0) for part in group]
    alphas, betas = (_joined(its).split(counts) for its in ([x.alphas for x in found], [x.betas for x in found]))
    for part, *its in zip(group, alphas, betas, strict=True):
        part.found = Diagonals(*its)


def _find_in_step(matrices: Matrices, parts: Sequence[_Part]) -> None:
    """Each step of all together, with two messages."""
    by_update: dict[int, list[_Part]] = defaultdict(list)
    for part in parts:
        by_update[id(part.update)].append(part)
    runs = [
        Run(its[0].update, [part.tensor for part in its], [part.vectors for part in its]) for its in by_update.values()
    ]
    found = together(matrices.add_up, runs, parts[0].steps) if parts else []
    for its, diagonals in zip(by_update.values(), found, strict=True):
        for part, each in zip(its, diagonals, strict=True):
            part.found = each


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])

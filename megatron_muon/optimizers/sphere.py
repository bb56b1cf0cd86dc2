"""Muon on the spectral sphere: every logical matrix W keeps its spectral norm R.

The steepest direction that keeps it to first order solves

    max <G, Phi>   with   |Phi|_2 <= 1   and   <Theta, Phi> = 0,   Theta = u v^T,

u and v being W's top singular vectors. Its solution is Phi = msign(G + lambda Theta) where
h(lambda) = <Theta, msign(G + lambda Theta)> = 0 (Su, https://kexue.fm/archives/11241; Xie et al., arXiv 2601.08393).
h does not decrease, so lambda is enclosed from both sides, in a fixed number of evaluations on the device. Each is one
pass of the step engine over all weights, whatever their layouts and the way of exchange. The result is the combination
of both sides that has h = 0: it is feasible, and where h jumps over 0 (which msign does when its argument loses rank)
it is the solution, which no lambda gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine.callbacks import Read, Reduce, Write
from megatron_muon.engine.plan import MatrixSlice
from megatron_muon.engine.slices import Slices
from megatron_muon.optimizers.matrices import Update, is_nonzero, row_norms
from megatron_muon.optimizers.param_step import by_param_group
from megatron_muon.optimizers.power import store_vector, top_singular
from megatron_muon.optimizers.sizes import ZeroWeightCheck
from megatron_muon.optimizers.stages import Variant, Work, init_rows
from megatron_muon.orthogonalize.newton_schulz import EPS, normalized
from megatron_muon.routing.layout import MSIGN

LEFT = "left_singular_vector"
RADIUS = "sphere_radius"
MULTIPLIER = "sphere_multiplier"

_ITERATIONS = 3
"""Power iterations in a step: they start from the vectors of the step before."""

_CHUNKS = 4
"""How many chunks are solved at a time: the exchange of one is under way while another is computed, and what is kept of
a matrix between evaluations (two directions) is kept of these alone."""

_FIRST_WIDTH = 0.05
"""How far from the first lambda the other side is looked for; doubled until it is found. The gradient has norm 1."""


def evaluations(tolerance: float) -> int:
    """The number of passes over all weights: two to enclose lambda, and one for each halving of the interval.

    Args:
        tolerance: 1 for a single one at lambda 0 (MuonSphere); otherwise between 0 and 1.
    """
    return 1 if tolerance >= 1 else 3 + math.ceil(math.log2(1 / tolerance))


@dataclass
class _LambdaSearch:
    """The search for lambda for a batch of matrices: tensors of shape (matrices, ., .).

    Attributes:
        norm: |u|_F of the momentum, in float64.
        left: u of Theta, rows on this rank.
        right: v of Theta, columns on this rank.
        size: spectral norm of the weight before it is brought back to R.
        radius: R.
        start: lambda of the step before.
        value: lambda, to be evaluated next.
        sides: the nearest evaluations with h below 0 and above.
    """

    norm: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    size: torch.Tensor
    radius: torch.Tensor
    start: torch.Tensor
    value: torch.Tensor
    width: float = _FIRST_WIDTH
    sides: list[_Side] = field(default_factory=list)

    def take(self, phi: torch.Tensor, h: torch.Tensor, number: int) -> None:
        """Take note of an evaluation and choose the next lambda."""
        if not self.sides:
            nowhere = torch.zeros_like(h)
            # What is not known yet has any finite Phi.
            self.sides = [_Side(nowhere, nowhere, phi, nowhere.bool()) for _ in range(2)]
        below, above = self.sides
        if number == 1:
            above.phi = above.phi.clone()
        below.take(h < 0, self.value, h, phi)
        above.take(~(h < 0), self.value, h, phi)  # NaN, too: it must show
        middle = (below.value + above.value) / 2
        if number % 2:
            # Where a line through both sides is 0, but not closer to one than a tenth of the way.
            share = (below.h / (below.h - above.h)).clamp(0.1, 0.9)
            middle = below.value + share * (above.value - below.value)
        outside = torch.where(above.known, above.value - self.width, below.value + self.width)
        self.value = torch.where(below.known & above.known, middle, outside)
        self.width *= 2

    @property
    def has_problem(self) -> torch.Tensor:
        """Whether there is something to solve: a gradient, and a weight."""
        return (self.norm >= EPS) & is_nonzero(self.size)

    def result(self) -> torch.Tensor:
        """The combination of both sides that has h = 0; where there is one side only, that one."""
        below, above = self.sides
        share = torch.where(above.h > below.h, above.h / (above.h - below.h), torch.ones_like(above.h))
        share = torch.where(below.known & above.known, share, below.known.to(share.dtype))
        return above.phi.lerp_(below.phi, share)


@dataclass
class _Side:
    """The nearest evaluation with h below or above 0: lambda, h, Phi, and whether there has been one."""

    value: torch.Tensor
    h: torch.Tensor
    phi: torch.Tensor
    known: torch.Tensor

    def take(self, mask: torch.Tensor, value: torch.Tensor, h: torch.Tensor, phi: torch.Tensor) -> None:
        self.value = torch.where(mask, value, self.value)
        self.h = torch.where(mask, h, self.h)
        if phi is not self.phi:
            torch.where(mask, phi, self.phi, out=self.phi)
        self.known = self.known | mask


Searches = dict[MatrixSlice, list[_LambdaSearch]]
"""The searches of each chunk, by the first item of the chunk."""


class SpectralSphere(Variant):
    """Weights keep their spectral norms: W <- W - lr R Phi, after W has been brought back to |W|_2 = R.

    The learning rate is relative to R. Weight decay does nothing to these weights, and neither do scale modes. Use
    coefficients that reach 1, such as ``polar_express`` with 8 steps.

    Args:
        radius: R = radius * sqrt(m / n); 0: the norm that each matrix has in its first step.
        tolerance: how closely lambda is enclosed, relative to a first guess; 1: not at all (MuonSphere).
    """

    name = "spectral_sphere"
    optimizer = "spectral_sphere"
    flags: ClassVar[Mapping[str, str]] = {"radius": "muon_sphere_radius", "tolerance": "muon_sphere_tolerance"}
    decays = False
    scales = False
    lends = False
    watched = (LEFT,)

    def __init__(
        self, radius: float = MuonConfig.sphere_radius, tolerance: float = MuonConfig.sphere_tolerance
    ) -> None:
        self.radius, self.tolerance = radius, tolerance
        self._zeros = ZeroWeightCheck(
            "--muon-sphere-radius 0 (the norm that each matrix has at the start)", "--muon-sphere-radius 2"
        )

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """The radius and the tolerance."""
        return {"sphere_radius": self.radius, "sphere_tolerance": self.tolerance}

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Radius, lambda, and the top left singular vector of each matrix; zeros are filled in the first step."""
        init_rows(param, state, LEFT, RADIUS, MULTIPLIER)

    def update(self, work: Work) -> None:
        """Go over some chunks after others, in several passes that evaluate h at one lambda each."""
        if work.direction != MSIGN:
            work.run()
            return
        for some in work.engine.plan.sub_plans(_CHUNKS):
            searches: Searches = {}
            work.engine.visit(self._preparer(work, searches), some)
            for number in range(evaluations(self.tolerance)):
                work.engine.run(_shifted(work, searches), self._evaluator(work, searches, number), some)
            work.engine.visit(self._finisher(work, searches), some)

    def _preparer(self, work: Work, searches: Searches) -> Write:
        def prepare(slices: Sequence[Slices], batches: Sequence[torch.Tensor], reduce: Reduce) -> None:
            matrices = work.matrices(slices, batches, reduce)
            updates = matrices.updates
            norms = matrices.norms([row_norms(update.mix(), wide=True) for update in updates], wide=True)
            weights = [update.masters() for update in updates]
            iterations = work.iterations(matrices, weights, LEFT, _ITERATIONS)
            found = zip(updates, norms, *top_singular(matrices, weights, LEFT, iterations), strict=True)
            searches[slices[0].items[0]] = [self._begin(*each) for each in found]
            if not self.radius:
                self._zeros.refuse(matrices, [search.radius for search in searches[slices[0].items[0]]])

        return prepare

    def _begin(
        self, update: Update, norm: torch.Tensor, left: torch.Tensor, right: torch.Tensor, size: torch.Tensor
    ) -> _LambdaSearch:
        """Bring weights back to their spheres, and take lambda from where the last step left it."""
        own = self.radius * math.sqrt(update.rows / update.columns)
        radius = update.gather(update.named(RADIUS))[:, :1]
        radius = torch.full_like(radius, own) if own else torch.where(radius > 0, radius, size)
        many = self.tolerance < 1
        value = update.gather(update.named(MULTIPLIER))[:, :1] if many else torch.zeros_like(radius)
        update.multiply(torch.where(size > 0, radius / size, 1.0))
        store_vector(update, LEFT, left, size)
        update.store(update.named(RADIUS), radius)
        return _LambdaSearch(norm, left, right, size, radius, value, value)

    def _evaluator(self, work: Work, searches: Searches, number: int) -> Write:
        def evaluate(slices: Sequence[Slices], directions: Sequence[torch.Tensor], reduce: Reduce) -> None:
            matrices = work.matrices(slices, directions, reduce)
            found = list(zip(searches[slices[0].items[0]], matrices.updates, strict=True))
            sums = matrices.sums([each.left * (update.direction @ each.right) for each, update in found])
            for (each, update), h in zip(found, sums, strict=True):
                each.take(update.direction, h, number)

        return evaluate

    def _finisher(self, work: Work, searches: Searches) -> Write:
        def finish(slices: Sequence[Slices], batches: Sequence[torch.Tensor], reduce: Reduce) -> None:
            matrices = work.matrices(slices, batches, reduce)
            found = list(zip(searches[slices[0].items[0]], matrices.updates, strict=True))
            results = [each.result() for each, _ in found]
            if work.is_measured:
                changes = [result * each.radius for (each, _), result in zip(found, results, strict=True)]
                work.measure(matrices, results, changes, lambda update: update.options.lr)
            for (each, update), result in zip(found, results, strict=True):
                update.add(result.mul_(each.radius), -update.options.lr)
                # Without a gradient, or singular vectors, h is 0 at every lambda: it stays where it was.
                update.store(update.named(MULTIPLIER), torch.where(each.has_problem, each.value, each.start))

        return finish


def _shifted(work: Work, searches: Searches) -> Read:
    """Packs G + lambda Theta with |G|_F = 1. A gradient of zeros stays one: its weight does not move."""

    def shifted(slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
        work.read(slices, batches)
        runs = by_param_group(work.weights, slices, batches)
        for each, (_, _, batch) in zip(searches[slices[0].items[0]], runs, strict=True):
            normalized(batch, batch.dtype, EPS, squares=each.norm.square(), overwrite=True)
            batch.addcmul_(each.left * torch.where(each.norm >= EPS, each.value, 0.0), each.right.mT)

    return shifted

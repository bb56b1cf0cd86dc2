"""Muon on the Stiefel manifold: chosen matrices keep all their singular values at one radius.

Each logical matrix W = R Q, with orthonormal columns of Q (rows, where it is wide), moves along the manifold::

    Q <- msign(Q - lr Phi),   Phi the steepest tangent direction of spectral norm 1 for the momentum

so that an update, too, has spectral norm lr R. :mod:`megatron_muon.optimizers.stiefel_solvers` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine.callbacks import Part, Read, Reduce, Write
from megatron_muon.optimizers.groups import Rate
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.param_step import Weights, pack
from megatron_muon.optimizers.stages import Variant
from megatron_muon.optimizers.step import EngineStep, Step
from megatron_muon.optimizers.stiefel_solvers import PLACING_STEPS, SOLVERS, Msign, defect, tangency, tangent
from megatron_muon.orthogonalize.backends import choose_products
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.routing.layout import STIEFEL, layout_of

__all__ = ["StiefelMuon"]

_OFF = 1e-3
"""How far from the manifold a weight counts as one that comes from elsewhere: rounding leaves 1e-6."""

_WORK = 8
"""Tensors of the size of its matrices that a solver holds at once, about: so many times fewer matrices at a time."""


class StiefelMuon(Muon):
    """Muon that keeps weights whose layout has the direction ``stiefel`` on the Stiefel manifold.

    All other weights get plain Muon (or the direction that their layouts have). In a weight's first step in a process,
    one that is not on the manifold is brought there, W <- R msign(W), before the tangent problem is solved. Singular
    values of 0 have no place on it: a matrix of zeros stays one until it has a gradient, and then is R msign of a
    multiple of that, whatever the learning rate; what a matrix of lower rank lacks is filled by gradients likewise.

    Weight decay and scale modes do not act on weights on the manifold. Their state is ``momentum_buffer`` alone.

    Attributes:
        tangency: a scalar on the device, after a step: the largest |Q^T Phi + Phi^T Q|_F / n of the matrices that this
            rank has solved for, which says how far the solver has come; None if it has none.

    Args:
        params: as of :class:`Muon`.
        lr: relative to R.
        solver: ``admm``, ``dual_ascent`` or ``fixed_point``.
        iterations: of the solver; 0: its default (10, 100, 20).
        radius: R of all matrices. What scale a layer's outputs need must come from here, or from a gain of its own.
        **options: of :class:`Muon`.

    Raises:
        ConfigError: for a wrong value.

    Source:
        Bernstein, https://thinkingmachines.ai/blog/modular-manifolds; Su, https://kexue.fm/archives/11221; Buchanan,
        https://sdbuchanan.com/blog/manifold-muon.
    """

    directions = (*Muon.directions, STIEFEL)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        solver: str = "admm",
        iterations: int = 0,
        radius: float = 1.0,
        **options: Any,
    ) -> None:
        MuonConfig(stiefel_solver=solver, stiefel_iterations=iterations, stiefel_radius=radius).validate(pairs=False)
        self.solver, self.radius = solver, radius
        self.iterations = iterations or SOLVERS[solver].iterations
        self.tangency: torch.Tensor | None = None
        self._placed: set[tuple[torch.Tensor, int, int]] = set()
        super().__init__(params, lr, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``; weights that come with another state are looked at anew."""
        super().__setstate__(state)
        self._placed = set()

    def forget(self) -> None:
        """As of :class:`Muon`: weights are looked at anew."""
        super().forget()
        self._placed = set()

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """As of :class:`Muon`, with those of the manifold."""
        own = {"stiefel_solver": self.solver, "stiefel_iterations": self.iterations, "stiefel_radius": self.radius}
        return {**super().checkpoint_options, **own}

    def notes(self) -> list[str]:
        """What the report says of these weights."""
        params = [param for group in self.param_groups for param in group["params"]]
        count = sum(layout_of(param).direction == STIEFEL for param in params)
        found = f"Stiefel manifold: {count} weight{'s' if count != 1 else ''} of this rank at radius {self.radius:g}"
        return [f"{found}; {self.solver}, {self.iterations} iterations"] if count else []

    def _flops(self, p: int, q: int) -> int:
        return SOLVERS[self.solver].flops(p, q, self.iterations)

    def _change(self, step: Step) -> None:
        self.tangency = None
        super()._change(step)
        moved = (param for param in self._own if param.grad is not None)
        self._placed = _as_they_are([param for param in moved if layout_of(param).direction == STIEFEL])

    def _update(self, work: EngineStep) -> None:
        if work.direction != STIEFEL:
            super()._update(work)
            return
        params = [weight.param for weight in work.weights.values()]
        # 16 bits and TF32 leave errors that add up over the steps.
        with matmul_precision("highest"):
            products, _ = choose_products("auto", params[0].device, work.engine.local_dtype)
            rates = [weight.options.lr for weight in work.weights.values()]
            move = _Move(self, rates, not self._placed >= _as_they_are(params), Msign(products))
            reads = (_momentum_reader(work.weights), _weights_reader(work.weights))
            work.engine.solve(reads, move, _weights_writer(work.weights), self._flops)
        if move.tangency is not None:
            self.tangency = move.tangency if self.tangency is None else torch.maximum(self.tangency, move.tangency)


def _as_they_are(params: Sequence[torch.Tensor]) -> set[tuple[torch.Tensor, int, int]]:
    """Another set once somebody else has written to one of them, or replaced its memory."""
    return {(param, param._version, param.data_ptr()) for param in params}


class _Move:
    """One step of whole matrices on the manifold.

    Attributes:
        tangency: the largest so far.
    """

    def __init__(self, optimizer: StiefelMuon, rates: Sequence[Rate], placing: bool, msign: Msign) -> None:
        """
        Args:
            optimizer: has the options.
            rates: learning rate of each weight.
            placing: whether there may be weights that are not on the manifold yet.
            msign: the matrix sign.
        """
        self.optimizer, self.rates, self.placing, self.msign = optimizer, rates, placing, msign
        self.tangency: torch.Tensor | None = None

    def __call__(self, weights: list[int], batches: list[torch.Tensor]) -> torch.Tensor:
        """The new weights of a batch, (matrices, p, q), p <= q, from momentum and weights."""
        momentum, weight = batches
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        bound = Orthogonalizer.batch_bytes[weight.device.type] // _WORK
        each = max(1, bound // (weight.size(-2) * weight.size(-1) * weight.element_size()))
        for start in range(0, len(weights), each):
            some = slice(start, start + each)
            rate = self._rate([self.rates[index] for index in weights[some]], weight)
            # Tall, as the mathematics is written.
            out[some] = self._moved(weight[some].mT.contiguous(), momentum[some].mT.contiguous(), rate).mT
        return out

    def _moved(self, weight: torch.Tensor, momentum: torch.Tensor, rate: Rate) -> torch.Tensor:
        optimizer = self.optimizer
        weight = weight / optimizer.radius
        if self.placing:
            # Those that are there already stay as they are, strides too, so that a resumed run goes on bit by bit.
            weight = torch.where(defect(weight) > _OFF, self.msign(weight, PLACING_STEPS), weight).contiguous()
        phi = tangent(weight, momentum, optimizer.solver, optimizer.iterations, self.msign)
        worst = tangency(weight, phi).amax()
        self.tangency = worst if self.tangency is None else torch.maximum(self.tangency, worst)
        return self.msign(weight - rate * phi) * optimizer.radius

    @staticmethod
    def _rate(rates: list[Rate], like: torch.Tensor) -> Rate:
        """One number, or one for each matrix: (matrices, 1, 1)."""
        if len(set(rates)) == 1:
            return rates[0]
        if any(isinstance(rate, torch.Tensor) for rate in rates):
            return torch.stack([torch.as_tensor(rate, dtype=like.dtype, device=like.device) for rate in rates]).view(
                -1, 1, 1
            )
        found = torch.tensor(rates, dtype=like.dtype).view(-1, 1, 1)
        return found.to(like.device, non_blocking=True)  # otherwise the host would wait for the device


def _momentum_reader(weights: Weights) -> Read:
    """Packs the momentum, or its mix; the variant of the other weights has no part in these."""
    return lambda parts, slots: pack(weights, Variant().transform, parts, slots)


def _weights_reader(weights: Weights) -> Read:
    """Packs the weights."""

    def read(parts: list[Part], slots: list[torch.Tensor]) -> None:
        _copy([(slot, weight) for slot, weight in _pairs(weights, parts, slots)])

    return read


def _weights_writer(weights: Weights) -> Write:
    """Puts new weights in the place of the old ones."""

    def write(parts: list[Part], results: list[torch.Tensor], reduce: Reduce) -> None:
        _copy([(weight, result) for result, weight in _pairs(weights, parts, results)])

    return write


def _pairs(weights: Weights, parts: list[Part], slots: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of batches and of the weights that they hold, of equal shapes."""
    return [
        (view, weight)
        for part, slot in zip(parts, slots, strict=True)
        for weight, view in part.piece.pairs(weights[part.item.weight].param, slot)
    ]


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, sources)

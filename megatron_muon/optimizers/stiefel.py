"""Muon on the Stiefel manifold: chosen matrices keep all their singular values at one radius.

Each logical matrix W = R Q, with orthonormal columns of Q (rows, where it is wide), moves along the manifold::

    Q <- msign(Q - lr Phi),   Phi the steepest tangent direction of spectral norm 1 for the momentum

so that an update, too, has spectral norm lr R. :mod:`megatron_muon.optimizers.stiefel_solvers` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine.callbacks import Read, Reduce, Write
from megatron_muon.engine.slices import Slices
from megatron_muon.optimizers.handled import HostReads
from megatron_muon.optimizers.param_step import Cut, ParamStep, Weights, by_param_group
from megatron_muon.optimizers.rates import moving, on_host
from megatron_muon.optimizers.stages import Variant, Work
from megatron_muon.optimizers.stiefel_solvers import PROJECTION_STEPS, SOLVERS, Msign, defect, tangency, tangent
from megatron_muon.optimizers.storage import Kept, opened_in_turn
from megatron_muon.orthogonalize.backends import choose_products
from megatron_muon.orthogonalize.kernels.elementwise import Rate
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.routing.layout import STIEFEL, layout_of

_OFF = 1e-3
"""A weight that is further from the manifold than this is brought onto it first: rounding alone leaves 1e-6."""

_WORK = 8
"""How many tensors of the size of its matrices a solver holds at once, about: by that, fewer are solved at a time."""


class StiefelMuon(Variant):
    """Weights whose layout has the direction ``stiefel`` stay on the Stiefel manifold; lr is relative to R.

    All other weights get plain Muon (or the direction that their layouts have). In a weight's first step in a process,
    one that is not on the manifold is brought there, W <- R msign(W), before the tangent problem is solved. Singular
    values of 0 have no place on it: a matrix of zeros stays one until it has a gradient, and then is R msign of a
    multiple of that, whatever the learning rate; what a matrix of lower rank lacks is filled by gradients likewise.

    Weight decay and scale modes do not act on weights on the manifold. Their state is ``momentum_buffer`` alone.

    Attributes:
        tangency: a scalar on the device, after a step: the largest |Q^T Phi + Phi^T Q|_F / n of the matrices that this
            rank has solved for, which says how far the solver has come; None if it has none.

    Args:
        solver: ``admm``, ``dual_ascent`` or ``fixed_point``.
        iterations: of the solver; 0: its default (10, 100, 20).
        radius: R of all matrices. What scale a layer's outputs need must come from here, or from a gain of its own.

    Source:
        Bernstein, https://thinkingmachines.ai/blog/modular-manifolds; Su, https://kexue.fm/archives/11221; Buchanan,
        https://sdbuchanan.com/blog/manifold-muon.
    """

    optimizer = "stiefel_muon"
    flags: ClassVar[Mapping[str, str]] = {
        "solver": "muon_stiefel_solver",
        "iterations": "muon_stiefel_iterations",
        "radius": "muon_stiefel_radius",
    }
    directions = (*Variant.directions, STIEFEL)

    def __init__(
        self,
        solver: str = MuonConfig.stiefel_solver,
        iterations: int = MuonConfig.stiefel_iterations,
        radius: float = MuonConfig.stiefel_radius,
    ) -> None:
        self.solver, self.iterations, self.radius = solver, iterations, radius
        self.tangency: torch.Tensor | None = None
        self._projected: dict[torch.Tensor, tuple[int, int]] = {}

    @property
    def _number(self) -> int:
        """How many iterations the solver makes."""
        return self.iterations or SOLVERS[self.solver].iterations

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """Solver, the number of its iterations, and radius."""
        return {"stiefel_solver": self.solver, "stiefel_iterations": self._number, "stiefel_radius": self.radius}

    def forget(self) -> None:
        """Check again whether weights are on the manifold."""
        self._projected = {}

    @property
    def obstacle(self) -> str:
        """See :class:`Variant`."""
        return "the fixed_point solver computes eigenvalues, for which the host waits" * (self.solver == "fixed_point")

    def is_settled(self) -> bool:
        """Whether all weights are on the manifold, as the last step left them."""
        return all(_as_it_is(param) == known for param, known in self._projected.items())

    def begin_step(self) -> None:
        """Reset :attr:`tangency`, which is that of one step."""
        self.tangency = None

    def notes(self, params: Sequence[torch.Tensor]) -> list[str]:
        """How many weights are on the manifold."""
        count = sum(layout_of(param).direction == STIEFEL for param in params)
        found = f"Stiefel manifold: {count} weight{'s' if count != 1 else ''} of this rank at radius {self.radius:g}"
        return [f"{found}; {self.solver}, {self._number} iterations"] if count else []

    def update(self, work: Work) -> None:
        """Move weights on the manifold, each matrix whole; all others as plain Muon does."""
        if work.direction != STIEFEL:
            work.run()
            return
        params = [weight.param for weight in work.weights.values()]
        # 16 bits and TF32 leave errors that add up over the steps.
        with matmul_precision("highest"):
            products, _ = choose_products("auto", params[0].device, work.engine.local_dtype)
            rates = [weight.options.lr for weight in work.weights.values()]
            projecting = any(self._projected.get(param) != _as_it_is(param) for param in params)
            move = _Move(self.solver, self._number, self.radius, rates, projecting, Msign(products))
            reads = (work.read, _weights_reader(work.weights))
            work.engine.solve(reads, move, self._measuring(work, _weights_writer(work.weights)), self._flops)
        moved = [weight.param for weight in work.weights.values() if not (projecting and _stays(weight))]
        self._projected |= {param: _as_it_is(param) for param in moved}
        if move.tangency is not None:
            self.tangency = move.tangency if self.tangency is None else torch.maximum(self.tangency, move.tangency)

    def _measuring(self, work: Work, write: Write) -> Write:
        """A ``write`` that has the probe of a measured step look before; results are weights on the manifold."""

        def measuring(slices: Sequence[Slices], results: Sequence[torch.Tensor], reduce: Reduce) -> None:
            matrices = work.matrices(slices, results, reduce)
            new = [update.direction for update in matrices.updates]
            changes = [x - update.masters() for x, update in zip(new, matrices.updates, strict=True)]
            on_manifold = [x / self.radius for x in new]
            work.measure(matrices, on_manifold, changes, lambda update: 1.0, are_successive=False)
            write(slices, results, reduce)

        return measuring if work.is_measured else write

    def _flops(self, p: int, q: int) -> int:
        return SOLVERS[self.solver].flops(p, q, self._number)


def _stays(weight: ParamStep) -> bool:
    """Whether a weight was not brought onto the manifold in its first step: at rate 0 it stays where it is."""
    if (rate := on_host(weight.group["lr"])) is None:
        HostReads.note("whether a rate is 0")
        rate = float(weight.options.lr)  # waits for the device, in steps that bring weights onto the manifold
    return rate == 0.0


def _as_it_is(param: torch.Tensor) -> tuple[int, int]:
    """What changes when somebody else writes to a weight, or replaces its memory."""
    return param._version, param.data_ptr()


class _Move:
    """One step of whole matrices on the manifold.

    Attributes:
        tangency: the largest residual so far, see :attr:`StiefelMuon.tangency`.
    """

    def __init__(
        self, solver: str, iterations: int, radius: float, rates: Sequence[Rate], projecting: bool, msign: Msign
    ) -> None:
        """
        Args:
            solver: see :class:`StiefelMuon`.
            iterations: of the solver.
            radius: R.
            rates: learning rate of each weight.
            projecting: whether there may be weights that are not on the manifold yet.
            msign: the matrix sign.
        """
        self.solver, self.iterations, self.radius = solver, iterations, radius
        self.rates, self.projecting, self.msign = rates, projecting, msign
        self.tangency: torch.Tensor | None = None

    def __call__(self, weights: list[int], batches: list[torch.Tensor]) -> torch.Tensor:
        """The new weights of a batch, (matrices, m, n), from momentum and weights."""
        momentum, weight = batches
        is_tall = weight.size(-2) > weight.size(-1)
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        bound = Orthogonalizer.batch_bytes[weight.device.type] // _WORK
        each = max(1, bound // (weight.size(-2) * weight.size(-1) * weight.element_size()))
        for start in range(0, len(weights), each):
            some = slice(start, start + each)
            rate = self._rate([self.rates[index] for index in weights[some]], weight)
            # Tall, as the mathematics is written.
            tall = [(x[some] if is_tall else x[some].mT).contiguous() for x in (weight, momentum)]
            moved = self._moved(tall[0], tall[1], rate)
            out[some] = moved if is_tall else moved.mT
        return out

    def _moved(self, weight: torch.Tensor, momentum: torch.Tensor, rate: Rate) -> torch.Tensor:
        given, weight = weight, weight / self.radius
        if self.projecting:
            # Those that are there already stay as they are, strides too, so that a resumed run goes on bit by bit.
            weight = torch.where(defect(weight) > _OFF, self.msign(weight, PROJECTION_STEPS), weight).contiguous()
        phi = tangent(weight, momentum, self.solver, self.iterations, self.msign)
        worst = tangency(weight, phi).amax()
        self.tangency = worst if self.tangency is None else torch.maximum(self.tangency, worst)
        return moving(rate, self.msign(weight - rate * phi) * self.radius, given)

    @staticmethod
    def _rate(rates: list[Rate], like: torch.Tensor) -> Rate:
        """The learning rate: one number, or a tensor with one for each matrix, (matrices, 1, 1)."""
        if len(set(rates)) == 1:
            return rates[0]
        if any(isinstance(rate, torch.Tensor) for rate in rates):
            one = like.new_ones(())  # numbers by kernels: the host would wait for a copy of each
            return torch.stack([one * rate for rate in rates]).to(like.dtype).view(-1, 1, 1)
        found = torch.tensor(rates, dtype=like.dtype).view(-1, 1, 1)
        return found.to(like.device, non_blocking=True)  # otherwise the host would wait for the device


def _weights_reader(weights: Weights) -> Read:
    """A callback that packs the weights."""

    def read(slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
        for cut, masters in _parts(weights, slices, batches):
            for numbers, take in opened_in_turn(masters, cut, writes=False):
                if numbers:
                    torch._foreach_copy_(take(cut.slots), numbers)

    return read


def _weights_writer(weights: Weights) -> Write:
    """A callback that puts new weights in the place of the old ones."""

    def write(slices: Sequence[Slices], results: Sequence[torch.Tensor], reduce: Reduce) -> None:
        for cut, masters in _parts(weights, slices, results):
            for numbers, take in opened_in_turn(masters, cut):
                if numbers:
                    torch._foreach_copy_(numbers, take(cut.slots))

    return write


def _parts(
    weights: Weights, slices: Sequence[Slices], batches: Sequence[torch.Tensor]
) -> Iterator[tuple[Cut, list[Kept]]]:
    """Weights whose numbers are kept in one way, and what cuts them to the matrices of a batch."""
    for run, mine, batch in by_param_group(weights, slices, batches):
        yield Cut(run, batch), [weight.master for weight in mine]

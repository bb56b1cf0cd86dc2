"""What a step tells of the matrices that it updates: norms, singular values, sizes, as numbers that stay on the device.

A :class:`Probe` looks at the steps that it is told to look at, where matrices are written: at the momentum u, at the
result O of the orthogonalization and at the weight W, all of whole logical matrices, by sums over the ranks that have
parts of them. It needs copies of the matrices of one chunk (``chunk_mb``) for u and W. Nothing that it does changes a
bit of weights or state, and the host waits for nothing::

    optimizer.probe = Probe()
    optimizer.probe.is_due = True
    optimizer.step()
    samples = optimizer.probe.take()

Its numbers are those of :data:`megatron_muon.monitor.schema.STATS`. A number that was not measured is NaN, as are
ratios of zeros. Matrices that are not orthogonalized (directions ``sign``, ``row_norm``, ``col_norm``) have no
spectra, rows of the scalar optimizer have no numbers; where each shard is orthogonalized by itself (``blockwise``),
each counts as a matrix. Momentum that is kept in 16 or 8 bits is measured as it is kept. On the spectral sphere W is
measured where the step has brought it back to; on the Stiefel manifold O is the new weight over its radius, and has
no cosine. Variants of others that write weights by themselves are not measured unless they call :meth:`Work.measure`.

Norms are exact. Largest singular values are estimates from below, to 2 % or less; the stable rank is to 4 %. The
defect has a standard deviation of 2 % for usual coefficients, more where a handful of many directions makes it up;
the share of directions one of sqrt(share / 2048) at most, and what lies between 0.4 and 0.6 may count on either side.
Of 64 directions or fewer nothing is random. See :mod:`megatron_muon.optimizers.lanczos`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from megatron_muon.engine.clock import NO_CLOCK, STEP, Clock, NoClock
from megatron_muon.engine.step import StepEngine
from megatron_muon.monitor.schema import TIMES
from megatron_muon.optimizers.findings import Finding, Sample, samples
from megatron_muon.optimizers.lanczos import noise, signs
from megatron_muon.optimizers.matrices import Matrices, Update, row_norms
from megatron_muon.optimizers.spectra import sketched, tridiagonals
from megatron_muon.orthogonalize.kernels.elementwise import Rate
from megatron_muon.orthogonalize.switches import matmul_precision

Mixed = Callable[[Update], torch.Tensor]
"""Gives u of an update as a new batch, as it is orthogonalized."""


class _Spectra(NamedTuple):
    """What is asked of some updates' singular values; see :func:`spectra.tridiagonals`."""

    matrices: Matrices
    found: Sequence[Finding]
    tensors: list[list[torch.Tensor]]
    are_successive: bool


_SMALL = 1e-15
"""Norms between it and its inverse have squares in float32, and so have entries that count in them."""

_HELD = 16 * 2**20
"""Bytes of matrices that wait on CPUs, so that those of one shape are looked at together."""


@dataclass
class Probe:
    """Measures the matrices of one optimizer in the steps that it is told to.

    Attributes:
        is_due: set before the step that is to be measured; that step sets it to False again.
        is_next_due: set before the step before it, for the cosine: that keeps products of the results with a few
            vectors, until the next step has been taken.
        measures: whether the step that is being taken is measured.
        keeps: whether that step, or the last one, keeps products.
    """

    is_due: bool = False
    is_next_due: bool = False
    measures: bool = field(default=False, init=False)
    keeps: bool = field(default=False, init=False)
    _clock: NoClock = field(default=NO_CLOCK, init=False)
    _compares: bool = field(default=False, init=False)
    _findings: list[Finding] = field(default_factory=list, init=False)
    _waiting: list[_Spectra] = field(default_factory=list, init=False)
    _before: dict[Hashable, torch.Tensor] = field(default_factory=dict, init=False)
    _sketches: dict[Hashable, torch.Tensor] = field(default_factory=dict, init=False)

    @property
    def is_wanted(self) -> bool:
        """Whether the next step is to be taken with it; alike on all ranks, those without matrices too."""
        return self.is_due or self.is_next_due or self.keeps

    def begin(self) -> bool:
        """At the beginning of a step: whether it has something to look at."""
        self._compares = self.keeps
        self.measures, self.keeps, self.is_due, self.is_next_due = self.is_due, self.is_next_due, False, False
        self._before, self._sketches = self._sketches, {}
        if self.measures:
            self._findings = []
        return self.measures or self.keeps

    @contextlib.contextmanager
    def looking(self, engines: Sequence[StepEngine]) -> Iterator[None]:
        """Within such a step: engines are timed if it is measured. Then what was kept of the last is forgotten."""
        clock: NoClock = NO_CLOCK
        if self.measures:
            clock = self._clock = Clock(engines[0].wire.device if engines else torch.device("cpu"))
        for engine in engines:
            engine.clock = clock
        phase = clock.enter(STEP)
        try:
            yield
            clock.enter("")
            with matmul_precision("highest"):
                self._look_at_waiting()
        finally:
            self._waiting = []
            clock.enter(phase)
            for engine in engines:
                engine.clock = NO_CLOCK
            self._before = {}

    @contextlib.contextmanager
    def aside(self, engine: StepEngine) -> Iterator[None]:
        """Within, time and messages are the probe's own, and not counted as the step's."""
        clock, counters = engine.clock, engine.counters
        phase, before = clock.enter(""), replace(counters)
        yield
        clock.enter(phase)
        clock.add(bytes=before.bytes - counters.bytes, collectives=before.collectives - counters.collectives)

    def times(self) -> dict[str, float]:
        """The times of the last measured step, without the probe's own, by :data:`megatron_muon.monitor.schema.TIMES`.

        The device must have been waited for.
        """
        clock, self._clock = self._clock, NO_CLOCK
        return clock.take() if isinstance(clock, Clock) else dict.fromkeys(TIMES, 0.0)

    def look(
        self,
        matrices: Matrices,
        results: Sequence[torch.Tensor] | None,
        mixed: Mixed,
        eps: float | None = None,
        *,
        are_successive: bool = True,
    ) -> list[Finding]:
        """Look at matrices before their weights change; all ranks that have parts of them must do it.

        Args:
            matrices: the updates.
            results: O of each, (matrices, rows on this rank, columns on this rank), which stays as it is; None: the
                matrices are not orthogonalized, and nothing is asked about their singular values.
            mixed: gives u.
            eps: the lower bound of the norm of u.
            are_successive: whether O is an update, which may be compared with that of the step before.

        Returns:
            what was found, for :meth:`added`; empty in a step that is not measured.
        """
        with matmul_precision("highest"):
            if self.measures:
                return self._measured(matrices, results, mixed, eps, are_successive)
            if results is not None and are_successive:
                self._keep(matrices, [*map(sketched, matrices.updates, results)])
            return []

    def added(
        self,
        found: Sequence[Finding],
        matrices: Matrices,
        changes: Sequence[torch.Tensor] | None,
        factor: Callable[[Update], Rate | torch.Tensor],
    ) -> None:
        """Note what is added to weights.

        Args:
            found: by :meth:`look`.
            matrices: the updates.
            changes: of each; None: the results as they were looked at.
            factor: on the changes of an update, learning rate and all; a number, or (matrices,).
        """
        if not found:
            return
        if changes is None:
            norms = [each.norms["result"] for each in found]
        else:
            norms = [norm.view(-1) for norm in matrices.norms([row_norms(x, wide=True) for x in changes], wide=True)]
        for each, update, norm in zip(found, matrices.updates, norms, strict=True):
            each.norms["added"] = (norm.double() * factor(update)).abs()

    def take(self) -> list[Sample]:
        """The numbers of the last measured step, which are forgotten here.

        This starts a few hundred small kernels, however many matrices there are; it waits for nothing.
        """
        found, self._findings = self._findings, []
        return samples(found)

    def _measured(
        self,
        matrices: Matrices,
        results: Sequence[torch.Tensor] | None,
        mixed: Mixed,
        eps: float | None,
        are_successive: bool,
    ) -> list[Finding]:
        updates, names, weights = matrices.updates, ["gradient", "weight", "momentum"], list[torch.Tensor]()
        rows, mixes = [_gradient_norms(update) for update in updates], list[torch.Tensor]()
        if results is None:
            rows += [update.master_norms().double() for update in updates]
            rows += [_partial_norms(mixed(update)) for update in updates]  # one copy at a time
        else:
            weights, mixes = [update.masters() for update in updates], [mixed(update) for update in updates]
            rows += [_partial_norms(tensor) for tensor in (*weights, *mixes, *results)]
            names.append("result")
        norms = iter(matrices.norms(rows, wide=True))
        by_name = {name: [next(norms) for _ in updates] for name in names}
        found = [
            Finding(
                _places(update),
                update.rows * update.columns,
                update.ranks,
                {name: by_name[name][index].view(-1).double() for name in names},
                None if eps is None else eps / _damping(update),
            )
            for index, update in enumerate(updates)
        ]
        if results is not None:
            self._look_at_spectra(matrices, found, results, mixes, weights, by_name, are_successive)
        self._findings += found
        return found

    def _look_at_spectra(
        self,
        matrices: Matrices,
        found: Sequence[Finding],
        results: Sequence[torch.Tensor],
        mixes: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        norms: dict[str, list[torch.Tensor]],
        are_successive: bool,
    ) -> None:
        for name, copies in (("momentum", mixes), ("weight", weights)):
            for copy, norm in zip(copies, norms[name], strict=True):
                copy.mul_(torch.where(norm > 0, norm.reciprocal(), 0.0).clamp_max(1e37))
        tensors = [list(each) for each in zip(results, mixes, weights, strict=True)]
        if results[0].device.type != "cpu" or any(update.ranks > 1 for update in matrices.updates):
            self._look_at([_Spectra(matrices, found, tensors, are_successive)])
            return
        tensors = [[its[0].clone(), *its[1:]] for its in tensors]  # the others are copies
        self._waiting.append(_Spectra(matrices, found, tensors, are_successive))
        if sum(x.nbytes for its in self._waiting for each in its.tensors for x in each) > _HELD:
            self._look_at_waiting()

    def _look_at_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._look_at(waiting)

    def _look_at(self, waiting: Sequence[_Spectra]) -> None:
        """Find the singular values of some updates: of those of one chunk, or of matrices that are whole on CPUs."""
        together = Matrices([update for its in waiting for update in its.matrices.updates], waiting[0].matrices.reduce)
        tensors = [each for its in waiting for each in its.tensors]
        spectra = iter(tridiagonals(together, tensors, [signs, noise, noise]))
        for matrices, found, its, are_successive in waiting:
            for finding in found:
                finding.spectra = dict(zip(("result", "momentum", "weight"), next(spectra), strict=True))
            if are_successive and (self._compares or self.keeps):
                mine = [sketched(update, result) for update, (result, *_) in zip(matrices.updates, its, strict=True)]
                self._compare(matrices, found, mine)
                if self.keeps:
                    self._keep(matrices, mine)

    def _compare(self, matrices: Matrices, found: Sequence[Finding], sketches: Sequence[torch.Tensor]) -> None:
        """Cosines with the products that were kept in the step before; NaN where there are none."""
        if not self._compares:
            return
        parts = []
        for update, sketch in zip(matrices.updates, sketches, strict=True):
            own = sketch.split(update.slices.counts)
            known = [self._before.get(key) for key in _keys(update)]
            before = torch.cat(
                [
                    torch.full_like(mine, torch.nan) if its is None or its.shape != mine.shape else its
                    for mine, its in zip(own, known, strict=True)
                ]
            )
            both = torch.stack([sketch, before], dim=1)
            parts.append(both if update.divides_shorter else _dots(both))
        for each, update, total in zip(found, matrices.updates, matrices.add_up(parts), strict=True):
            both, mine, its = (_dots(total) if update.divides_shorter else total).double().unbind(dim=1)
            each.cosine = both / (mine * its).sqrt()

    def _keep(self, matrices: Matrices, sketches: Sequence[torch.Tensor]) -> None:
        for update, sketch in zip(matrices.updates, sketches, strict=True):
            self._sketches |= zip(_keys(update), sketch.split(update.slices.counts), strict=True)


def _dots(pair: torch.Tensor) -> torch.Tensor:
    """Of (matrices, 2, vectors, entries): the product of both and their squares, (matrices, 3)."""
    mine, before = pair.unbind(dim=1)
    return torch.stack([mine * before, mine.square(), before.square()], dim=1).flatten(2).sum(dim=-1)


def _keys(update: Update) -> list[Hashable]:
    """What tells the sketches of items from all others."""
    return [(param, its, update.rows, update.columns) for param, its in update.keys]


def _places(update: Update) -> list[tuple[torch.Tensor, str, int]]:
    names = []
    for its in update.slices.ranges:
        several = len(its.layout.indices) > 1
        names.append(its.layout.sections[its.layout.indices[its.block][0]].name if several else "")
    return [
        (weight.param, name, count)
        for weight, name, count in zip(update.weights, names, update.slices.counts, strict=True)
    ]


def _damping(update: Update) -> float:
    """What u is multiplied by before it is divided by its norm, see :func:`param_step.damp`."""
    depth = update.options.damping_depth
    return depth * (update.rows / update.columns) ** 0.5 if depth else 1.0


def _gradient_norms(update: Update) -> torch.Tensor:
    """Norms of the rows of gradients as they are, (matrices, rows on this rank, 1), float64."""
    found = update.direction.new_empty((*update.direction.shape[:-1], 1), dtype=torch.float64)
    grads, slots = update.pairs([weight.raw_grad for weight in update.weights], found)
    for grad, norms in zip(grads, slots, strict=True):
        norms.copy_(_row_norms(grad))
    return found


def _partial_norms(tensor: torch.Tensor) -> torch.Tensor:
    """Norms of the rows, or of the columns where these lie together in memory: (matrices, many, 1), float64."""
    return _row_norms(tensor if tensor.stride(-1) == 1 else tensor.mT)


def _row_norms(tensor: torch.Tensor) -> torch.Tensor:
    """(..., rows, 1), float64, of numbers of any size; on CPUs in float32 where it has room, in a third of the time."""
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        norms = row_norms(tensor)
        if bool(((norms > _SMALL) & (norms < 1.0 / _SMALL)).all()):
            return norms.double()
    return row_norms(tensor, wide=True)

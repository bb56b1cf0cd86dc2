"""What measured numbers say is wrong with a run: which weights, since when, what usually causes it, and what to try.

Each alarm judges one number of :data:`megatron_muon.monitor.schema.STATS`, of one block of a weight. It is raised where
the number is out of its range in several measured steps running, once, and again only after it had ended, or when
twice as many weights of a class have it. A weight with a graver one is not judged by what follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_muon.monitor.table import Row, Table, class_of

__all__ = ["ALARMS", "REPLICAS", "Alarm", "Alarms", "Kind", "Thresholds"]

_NAMES = 4
"""Weights that an alarm tells by name."""


def _limit(value: float, reason: str, source: str) -> Any:
    return field(default=value, metadata={"reason": reason, "source": source})


@dataclass(frozen=True)
class Thresholds:
    """Where alarms begin. Each field's metadata say why there (``reason``), and where that is from (``source``)."""

    in_a_row: int = _limit(
        4,
        "measured steps running in which a number must be out of its range: a batch may lack an expert's tokens",
        "a choice",
    )
    unlifted: float = _limit(
        0.75,
        "share of directions that the iteration leaves below 1/2, on the mean of a block's matrices, when rates no "
        "longer rise",
        "linear_proj of the example: 0.67 at iteration 1, 0.27 at 40 (with coefficients that lift less 0.79 at 4); ten "
        "healthy small runs: 0.44 at most after twenty steps; arXiv 2606.04058 on late layers of large models",
    )
    defect_factor: float = _limit(
        1.5,
        "times what the coefficients leave of the directions that they lift, of random numbers, but at least 0.3",
        "the band of the coefficients `simple`, 0.68 to 1.20",
    )
    largest_singular: float = _limit(
        1.5,
        "of the result: at most 1.15 with `quintic`, 1.2 with `simple`, 1.3 with `cubic5`",
        "the coefficients; 1.15 was measured",
    )
    dead_share: float = _limit(
        0.5, "share of a block's matrices whose gradients are zeros, where its experts are one weight", "a choice"
    )
    high_ratio: float = _limit(
        0.5,
        "update over weight, from 20 steps on: a weight that has grown from zeros has 1/4 at most by then",
        "of healthy small runs 0.08 at most; about 0.001 is a usual aim for weights of full size",
    )
    jump: float = _limit(
        10.0,
        "update over weight in any single step: what was learned, or drawn at the start, is gone",
        "a weight that grows from zeros has 2 at most, in its second step",
    )
    low_ratio: float = _limit(
        1e-7, "update over weight: float32 rounds smaller ones away", "2^-24, half the distance to the next number"
    )
    decayed: float = _limit(
        0.01, "of the largest learning rate so far: with lower ones updates are meant to end", "a choice"
    )
    settled: int = _limit(
        20,
        "steps before ratios and directions are judged: weights may grow from zeros, first gradients be alike",
        "see high_ratio and unlifted",
    )
    logit: float = _limit(
        100.0, "largest attention logit from which on growth is judged", "the threshold of QK-clip in Kimi K2"
    )
    logit_growth: float = _limit(1.1, "times the measured step before, so often running: geometric growth", "a choice")


@dataclass(frozen=True)
class Kind:
    """What there is to say of a check.

    Attributes:
        alarm: the name of the alarm that it raises.
        meaning: of its value.
        cause: what usually is behind it.
        remedy: flags to try; ``{glob}`` stands for the class of weights.
    """

    alarm: str
    meaning: str
    cause: str
    remedy: str


REPLICAS, LOGITS = "replicas_differ", "logits_growing"

_RATIO = "size of the update over that of the weight"

ALARMS: Mapping[str, Kind] = {
    "nonfinite": Kind(
        "nonfinite",
        "share of matrices with NaN or infinity in momentum or update",
        "a rate that is too high, or an overflow in the forward pass; momentum keeps it for ever",
        "a checkpoint from before, with --muon-nonfinite skip, a lower --lr, --clip-grad 1.0",
    ),
    REPLICAS: Kind(
        REPLICAS,
        "copies that do not have the same bits",
        "a fault of memory or of a device, other flags or versions on a rank, gradients that are not reduced over all",
        "a checkpoint from before, without the node of the rank that is named; --deterministic-mode",
    ),
    "dead_experts": Kind(
        "dead_experts",
        "share of gradients that are all zeros",
        "a router that sends no tokens there: it has collapsed, or its load is hardly balanced",
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2, or --moe-router-enable-expert-bias",
    ),
    "no_gradient": Kind(
        "no_gradient",
        "share of gradients that are all zeros",
        "a branch of the model that is detached, masked or multiplied by zero: the loss does not reach it; of query "
        "and key weights, attention logits so large that softmax is 0 or 1",
        "requires_grad = False for such weights, or another model; for query and key weights a checkpoint from before, "
        "with a lower --lr or --qk-clip",
    ),
    "norm_at_bound": Kind(
        "norm_at_bound",
        "share of matrices whose momentum is below --muon-eps, so that updates shrink",
        "a --muon-eps that is large for gradients of this size, or a loss that hardly reaches the weight",
        "a smaller --muon-eps, a loss that is scaled up",
    ),
    "rank_collapse": Kind(
        "rank_collapse",
        "share of the directions of the momentum that Newton-Schulz leaves below half size",
        "gradients of few directions: few tokens, or tokens that are all alike (padding that is not masked, a router "
        "that has collapsed); in late layers of large models, singular values below what the steps can lift",
        "--muon-param-rule '{glob}=steps:7', --muon-coefficient-type polar_express, larger batches",
    ),
    "defect": Kind(
        "defect",
        "orthogonality defect of the update",
        "products in too low a precision for the coefficients, coefficients that do not converge, or a wrong kernel",
        "--muon-ns-backend torch, --muon-fp32-matmul-prec highest; then more steps, or other coefficients",
    ),
    "divergence": Kind(
        "defect",
        "largest singular value of the update",
        "coefficients that leave their range: custom ones, or products in too low a precision for them",
        "--muon-coefficient-type quintic, --muon-ns-backend torch, --muon-fp32-matmul-prec highest",
    ),
    "jump": Kind(
        "update_ratio",
        _RATIO,
        "a rate, or a factor of it, that is far too high",
        "a checkpoint from before, a lower --lr or --muon-extra-scale-factor, a longer --lr-warmup-iters",
    ),
    "large_update": Kind(
        "update_ratio",
        _RATIO,
        "a rate, or a factor of it, that is too high for weights of this size",
        "a lower --lr or --muon-extra-scale-factor, another --muon-scale-mode",
    ),
    "small_update": Kind(
        "update_ratio",
        _RATIO,
        "a rate, or a factor of it, that is next to nothing: numbers of float32 do not change",
        "a higher --lr, --min-lr or --muon-extra-scale-factor",
    ),
    LOGITS: Kind(
        LOGITS,
        "largest attention logit, growing by the same factor or more from one measured step to the next",
        "query and key weights whose spectral norms grow, as they do under Muon in large models",
        "--qk-clip --qk-clip-threshold 100, a lower --lr, --qk-layernorm in a new model",
    ),
}
"""What there is to say of each check, by its name, the gravest first; several may raise one alarm."""


@dataclass(frozen=True)
class Alarm:
    """What is told once.

    Attributes:
        name: ``alarm`` of a :class:`Kind`.
        iteration: after which it was raised.
        since: the first measured iteration of those running in which it was so.
        weights: some of those that have it, with their blocks.
        count: how many have it.
        value: of the worst.
        limit: beyond which it is out of its range.
        text: all of it in words, with the usual cause and flags to try.
    """

    name: str
    iteration: int
    since: int
    weights: tuple[str, ...]
    count: int
    value: float
    limit: float
    text: str


@dataclass
class _Streak:
    """Of a weight and a check: since when, and how many measured steps running."""

    since: int = 0
    bad: int = 0
    good: int = 0
    value: float = 0.0
    limit: float = 0.0


_Verdict = tuple[bool, float, float] | None
"""Whether a number is out of its range, the number, and the limit; None where nothing can be said."""


class Alarms:
    """Judges a run's measured steps, one after the other; the same on all ranks that are given the same tables."""

    def __init__(self, thresholds: Thresholds | None = None, defects: Mapping[str, float] | None = None) -> None:
        """
        Args:
            thresholds: where alarms begin; the defaults if None.
            defects: by the names of rows, root mean square of p(s) - 1 that the coefficients leave of a matrix of
                independent numbers (:func:`megatron_muon.orthogonalize.defect.random_defect`).

        Raises:
            ValueError: naming a threshold that is not above zero.
        """
        self.thresholds = thresholds or Thresholds()
        for each in fields(Thresholds):
            if not getattr(self.thresholds, each.name) > 0:
                raise ValueError(f"threshold {each.name} is {getattr(self.thresholds, each.name)}: it must be above 0")
        self._defects = defects or {}
        self._streaks: dict[tuple[str, str], _Streak] = {}
        self._told: dict[tuple[str, str], int] = {}  # check and class: how many weights had it then
        self._logits: list[tuple[int, float]] = []  # iterations and logits, each larger than the last
        self._told_logits = False
        self._first = -1
        self._rises, self._rate, self._peak = False, 0.0, 0.0  # of learning rates
        self._differing: set[str] = set()

    def examine(self, table: Table) -> list[Alarm]:
        """Judge a measured step.

        Args:
            table: of the step.

        Returns:
            what is new, the gravest first; empty if nothing is.
        """
        if self._first < 0:
            self._first = table.iteration
        rate = table.rates.get("lr", 0.0)
        self._rises, self._rate, self._peak = rate > self._rate, rate, max(self._peak, rate)
        for name, row in table.rows.items():
            self._judge(name, row, table)
        return [*self._new(table.iteration), *self._growing(table)]

    def compare(self, iteration: int, differing: Sequence[str]) -> list[Alarm]:
        """Judge a comparison of replicas.

        Args:
            iteration: of the last step.
            differing: what :func:`megatron_muon.plugin.replicas.check_replicas` has found.

        Returns:
            one alarm if anything differs that did not in the last comparison.
        """
        new = [each for each in differing if each not in self._differing]
        self._differing = set(differing)
        if not new:
            return []
        streak = _Streak(iteration, value=float(len(new)))
        return [_alarm(REPLICAS, iteration, dict.fromkeys(new, streak), _some(new))]

    def _judge(self, name: str, row: Row, table: Table) -> None:
        """Continue or end the streaks of a row; what follows from a graver fault is left as it is."""
        for check, verdict in self._verdicts(name, row, table):
            if verdict is None:
                continue
            is_bad, value, limit = verdict
            streak = self._streaks.get((check, name))
            if is_bad:
                if streak is None:
                    streak = self._streaks[check, name] = _Streak(table.iteration)
                streak.bad, streak.good, streak.value, streak.limit = streak.bad + 1, 0, value, limit
            elif streak is not None:
                streak.good += 1
                if streak.bad < self._needed(check) or streak.good >= self._needed(check):
                    del self._streaks[check, name]

    def _needed(self, check: str) -> int:
        """Measured steps running: what cannot come of a batch, or of a first step, is told at once."""
        return 1 if check in ("nonfinite", "divergence", "jump") else self.thresholds.in_a_row

    def _verdicts(self, name: str, row: Row, table: Table) -> list[tuple[str, _Verdict]]:
        limits, numbers = self.thresholds, row.numbers

        def mean(stat: str) -> float:
            return numbers.get(stat, _UNKNOWN)[1]

        def largest(stat: str) -> float:
            return numbers.get(stat, _UNKNOWN)[2]

        nonfinite = _above(largest("nonfinite"), 0.0)
        found: list[tuple[str, _Verdict]] = [("nonfinite", nonfinite)]
        if nonfinite is not None and nonfinite[0]:
            return found
        zeros = mean("zero_gradient")
        if not math.isnan(zeros):
            dead = zeros >= limits.dead_share, zeros, limits.dead_share
            found.append(("dead_experts" if _is_expert(name) else "no_gradient", dead))
        # A momentum to which no gradient has come for long is at the bound as well.
        found.append(("norm_at_bound", _above(mean("at_bound"), zeros if zeros > 0 else 0.0)))
        if zeros >= limits.dead_share or mean("at_bound") > 0:
            return found
        is_settled, unlifted = table.iteration - self._first >= limits.settled, mean("unlifted")
        if is_settled and not self._rises:
            found.append(("rank_collapse", _above(unlifted, limits.unlifted)))
        left = 0.0 if math.isnan(unlifted) else min(max(unlifted, 0.0), 1.0)
        lifted = limits.defect_factor * max(self._defects.get(name, 0.0), _BAND)
        found.append(("defect", _above(mean("defect"), math.sqrt(left + (1.0 - left) * lifted * lifted))))
        found.append(("divergence", _above(largest("largest_singular"), limits.largest_singular)))
        ratio = mean("update_ratio")
        if not math.isfinite(ratio):  # of a weight of zeros
            return found
        is_jump = ratio > limits.jump
        found.append(("jump", (is_jump, ratio, limits.jump)))
        if not is_jump and is_settled:
            found.append(("large_update", (ratio > limits.high_ratio, ratio, limits.high_ratio)))
            if table.rates.get("lr", 1.0) > limits.decayed * self._peak:
                # A ratio of 0 is that of a rate of 0, of weights that are not to change.
                found.append(("small_update", (0.0 < ratio < limits.low_ratio, ratio, limits.low_ratio)))
        return found

    def _new(self, iteration: int) -> list[Alarm]:
        """What streaks are long enough, and have not been told."""
        having: dict[tuple[str, str], dict[str, _Streak]] = {}
        for (check, name), streak in self._streaks.items():
            if streak.bad >= self._needed(check):
                having.setdefault((check, class_of(name)), {})[name] = streak
        told, before = {}, self._told
        due: dict[str, dict[str, _Streak]] = {}
        for (check, its_class), streaks in having.items():
            count = told[check, its_class] = before.get((check, its_class), 0)
            if len(streaks) >= 2 * count:
                told[check, its_class] = len(streaks)
                due.setdefault(check, {}).update(streaks)
        self._told = told
        return [_alarm(check, iteration, due[check], _by_class([*due[check]])) for check in ALARMS if check in due]

    def _growing(self, table: Table) -> list[Alarm]:
        """Attention logits that grow geometrically, beyond where that is usual in a run's beginning."""
        logit, limits = table.max_attention_logit, self.thresholds
        if logit is None or math.isnan(logit):
            return []
        if self._logits and logit < limits.logit_growth * self._logits[-1][1]:
            self._logits, self._told_logits = [], False
        self._logits.append((table.iteration, logit))
        if self._told_logits or len(self._logits) <= limits.in_a_row or logit <= limits.logit:
            return []
        self._told_logits = True
        streak = _Streak(self._logits[0][0], value=logit, limit=limits.logit)
        return [_alarm(LOGITS, table.iteration, {"": streak}, "attention")]


_UNKNOWN = (math.nan, math.nan, math.nan)
_BAND = 0.3
"""What the coefficients `simple` leave, at most, of a singular value that they lift: it is between 0.68 and 1.2."""


def _above(value: float, limit: float) -> _Verdict:
    return None if math.isnan(value) else (value > limit, value, limit)


def _is_expert(name: str) -> bool:
    """Routed experts, by Megatron-Core's way to tell them, and their router: one that has collapsed has no gradient."""
    return ("experts" in name and "shared" not in name) or ".router." in name


def _alarm(check: str, iteration: int, streaks: Mapping[str, _Streak], who: str) -> Alarm:
    kind, names = ALARMS[check], [name for name in streaks if name]
    worst = max(streaks.values(), key=lambda streak: streak.value if streak.value > streak.limit else -streak.value)
    since = min(streak.since for streak in streaks.values())
    remedy = kind.remedy.format(glob=class_of(names[0]).partition("[")[0] if names else "")
    text = (
        f"{kind.alarm}: {who}: {kind.meaning}: {worst.value:.3g} (limit {worst.limit:.3g}), since iteration {since}. "
        f"Usual cause: {kind.cause}. To try: {remedy}."
    )
    few = tuple(names[:_NAMES])
    return Alarm(kind.alarm, iteration, since, few, len(names), worst.value, worst.limit, text)


def _by_class(names: Sequence[str]) -> str:
    """A few names of each class, and how many more there are."""
    classes: dict[str, list[str]] = {}
    for name in names:
        classes.setdefault(class_of(name), []).append(name)
    parts = [its[0] if len(its) == 1 else f"{len(its)} of {each} ({_some(its)})" for each, its in classes.items()]
    return _some(parts, "classes")


def _some(names: Sequence[str], what: str = "") -> str:
    more = f" and {len(names) - _NAMES} more {what}".rstrip() if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more

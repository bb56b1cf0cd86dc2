"""The cheapest setting of a run that fits the memory of its GPUs."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_muon.choices import DECOUPLED, OFFLOADS
from megatron_muon.errors import ConfigError
from megatron_muon.planning.accounts import FLOAT32_BYTES, PADDING, gib
from megatron_muon.planning.document import Durations
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.survey import Plan
from megatron_muon.routing.report import table


@dataclass(frozen=True)
class Level:
    """A choice that takes less memory than the one before it.

    Attributes:
        flags: that make it.
        error: what it brings to the update, relative, in words; see docs/results/momentum_dtype.md.
    """

    flags: str
    error: str = ""


KNOBS: dict[str, tuple[Level, ...]] = {
    "owners": (Level(""), Level("--use-distributed-optimizer")),
    "padding": (Level(""), Level("--layer-wise-param-layout decoupled")),
    "master": (Level("--muon-master fp32"), Level("--muon-master remainder")),
    "gradients": (Level(""), Level("--grad-reduce-in-bf16", "gradients 1.7e-3 to 9.8e-3")),
    "momentum": (
        Level("--muon-momentum-dtype fp32"),
        Level("--muon-momentum-dtype bf16", "momentum 5.7e-3"),
        Level("--muon-momentum-dtype int8", "momentum 2.4e-2, up to 0.9"),
    ),
    "offload": tuple(Level(f"--muon-offload {name}") for name in OFFLOADS),
}
"""What can be chosen, each from most memory to least."""

_EXACT = {"owners": 1, "padding": 1, "master": 1}

ORDER: tuple[dict[str, int], ...] = (
    {},
    {"owners": 1},
    {"owners": 1, "padding": 1},
    *(
        {**_EXACT, "gradients": gradients, "momentum": momentum, "offload": offload}
        for momenta in ((0, 1), (2,))
        for offload, momentum, gradients in itertools.product(range(len(OFFLOADS)), momenta, range(2))
    ),
)
"""Settings, the cheapest first. What changes no number and takes little time comes before what changes numbers about as
much as an iteration in bfloat16 does, that before what takes time, and that before int8, which can err by a whole
update. No choice is left out for another: bfloat16 gradients can raise the peak, by float32 copies of Adam's.
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a setting.

    Attributes:
        flags: beside those that were given.
        error: what it brings to the update.
        device_bytes: the most at once on the GPU that has most.
        host_bytes: of each rank, at most.
        seconds: of Muon's step on the device that was named, on the busiest rank; None: none was.
        refused: why it cannot be; then there are no numbers.
    """

    flags: tuple[str, ...]
    error: str
    device_bytes: float = 0.0
    host_bytes: int = 0
    seconds: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Fit:
    """The search of :func:`fit`.

    Attributes:
        memory: of a GPU, bytes.
        activations: bytes of them that were counted.
        outcomes: of settings in the order of their cost, up to the first that fits.
        plan: of the setting that fits; None if none does.
    """

    memory: float
    activations: float
    outcomes: tuple[Outcome, ...]
    plan: Plan | None

    def to_document(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "memory_bytes": self.memory,
            "activation_bytes": self.activations,
            "fits": self.plan is not None,
            "settings": [{**asdict(each), "flags": list(each.flags)} for each in self.outcomes],
        }


def fit(
    make: Callable[[Sequence[str]], Plan],
    flags: Sequence[str],
    given: Plan,
    memory: float,
    activations: float,
    rates: Rates | None = None,
) -> Fit:
    """Find the cheapest setting that fits.

    Args:
        make: plans a run with flags.
        flags: that were given.
        given: their plan.
        memory: bytes of a GPU.
        activations: of these for activations.
        rates: of a device, for how long steps take.
    """
    outcomes: list[Outcome] = []
    for setting in settings(levels_of(given)):
        found, plan = _tried(make, flags, given, setting, activations, rates)
        outcomes.append(found)
        if plan is not None and found.device_bytes <= memory:
            return Fit(memory, activations, tuple(outcomes), plan)
    return Fit(memory, activations, tuple(outcomes), None)


Setting = tuple[int, ...]
"""A level of each of :data:`KNOBS`."""


def settings(given: Setting) -> Iterator[Setting]:
    """Of :data:`ORDER`, none of which takes more of anything than what was given; each once."""
    found: dict[Setting, None] = {}
    for levels in ORDER:
        wanted = (levels.get(name, 0) for name in KNOBS)
        found[tuple(max(pair) for pair in zip(given, wanted, strict=True))] = None
    yield from found


def levels_of(plan: Plan) -> Setting:
    """Those of a run; of what it cannot choose the last: owners of a single replica, masters of float32 weights."""
    options = plan.options
    muons = [weight for stage in plan.stages for weight in stage.weights if weight.layout is not None]
    narrow = [weight for weight in muons if weight.element_bytes == 2]
    is_single = plan.layout.data == plan.layout.expert_data == 1
    has_padding = any(load.account.total(PADDING) for load in plan.loads)
    levels = {
        "owners": plan.layer_wise or is_single,
        "padding": options.layer_wise_param_layout == DECOUPLED or is_single or (plan.layer_wise and not has_padding),
        "master": options.master == "remainder" or not narrow,
        "gradients": not any(weight.gradient_bytes == FLOAT32_BYTES for weight in narrow),
        "momentum": {"bf16": 1, "int8": 2}.get(options.momentum_dtype, 0),
        "offload": OFFLOADS.index(options.offload),
    }
    return tuple(int(levels[name]) for name in KNOBS)


def _tried(
    make: Callable[[Sequence[str]], Plan],
    flags: Sequence[str],
    given: Plan,
    setting: Setting,
    activations: float,
    rates: Rates | None,
) -> tuple[Outcome, Plan | None]:
    """A setting's outcome, and its plan unless it is refused."""
    chosen = [
        levels[level]
        for levels, level, before in zip(KNOBS.values(), setting, levels_of(given), strict=True)
        if level > before
    ]
    more = tuple(each.flags for each in chosen)
    error = ", ".join(each.error for each in chosen if each.error)
    try:
        plan = make([*flags, *shlex.split(" ".join(more))]) if more else given
    except ConfigError as refusal:
        return Outcome(more, error, refused=str(refusal)), None
    peak = max(load.account.peak(activations) for load in plan.loads)
    host = max(load.account.total(on_host=True) for load in plan.loads)
    seconds = None if rates is None else Durations.of(plan, rates).modes[plan.options.tp_mode].seconds
    return Outcome(more, error, peak, host, seconds), plan


def render(fit: Fit) -> list[str]:
    """The settings that were tried, and the flags to give."""
    rows, is_timed = [], any(each.seconds is not None for each in fit.outcomes)
    for each in fit.outcomes:
        sizes = ("refused", "") if each.refused else (gib(each.device_bytes), gib(each.host_bytes))
        seconds = () if not is_timed else ("" if each.seconds is None else f"{1e3 * each.seconds:.1f}",)
        rows.append((" ".join(each.flags) or "as given", *sizes, each.error or "none", *seconds))
    counted = (
        f"{gib(fit.activations)} of activations are counted while there are any"
        if fit.activations
        else "activations are not counted (--activations-gb)"
    )
    columns = ("flags", "fullest GPU", "its host memory", "error of the update")
    is_on_host = any(each.host_bytes for each in fit.outcomes)
    lines = [
        f"What fits {gib(fit.memory)} a GPU, cheapest first: weights, gradients, optimizer and its step; {counted}.",
        *table((*columns, *(("ms of Muon's step",) if is_timed else ())), rows),
        *dict.fromkeys(f"Refused: {each.refused}" for each in fit.outcomes if each.refused),
    ]
    if is_on_host:
        lines.append("State on the host is copied to the GPU and back in every step.")
    possible = [each for each in fit.outcomes if not each.refused]
    if fit.plan is not None:
        flags = fit.outcomes[-1].flags
        return [*lines, f"Add {' '.join(flags)}" if flags else "It fits as it is."]
    least = min(possible, key=lambda each: each.device_bytes)
    return [
        *lines,
        f"None fits: {' '.join(least.flags) or 'the run as given'} takes least, {gib(least.device_bytes - fit.memory)} "
        "too much. More tensor, pipeline or expert parallelism divides weights and gradients further.",
    ]

"""Does it matter to the loss by which polynomials, and in how many steps, momentum is orthogonalized?"""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_muon.orthogonalize import Orthogonalizer, iteration
from tools.results import momentum
from tools.results.momentum import Matrices, Spread
from tools.results.records import Context
from tools.results.report import COLOURS, Report, finish, number_list, table
from tools.results.scripts import EXAMPLES, train

from prepare_data import prepare  # isort: skip  # an example's, which scripts has made known
from recipes import LEARNING_RATES, MODELS, Settings, flags  # isort: skip

TITLE = "Coefficient sets and steps of Newton-Schulz"
STEPS = 50
BATCH = 4
SEEDS = 3
"""At least: the question is what is more than chance."""

VALIDATION = 48
"""Sequences, as many as in the demo."""


@dataclass(frozen=True)
class Candidate:
    """A way to orthogonalize.

    Attributes:
        coefficients: name of the set.
        steps: number of them.
        standard: whether the standard form is taken where the Gram form is cheaper.
        more: further flags, instead of the demo's.
    """

    coefficients: str
    steps: int
    standard: bool = False
    more: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """Its flags."""
        return ["--muon-coefficient-type", self.coefficients, "--muon-num-ns-steps", str(self.steps), *self.more]

    @property
    def orthogonalizer(self) -> Orthogonalizer:
        """What its runs orthogonalize with, in float32, with products of which symmetric ones count half."""
        products = momentum.HalvedProducts()
        made = Orthogonalizer(iteration(self.coefficients, self.steps), torch.float32, products=products)
        if self.standard:
            made.restarts = None
        return made


REFERENCE = "quintic, 5 steps"
SMALL = "quintic, 7 steps"
CONTROL = "quintic, 5 steps, updates times 0.475"
"""No candidate: as large as the updates of 7 steps, which begin the set again and throw back what has come near 1."""

EXACT = ("--muon-fp32-matmul-prec", "highest")
"""No TF32, with which the demo would have a restart here. On the CPU all float32 products are exact anyway."""

CANDIDATES = {
    REFERENCE: Candidate("quintic", 5),
    "quintic, 4 steps": Candidate("quintic", 4),
    SMALL: Candidate("quintic", 7),
    CONTROL: Candidate("quintic", 5, more=("--muon-extra-scale-factor", f"{0.475 * 0.2:g}")),  # the demo has 0.2
    **{f"polar_express, {steps} steps": Candidate("polar_express", steps) for steps in range(4, 9)},
    "cubic5, Gram form": Candidate("cubic5", 5, more=EXACT),
    "cubic5, standard form": Candidate("cubic5", 5, standard=True, more=EXACT),
    "turbo_muon, 4 steps": Candidate("turbo_muon", 4, more=EXACT),
}

FORMS = ("cubic5, Gram form", "cubic5, standard form")
"""Whose updates differ by rounding alone."""

LIMITS = (
    "What this cannot show: models of millions of parameters after some tens of steps say little of long trainings of "
    "large ones, whose momentum has other spectra; there is one learning rate, the default's, and sets whose updates "
    "are smaller or larger have in effect another one; three seeds tell large differences from chance, not small ones. "
    "Iterations in bfloat16 and float16 are not trained with here.",
)


@dataclass(frozen=True)
class Outcome:
    """Final validation losses of a candidate, and of the reference with the same seeds.

    Attributes:
        losses: one for each seed.
        references: likewise.
    """

    losses: list[float]
    references: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """Standard deviation between the seeds; 0 of one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0

    @property
    def differences(self) -> list[float]:
        """To the reference, seed by seed."""
        return [loss - other for loss, other in zip(self.losses, self.references, strict=True)]

    @property
    def difference(self) -> float:
        """Their mean."""
        return statistics.fmean(self.differences)

    @property
    def spread(self) -> float:
        """The larger one of the two standard deviations between seeds."""
        return max(self.deviation, Outcome(self.references, self.references).deviation)

    @property
    def ratio(self) -> float:
        """The difference in units of the spread; 0 where there is none of either."""
        return self.difference / self.spread if self.spread else 0.0


def run(context: Context) -> Report:
    """Train both models with every candidate and every seed, and measure the candidates on momentum of a training."""
    seeds = range(context.seed, context.seed + (1 if context.quick else max(context.seeds, SEEDS)))
    names = (REFERENCE, FORMS[1]) if context.quick else tuple(CANDIDATES)
    candidates = {name: CANDIDATES[name] for name in names}
    found: dict[str, dict[str, Outcome]] = {}
    told: dict[str, str] = {}
    for model in MODELS:
        records = {name: [record(context, model, each, seed) for seed in seeds] for name, each in candidates.items()}
        losses = {name: [each["valid_loss"] for each in of_seeds] for name, of_seeds in records.items()}
        found[model] = {name: Outcome(values, losses[REFERENCE]) for name, values in losses.items()}
        told |= {name: form(of_seeds[0]["told"]) for name, of_seeds in records.items()}
    taken = {model: take_momentum(context, model) for model in MODELS}
    costs = {name: cost(each, taken) / cost(CANDIDATES[REFERENCE], taken) for name, each in candidates.items()}
    late = [matrix.double() for each in taken.values() for matrix in each["late"].values()]
    qualities = {
        name: momentum.quality(each.orthogonalizer, late) for name, each in candidates.items() if name != CONTROL
    }
    steps = context.steps or (2 if context.quick else STEPS)
    return Report(
        name="sets",
        title=TITLE,
        asked=(
            "The same trainings with other sets of coefficients (`--muon-coefficient-type`) and numbers of steps "
            "(`--muon-num-ns-steps`). The default is to change only if another candidate's mean loss is lower by more "
            "than the spread between seeds (the larger one of the two standard deviations) with both models, and it "
            "takes no more operations. This rule was set before the trainings."
        ),
        settings=(
            f"The demo's GPT (`examples/demo.py`) and hybrid (`--model hybrid`: GatedDeltaNet and gated attention), by "
            f"their own scripts and flags in one process, at {steps} steps of {BATCH} sequences of 256 tokens instead "
            f"of 150 of 8. The learning rate is the demo's, {LEARNING_RATES['muon']:g}, swept with the default set "
            "at 150 steps, and was not swept for the hybrid. Iterations are in float32 as the demo's are on the "
            f"CPU. Seeds {seeds[0]} to {seeds[-1]}, of the weights, the order of the data and the validation samples; "
            "at one seed these are the same for all candidates. Loss is in nats a token."
        ),
        tables=[
            *((f"{title(model)}, final validation loss:", losses_table(each)) for model, each in found.items()),
            (
                f"Operations of the iterations of all matrices of both models over those of {REFERENCE} (products "
                "whose result is symmetric count half), and the form that the runs of the hybrid told of "
                "when they were made. On the "
                f"momentum of both models after step {steps}, all {len(late)} matrices, median and largest in float32, "
                "p being the shorter side: orthogonality \\|O O^T - I\\| / sqrt(p), the distance from the polar "
                "factor \\|O - U V^T\\| / sqrt(p), and the size of the update \\|O\\| / sqrt(p), which is 1 for "
                "the polar factor:",
                quality_table(qualities, costs, told),
            ),
            (
                "Momentum in the default's run of the first seed; lowest, median and highest of all layers: "
                "stable rank "
                "(\\|M\\|_F^2 / \\|M\\|_2^2), and the smallest singular value over the Frobenius norm, with "
                "which an iteration begins:",
                momentum_table(taken, steps),
            ),
        ],
        findings=[*findings(found, costs), *LIMITS],
        numbers={
            "rule": "lower by more than the spread with both models, and no more operations",
            "valid_loss": {model: {name: each.losses for name, each in of.items()} for model, of in found.items()},
            "difference_over_spread": {
                model: {name: each.ratio for name, each in of.items()} for model, of in found.items()
            },
            "operations_over_reference": costs,
            "told": told,
            "on_momentum": {name: asdict(each) for name, each in qualities.items()},
        },
        draw=lambda figure: _draw(figure, found),
        size=(11.0, 7.0),
    )


def line(context: Context, model: str, candidate: Candidate, seed: int) -> list[str]:
    """All flags of a run but those of its files: the demo's, and then what is other here."""
    steps = context.steps or (2 if context.quick else STEPS)
    settings = Settings(steps, LEARNING_RATES["muon"], seed, "cpu", 1, model)
    batch, length = (1, 32) if context.quick else (BATCH, 256)
    sizes = (
        f"--micro-batch-size {batch} --global-batch-size {batch} --seq-length {length} "
        f"--eval-interval {steps + 1} --eval-iters {1 if context.quick else VALIDATION // batch}"
    )
    alarms = f"--muon-log-interval {context.alarms} --muon-alarm stop" if context.alarms else ""
    return [*flags("muon", settings, prepare(Path("runs/data"))), *sizes.split(), *alarms.split(), *candidate.words]


def _inputs(model: str, candidate: Candidate, words: list[str]) -> dict[str, Any]:
    here = f"{EXAMPLES.parent}/"  # the same runs in another folder are the same
    plain = [word.removeprefix(here) for word in words]
    return {"script": MODELS[model].script, "flags": plain, "standard": candidate.standard}


def record(context: Context, model: str, candidate: Candidate, seed: int) -> dict[str, Any]:
    """What a run gave, now or earlier."""
    words = line(context, model, candidate, seed)
    return context.cached(_inputs(model, candidate, words), lambda: train(model, words, standard=candidate.standard))


def take_momentum(context: Context, model: str) -> dict[str, Matrices]:
    """Momentum of the first seed's run of the reference, after a fifth of the steps (``early``) and after all."""
    candidate = CANDIDATES[REFERENCE]
    words = line(context, model, candidate, context.seed)
    steps = context.steps or (2 if context.quick else STEPS)
    early = max(1, steps // 5)

    def make() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="momentum-") as folder:
            train(model, [*words, "--save", folder, "--save-interval", str(early)], standard=False)
            at = {"early": early, "late": steps}
            return {name: momentum.read(Path(folder) / f"iter_{number:07}") for name, number in at.items()}

    return context.kept({**_inputs(model, candidate, words), "kept": "momentum"}, make)


def cost(candidate: Candidate, taken: Mapping[str, Mapping[str, Matrices]]) -> int:
    """Operations of all matrices of all models."""
    of = candidate.orthogonalizer
    return sum(of.flops(*matrix.shape) for each in taken.values() for matrix in each["late"].values())


def form(told: list[str]) -> str:
    """What a run told of its iterations, in short."""
    text = told[-1].partition(": ")[2].replace(" Newton-Schulz, float32", "")
    return re.sub(r", (?=\d+ (standard|Gram))", "; ", text)


def title(model: str) -> str:
    """Of a model, in short."""
    return {"gpt": "GPT", "hybrid": "Hybrid"}[model]


def losses_table(found: Mapping[str, Outcome], reference: str = REFERENCE) -> str:
    """Losses of a model, and their differences to the reference's."""
    head = ["", "mean", "standard deviation", "lowest to highest", "difference", "by seed", "difference / spread"]
    rows = []
    for name, each in found.items():
        own = [f"{each.mean:.4f}", f"{each.deviation:.4f}", f"{min(each.losses):.4f} to {max(each.losses):.4f}"]
        against = ["", "", ""]
        if name != reference:
            by_seed = " ".join(f"{difference:+.4f}" for difference in each.differences)
            against = [f"{each.difference:+.4f}", by_seed, f"{each.ratio:+.2f}"]
        rows.append([name, *own, *against])
    return table(head, rows)


def quality_table(
    qualities: Mapping[str, momentum.Quality], costs: Mapping[str, float], told: Mapping[str, str]
) -> str:
    """Operations, forms, and what the iterations make of real momentum."""
    head = ["", "operations", "form", "orthogonality", "distance", "size"]
    rows = []
    for name, each in qualities.items():
        pair = [f"{spread.middle:.3f}, {spread.high:.3f}" for spread in (each.defect, each.distance)]
        size = f"{each.size.middle:.3f}, {each.size.low:.3f} to {each.size.high:.3f}"
        rows.append([name, f"{costs[name]:.2f}", told[name], *pair, size])
    return table(head, rows)


def momentum_table(taken: Mapping[str, Mapping[str, Matrices]], steps: int) -> str:
    """Stable ranks and smallest singular values, by kind of matrix."""
    at = {"early": max(1, steps // 5), "late": steps}
    head = [
        "model",
        "matrices",
        *(f"{what}, step {step}" for what in ("stable rank", "smallest") for step in at.values()),
    ]
    rows = []
    for model, times in taken.items():
        sorted_out = {name: momentum.kinds(found) for name, found in times.items()}
        for kind, late in sorted_out["late"].items():
            cells = [
                " / ".join(f"{value:.2g}" for value in sorted({spread.low, spread.middle, spread.high}))
                for measure in (momentum.stable_rank, momentum.smallest)
                for spread in (Spread.of(map(measure, sorted_out[name][kind])) for name in at)
            ]
            rows.append([title(model), f"{len(late)} {kind}, {late[0].size(0)} x {late[0].size(1)}", *cells])
    return table(head, rows)


def winners(found: Mapping[str, Mapping[str, Outcome]], costs: Mapping[str, float]) -> list[str]:
    """The candidates for which the rule would change the default."""
    return [
        name
        for name in costs
        if name not in (REFERENCE, CONTROL)
        and costs[name] <= 1
        and all(each[name].ratio < -1 for each in found.values())
    ]


def findings(found: Mapping[str, Mapping[str, Outcome]], costs: Mapping[str, float]) -> list[str]:
    """What the losses say, and what they cannot say."""
    sentences = []
    for model, outcomes in found.items():
        others = {name: each for name, each in outcomes.items() if name not in (REFERENCE, CONTROL)}
        beyond = [f"{name} ({each.ratio:+.2f})" for name, each in others.items() if abs(each.ratio) > 1]
        lowest, highest = (
            min(others, key=lambda name: others[name].mean),
            max(others, key=lambda name: others[name].mean),
        )
        sentences.append(
            f"{title(model)}: {REFERENCE} has {outcomes[REFERENCE].mean:.4f} with a standard deviation of "
            f"{outcomes[REFERENCE].deviation:.4f} between seeds. The others differ by "
            f"{others[lowest].difference:+.4f} ({lowest}) to {others[highest].difference:+.4f} ({highest}); "
            + (f"by more than the spread: {number_list(beyond)}." if beyond else "none by more than the spread.")
        )
        if CONTROL in outcomes:
            sentences.append(
                f"{title(model)}: the default with updates as small as those of 7 steps differs by "
                f"{outcomes[CONTROL].difference:+.4f}, the 7 steps by {outcomes[SMALL].difference:+.4f}: what looks "
                "like a better set there is a smaller step, which a lower learning rate gives for nothing."
            )
        if set(FORMS) <= set(outcomes):
            pairs = zip(*(outcomes[name].losses for name in FORMS), strict=True)
            by_seed = number_list([f"{other - loss:+.4f}" for loss, other in pairs])
            sentences.append(
                f"{title(model)}: {FORMS[1]} differs from {FORMS[0]}, seed by seed, by {by_seed}. Their updates "
                "differ by rounding alone: differences of this size are chance, even at one seed."
            )
    changed = winners(found, costs)
    sentences.append(
        f"By the rule, the default would change to one of: {number_list(changed)}."
        if changed
        else f"By the rule, the default stays {REFERENCE}: nothing that takes no more operations is better by more "
        "than the spread with both models."
    )
    return sentences


def _draw(figure: Any, found: Mapping[str, Mapping[str, Outcome]]) -> None:
    panels = figure.subplots(2, len(found), sharey=True)
    for column, (model, outcomes) in enumerate(found.items()):
        names = list(outcomes)
        for axes, values in zip(
            panels[:, column],
            ([each.losses for each in outcomes.values()], [each.differences for each in outcomes.values()]),
            strict=True,
        ):
            for row, each in enumerate(values):
                middle = statistics.fmean(each)
                around = statistics.stdev(each) if len(each) > 1 else 0.0
                axes.errorbar(middle, row, xerr=around, fmt="o", color=COLOURS[0], capsize=3, markersize=5)
                axes.plot(each, [row] * len(each), ".", color="0.6", markersize=4)
            axes.set_yticks(range(len(names)), names, fontsize="small")
        panels[0, column].axvline(outcomes[REFERENCE].mean, color="0.8", zorder=0)
        panels[1, column].axvline(0, color="0.8", zorder=0)
        finish(panels[0, column], f"{title(model)}: final validation loss (nats a token)")
        finish(panels[1, column], f"{title(model)}: difference to {REFERENCE}, by seed")
    panels[0, 0].invert_yaxis()

"""What does momentum in bfloat16 or int8 do to the update, to the average itself, and to the loss?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tools.results import rounding, sets
from tools.results.records import Context
from tools.results.report import COLOURS, Report, finish, number_list, table
from tools.results.rounding import Errors
from tools.results.sets import Candidate, Outcome

TITLE = "Momentum in bfloat16 and in int8"
AVERAGED = 1000
"""Steps of the averages."""

MOMENTA = (0.95, 0.99)
MICRO_BATCHES = (1, 8, 64)
KINDS = ("bf16", "int8")
REFERENCE = "fp32"

EIGHT = ("--bf16", "--muon-master", "remainder", "--grad-reduce-in-bf16")
CANDIDATES: dict[str, Candidate] = {
    REFERENCE: Candidate("quintic", 5),
    **{kind: Candidate("quintic", 5, more=("--muon-momentum-dtype", kind)) for kind in KINDS},
}
"""Of models in float32, in which momentum alone differs."""

NARROW = "bf16 weights, all else float32"
NARROW_CANDIDATES: dict[str, Candidate] = {
    NARROW: Candidate("quintic", 5, more=("--bf16",)),
    **{
        f"{size} bytes a parameter, {kind} momentum": Candidate(
            "quintic", 5, more=(*EIGHT, "--muon-momentum-dtype", kind)
        )
        for kind, size in (("bf16", "8.1"), ("int8", "7.1"))
    },
}
"""Of the GPT in bfloat16: gradients are bfloat16, too, and master weights remainders, which change nothing."""

LIMITS = (
    "What this cannot show: models of millions of parameters after some tens of steps say little of long trainings of "
    "large ones. An error in the average lasts for 1 / (1 - momentum) steps, which there are; spectra of late momentum "
    "in large models, which decide how much of it reaches the update, are not here.",
)


def run(context: Context) -> Report:
    """Measure the zoo and the averages, and train both models with every form of momentum and every seed."""
    found = trainings(context)
    taken = {} if context.quick else {model: sets.take_momentum(context, model) for model in sets.MODELS}
    quick = (32, 128) if context.quick else (rounding.ROWS, rounding.COLUMNS)
    zoo = {name: rounding.errors(matrix) for name, matrix in rounding.zoo(*quick).items()}
    real = {
        f"{sets.title(model)}, {name}": rounding.errors(matrix.double())
        for model, times in taken.items()
        for name, matrix in times["late"].items()
    }
    averages = rounding.all_averages(20 if context.quick else AVERAGED, MOMENTA)
    gradients = rounding.gradient_errors(MICRO_BATCHES)
    steps = context.steps or (2 if context.quick else sets.STEPS)
    tables = [
        (
            "Relative error (Frobenius norm) of the update, five steps of quintic, against float64 from momentum as it "
            f"is, {quick[0]} x {quick[1]}. Momentum is rounded once; then a float64 iteration of it, beside what a "
            "bfloat16 iteration errs by "
            "itself on momentum as it is, and a bfloat16 iteration of what is kept:",
            zoo_table({**zoo, **summary(real)}),
        ),
        (
            f"The average itself, after {AVERAGED:,} steps, 128 x 512, against float64: each step decodes, averages in "
            "float32, and keeps. Relative error of the average; in brackets the gain, its size along the right one "
            "less 1, where that is more than 0.001; behind it the error of a float64 update of it:",
            average_table(averages),
        ),
        (
            "Gradients of several micro-batches, noise, added up in bfloat16 (`--grad-reduce-in-bf16`): relative error "
            "of the sum:",
            table(["micro-batches", *gradients], [["error", *(f"{error:.1e}" for error in gradients.values())]]),
        ),
        *(
            (f"{name}, final validation loss:", sets.losses_table(each, reference_of(each)))
            for name, each in found.items()
        ),
    ]
    return Report(
        name="momentum_dtype",
        title=TITLE,
        asked=(
            "What `--muon-momentum-dtype` costs in accuracy: how much of the rounding of momentum reaches the update, "
            "for many spectra; how much of it adds up in the average, and whether stochastic rounding would be better; "
            "and whether trainings can tell."
        ),
        settings=(
            "int8 is in blocks of 256 columns of a row, in units of 1/127 of the largest entry. Trainings are those of "
            f"[sets.md](sets.md): {steps} steps, three seeds, which at one seed differ in momentum alone. "
            "Those in bfloat16 also have gradients in bfloat16 and master weights as remainders. "
            "Loss is in nats a token."
        ),
        tables=tables,
        findings=[*zoo_findings(zoo, real), *average_findings(averages), *loss_findings(found), *LIMITS],
        numbers={
            "zoo": {name: asdict(each) for name, each in zoo.items()},
            "real_momentum": {name: asdict(each) for name, each in real.items()},
            "averages": averages,
            "gradients": gradients,
            "valid_loss": {model: {name: each.losses for name, each in of.items()} for model, of in found.items()},
        },
        draw=lambda figure: _draw(figure, zoo, found),
        size=(11.0, 5.5),
    )


def trainings(context: Context) -> dict[str, dict[str, Outcome]]:
    """Losses by model, and by how momentum is kept."""
    seeds = range(context.seed, context.seed + (1 if context.quick else max(context.seeds, sets.SEEDS)))
    asked = {sets.title(model): (model, CANDIDATES) for model in sets.MODELS}
    asked |= {"GPT in bfloat16": ("gpt", NARROW_CANDIDATES)}
    found = {}
    for name, (model, candidates) in asked.items():
        losses = {
            form: [sets.record(context, model, each, seed)["valid_loss"] for seed in seeds]
            for form, each in candidates.items()
        }
        reference = next(iter(losses.values()))
        found[name] = {form: Outcome(values, reference) for form, values in losses.items()}
    return found


def reference_of(outcomes: Mapping[str, Outcome]) -> str:
    """The first one."""
    return next(iter(outcomes))


def summary(real: Mapping[str, Errors]) -> dict[str, Errors]:
    """Of each model the matrices whose update errs as the median one's by bfloat16 momentum, and most."""
    found = {}
    for model in dict.fromkeys(name.partition(",")[0] for name in real):
        ordered = sorted(
            (name for name in real if name.startswith(f"{model},")), key=lambda name: real[name].update["bf16"]
        )
        for which, name in (("median", ordered[len(ordered) // 2]), ("largest", ordered[-1])):
            short = name.rpartition("layers.")[2]
            found[f"momentum of the {model}, {which} of {len(ordered)} ({short})"] = real[name]
    return found


def zoo_table(zoo: Mapping[str, Errors]) -> str:
    """Errors of updates."""
    head = [
        *("momentum", "kept in bf16", "in int8"),
        *("update from bf16", "from int8", "bf16 iteration alone", "of bf16", "of int8"),
    ]
    rows = []
    for name, each in zoo.items():
        values = [each.kept[kind] for kind in KINDS] + [each.update[kind] for kind in KINDS]
        values += [each.iteration] + [each.both[kind] for kind in KINDS]
        rows.append([name, *(f"{value:.1e}" for value in values)])
    return table(head, rows)


Averages = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]


def average_table(averages: Averages) -> str:
    """Errors of averages and of their updates."""
    forms = ("fp32", "bf16", "bf16, stochastic", "int8")
    rows = []
    for momentum, streams in averages.items():
        for name, of in streams.items():
            cells = []
            for form in forms:
                each = of[form]
                gain = f" ({each['gain']:+.3f})" if abs(each["gain"]) > 1e-3 else ""
                cells.append(f"{each['error']:.1e}{gain}; {each['update']:.1e}")
            rows.append([momentum, name, *cells, f"{of[rounding.ITERATION]['update']:.1e}"])
    return table(["momentum", "gradients", *forms, f"a {rounding.ITERATION} of exact momentum"], rows)


def zoo_findings(zoo: Mapping[str, Errors], real: Mapping[str, Errors]) -> list[str]:
    """What the errors of updates say."""

    def span(kind: str) -> str:
        ordered = sorted(zoo, key=lambda name: zoo[name].update[kind])
        low, high = ordered[0], ordered[-1]
        return f"{zoo[low].update[kind]:.1e} ({low}) to {zoo[high].update[kind]:.1e} ({high})"

    over = {name: each.update["bf16"] / each.iteration for name, each in zoo.items()}
    more = {name: each.update["int8"] / each.iteration for name, each in zoo.items()}
    sentences = [
        f"Rounded once, bfloat16 momentum brings an error of {span('bf16')} to the update: {min(over.values()):.1f} to "
        f"{max(over.values()):.1f} times what a bfloat16 iteration errs by itself on the same momentum. Small singular "
        "values are raised up to 485 times by the iteration, rounding with them.",
        f"int8 brings {span('int8')}: up to {max(more.values()):.1f} times what a bfloat16 iteration errs.",
    ]
    if real:
        for kind in KINDS:
            values = sorted(each.update[kind] for each in real.values())
            sentences.append(
                f"On the momentum of the examples' trainings, {len(values)} matrices, {kind} brings "
                f"{values[len(values) // 2]:.1e} in the median and at most {values[-1]:.1e}; a bfloat16 iteration "
                f"errs by at most {max(each.iteration for each in real.values()):.1e}."
            )
    return sentences


def average_findings(averages: Averages) -> list[str]:
    """What the averages say."""
    sentences = []
    for momentum, streams in averages.items():
        noise, constant = streams["noise"], streams["a constant"]
        sentences.append(
            f"Rounding adds up in the average. With momentum {momentum} and gradients of noise, bfloat16 is off by "
            f"{noise['bf16']['error']:.1e} and int8 by {noise['int8']['error']:.1e}; stochastic rounding, by "
            f"{noise['bf16, stochastic']['error']:.1e}, is worse than rounding to nearest. Where gradients do not "
            f"change at all, bfloat16 to nearest stops {-constant['bf16']['gain']:.1%} short, since a step adds less "
            "than half a unit in the last place; stochastic rounding and int8 do not. Noise of ten times the "
            "constant's size, as gradients have, makes it vanish "
            f"(gain {streams['a constant in ten times as much noise']['bf16']['gain']:+.1e})."
        )
        low = streams[rounding.LOW_RANK]
        sentences.append(
            f"Where gradients are a constant of low rank and little else ({rounding.LOW_RANK}), with momentum "
            f"{momentum}, updates from bfloat16 momentum are off by {low['bf16']['update']:.2g}, from int8 by "
            f"{low['int8']['update']:.2g}; those of a bfloat16 iteration of exact momentum by "
            f"{low[rounding.ITERATION]['update']:.2g}."
        )
    return sentences


def loss_findings(found: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    """What the trainings say."""
    sentences = []
    for name, outcomes in found.items():
        reference = reference_of(outcomes)
        others = [form for form in outcomes if form != reference]
        told = [f"{form} by {outcomes[form].difference:+.4f} ({outcomes[form].ratio:+.2f} spreads)" for form in others]
        beyond = [form for form in others if abs(outcomes[form].ratio) > 1]
        sentences.append(
            f"{name}: {reference} has {outcomes[reference].mean:.4f} with a standard deviation of "
            f"{outcomes[reference].deviation:.4f} between seeds; {number_list(told)} differ from it: "
            + (f"{number_list(beyond)} by more than the spread." if beyond else "none by more than the spread.")
        )
    return sentences


def _draw(figure: Any, zoo: Mapping[str, Errors], found: Mapping[str, Mapping[str, Outcome]]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(zoo)
    rows = range(len(names))
    left.plot([zoo[name].iteration for name in names], rows, "|", color="0.4", markersize=12, label="bf16 iteration")
    for kind, colour in zip(KINDS, COLOURS, strict=False):
        left.plot([zoo[name].update[kind] for name in names], rows, "o", color=colour, label=f"{kind} momentum")
    left.set_yticks(rows, names, fontsize="small")
    left.invert_yaxis()
    left.set_xscale("log")
    left.legend(frameon=False, fontsize="small")
    finish(left, "relative error of the update")
    points = [(f"{name}:\n{form}", each) for name, of in found.items() for form, each in list(of.items())[1:]]
    for row, (_, each) in enumerate(points):
        right.plot(each.differences, [row] * len(each.differences), "o", color=COLOURS[0], markersize=4)
        right.plot([-each.spread, each.spread], [row, row], "-", color="0.8", zorder=0)
    right.axvline(0, color="0.8", zorder=0)
    right.set_yticks(range(len(points)), [name for name, _ in points], fontsize="x-small")
    right.invert_yaxis()
    finish(right, "difference of the loss, by seed")
    right.set_xlabel("grey: the spread between seeds", fontsize="small")

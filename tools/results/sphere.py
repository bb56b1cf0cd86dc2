"""What does keeping the spectral norms of weights bring, and what does it cost?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.results.records import Context, Sweep
from tools.results.report import COLOURS, Report, cut, draw_losses, finish, loss_table, rate_text, sizes, table

TITLE = "Muon and the spectral sphere"
WIDTH = 128
LAYERS = 3
STEPS = 150
RATES = [2.0**exponent for exponent in range(-7, -2)]
QUICK_RATES = [2.0**-7, 2.0**-6]

SCALAR_RATE = 2.0**-6
"""Of what Adam updates (embedding, output layer, norms), the same for all: only the rate of the matrices is swept."""

_SPHERE = {"muon_coefficient_type": "polar_express", "muon_num_ns_steps": 8}

CONTESTANTS: dict[str, dict[str, Any]] = {
    "Muon": {"optimizer": "muon", "options": {"muon_scale_mode": "unit_rms_norm"}},
    "MuonSphere": {"optimizer": "spectral_sphere", "options": {**_SPHERE, "muon_sphere_tolerance": 1.0}},
    "sphere, tolerance 0.1": {"optimizer": "spectral_sphere", "options": {**_SPHERE, "muon_sphere_tolerance": 0.1}},
    "sphere, tolerance 0.5": {"optimizer": "spectral_sphere", "options": {**_SPHERE, "muon_sphere_tolerance": 0.5}},
}
REFERENCE = "Muon"


def run(context: Context) -> Report:
    """Sweep the rate of the matrices with each optimizer, at equal steps."""
    rates = QUICK_RATES if context.quick else RATES
    base = {"width": 32 if context.quick else WIDTH, "layers": LAYERS, "rate": 0.0}
    found = {}
    for name, values in CONTESTANTS.items():
        options = {**values["options"], "muon_scalar_lr": SCALAR_RATE}
        setting = context.setting(STEPS, **base, optimizer=values["optimizer"], options=options)
        found[name] = context.sweep(setting, rates)
    return Report(
        name="sphere",
        title=TITLE,
        asked=(
            "`--optimizer spectral_sphere` (arXiv 2601.08393) takes the steepest step that keeps the spectral norm of "
            "a weight, which takes several times Muon's Newton-Schulz; MuonSphere (`--muon-sphere-tolerance 1`) takes "
            "Muon's step and brings the weight back. Against Muon with `--muon-scale-mode unit_rms_norm` (5 quintic "
            "steps; the sphere has 8 of `polar_express`), at equal steps, each at its best rate. A sphere's rate "
            "counts in units of its radius, 2 sqrt(m / n)."
        ),
        settings=f"Width {base['width']}, {LAYERS} layers; what Adam updates has rate {rate_text(SCALAR_RATE)} "
        f"everywhere. {sizes(setting, context)}",
        tables=[
            ("Final validation loss by peak learning rate of the matrices:", loss_table("", _losses(found))),
            ("At the best rate, and medians over all runs of the time of a step:", times_table(found)),
        ],
        findings=findings(found),
        numbers={name: {**sweep.as_json(), **ratios(found)[name]} for name, sweep in found.items()},
        draw=lambda figure: _draw(figure, found),
    )


def ratios(found: Mapping[str, Sweep], reference: str = REFERENCE) -> dict[str, dict[str, float]]:
    """Time of the optimizer and of a whole step over that of the reference."""
    base = found[reference]
    return {
        name: {
            "step_over_reference": sweep.seconds / base.seconds,
            "optimizer_over_reference": sweep.optimizer_seconds / base.optimizer_seconds,
        }
        for name, sweep in found.items()
    }


def findings(found: Mapping[str, Sweep], reference: str = REFERENCE) -> list[str]:
    """Loss and time of each against the reference."""
    base, times = found[reference], ratios(found, reference)
    sentences = []
    for name, sweep in found.items():
        if name == reference:
            continue
        difference = sweep.best_loss - base.best_loss
        side = "below" if difference < 0 else "above"
        sentences.append(
            f"{name}: the best loss, {sweep.best_loss:.4f}, is {abs(difference):.4f} {side} that of {reference} "
            f"({base.best_loss:.4f}). A step takes {times[name]['step_over_reference']:.2f} times as long, its "
            f"optimizer {times[name]['optimizer_over_reference']:.2f} times."
        )
    lowest = min(found, key=lambda name: found[name].best_loss)
    highest = max(found, key=lambda name: found[name].best_loss)
    spread = found[highest].best_loss - found[lowest].best_loss
    sentences.append(f"The lowest loss is that of {lowest}; all are within {spread:.4f}. {chance(found)}")
    return sentences


def chance(found: Mapping[str, Sweep]) -> str:
    """How much the losses at the best rates differ between seeds."""
    deviations = [sweep.deviation for sweep in found.values()]
    if None in deviations:
        return "There is one seed only, so that it is not known how much of this is chance."
    largest = max(each for each in deviations if each is not None)
    return f"Between the seeds, the loss at a best rate has a standard deviation of at most {largest:.4f}."


def _losses(found: Mapping[str, Sweep]) -> dict[str, dict[float, float]]:
    return {name: sweep.losses for name, sweep in found.items()}


def times_table(found: Mapping[str, Sweep], reference: str = REFERENCE) -> str:
    """Best rate, losses and times of each."""
    times = ratios(found, reference)
    head = ["", "best rate", "validation loss", "training loss", "ms a step", "of it in the optimizer"]
    head += [f"step / {reference}", f"optimizer / {reference}"]
    return table(
        head,
        [
            [
                name,
                rate_text(sweep.best),
                f"{sweep.best_loss:.4f}",
                f"{sweep.train_losses[sweep.best]:.4f}",
                f"{1000 * sweep.seconds:.0f}",
                f"{1000 * sweep.optimizer_seconds:.0f}",
                f"{times[name]['step_over_reference']:.2f}",
                f"{times[name]['optimizer_over_reference']:.2f}",
            ]
            for name, sweep in found.items()
        ],
    )


def _draw(figure: Any, found: Mapping[str, Sweep]) -> None:
    left, right = figure.subplots(1, 2)
    draw_losses(left, _losses(found), "Loss by learning rate of the matrices")
    cut(left, _losses(found).values())
    left.set_ylabel("final validation loss (nats a character)")
    draw_times(right, found)


def draw_times(axes: Any, found: Mapping[str, Sweep]) -> None:
    """Time of a step by optimizer, with the optimizer's part of it."""
    names = list(found)
    axes.barh(names, [1000 * sweep.seconds for sweep in found.values()], color="0.85", label="whole step")
    axes.barh(names, [1000 * sweep.optimizer_seconds for sweep in found.values()], color=COLOURS[0], label="optimizer")
    axes.invert_yaxis()
    finish(axes, "Time of a step")
    axes.set_xlabel("ms")
    axes.legend(frameon=False, fontsize="small")

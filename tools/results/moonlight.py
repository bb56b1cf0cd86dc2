"""Does Adam's best learning rate serve Muon when its updates have Adam's size?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tools.results import arithmetic
from tools.results.records import Context, Sweep
from tools.results.report import Report, cut, draw_losses, finish, loss_table, loss_text, rate_text, sizes, style, table

TITLE = "The size of Muon's updates, and Adam's learning rate"
WIDTH = 192
LAYERS = 3
STEPS = 150
RATES = [2.0**exponent for exponent in range(-9, -3)]
LARGE_RATES = [4 * rate for rate in RATES[1:]]
"""For scale modes without a factor of 0.2 sqrt(max(m, n)), about 3 here: their updates are as much smaller."""

QUICK_RATES = [2.0**-8, 2.0**-7]
FACTORS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
MOONLIGHT = 0.2

CONTESTANTS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "moonlight": {"optimizer": "muon", "options": {"muon_scale_mode": "spectral", "muon_extra_scale_factor": 0.2}},
    "none": {"optimizer": "muon", "options": {"muon_scale_mode": "none"}},
    "shape_scaling": {"optimizer": "muon", "options": {"muon_scale_mode": "shape_scaling"}},
    "none_apart": {"optimizer": "muon", "options": {"muon_scale_mode": "none"}},
}
APART = "none_apart"
"""Here the rate of what Adam updates is Adam's best one, and that of the matrices alone is swept."""

TITLES = {
    "adam": "Adam",
    "moonlight": "Muon, spectral x 0.2 (Moonlight)",
    "none": "Muon, none",
    "shape_scaling": "Muon, shape_scaling",
    "none_apart": "Muon, none, matrices alone",
}


def run(context: Context) -> Report:
    """Sweep the rate of Adam and of Muon with three scale modes, and the factor at Adam's best rate."""
    base = {"width": WIDTH if not context.quick else 32, "layers": LAYERS, "rate": 0.0}
    found: dict[str, Sweep] = {}
    for name, values in CONTESTANTS.items():
        # Adam's best rate is tried with all of them.
        rates = {*_grid(name, context), *([found["adam"].best] if found else [])}
        setting = context.setting(STEPS, **base, **values)
        if name == APART:
            setting = replace(setting, options={**setting.options, "muon_scalar_lr": found["adam"].best})
        found[name] = context.sweep(setting, sorted(rates))
    rate = found["adam"].best
    setting = context.setting(STEPS, **{**base, "rate": rate}, **CONTESTANTS["moonlight"])
    factors = {factor: _factor(context, setting, factor) for factor in FACTORS}
    losses = {TITLES[name]: sweep.losses for name, sweep in found.items()}
    return Report(
        name="moonlight",
        title=TITLE,
        asked=(
            "With `--muon-scale-mode spectral --muon-extra-scale-factor F`, Muon's updates have RMS F; Adam's have "
            "about 0.2 to 0.4. Moonlight (arXiv 2502.16982) takes 0.2, so that learning rate and weight decay of an "
            "Adam run go on to serve. Two questions: which F is best at the best rate of Adam, and is the best rate "
            "with F = 0.2 that of Adam, where that with other scale modes is not? One rate for all weights, "
            "but in the last row: there what Adam updates keeps Adam's best rate (`--muon-scalar-lr`)."
        ),
        settings=f"Width {base['width']}, {LAYERS} layers, weight decay {setting.weight_decay:g}. "
        + sizes(setting, context),
        tables=[
            ("Final validation loss by peak learning rate:", loss_table("", losses)),
            (
                f"At Adam's best rate, {rate_text(rate)}, with updates of RMS F:",
                table(
                    ["F", *(f"{factor:g}" for factor in factors)],
                    [["loss", *(loss_text(loss, loss == min(factors.values())) for loss in factors.values())]],
                ),
            ),
        ],
        findings=[*factor_findings(factors), *rate_findings(losses)],
        numbers={
            "rates": {name: sweep.as_json() for name, sweep in found.items()},
            "factors": {"rate": rate, "valid_loss": {f"{factor:g}": loss for factor, loss in factors.items()}},
        },
        draw=lambda figure: _draw(figure, losses, factors, rate),
    )


def _grid(name: str, context: Context) -> list[float]:
    if context.quick:
        return QUICK_RATES
    return RATES if name in ("adam", "moonlight") else LARGE_RATES


def _factor(context: Context, setting: Any, factor: float) -> float:
    options = {**setting.options, "muon_extra_scale_factor": factor}
    records = context.records(replace(setting, options=options))
    return Sweep({setting.rate: records}).losses[setting.rate]


def factor_findings(factors: Mapping[float, float]) -> list[str]:
    """Where the lowest loss is, and what the others cost."""
    lowest = arithmetic.best(factors)
    others = ", ".join(
        f"{loss - factors[lowest]:+.4f} at {factor:g}" for factor, loss in factors.items() if factor != lowest
    )
    place = {-1: "the smallest tried", 1: "the largest tried", 0: "inside of what was tried"}
    return [
        f"F = {lowest:g} has the lowest loss, {factors[lowest]:.4f}, {place[arithmetic.is_at_end(factors)]}; the "
        f"others differ by {others}.",
        f"Moonlight's F = {MOONLIGHT:g} is {factors[MOONLIGHT] - factors[lowest]:.4f} above the lowest loss.",
    ]


def rate_findings(losses: Mapping[str, arithmetic.Losses]) -> list[str]:
    """How far each best rate is from Adam's."""
    adam = losses[TITLES["adam"]]
    sentences = []
    for title, each in losses.items():
        if each is adam:
            continue
        shift = arithmetic.cells(arithmetic.best(each), arithmetic.best(adam))
        between = arithmetic.cells(arithmetic.optimum(each), arithmetic.optimum(adam))
        verdict = "within" if abs(shift) <= 1 else "not within"
        lowest = each[arithmetic.best(each)]
        at_adams = each[arithmetic.best(adam)]
        cost = (
            f"its loss is {at_adams:.4f}, {at_adams - lowest:.4f} above its own best and "
            f"{at_adams - adam[arithmetic.best(adam)]:+.4f} from Adam's"
            if at_adams < float("inf")
            else "it diverged"
        )
        sentences.append(
            f"{title}: the best rate is {shift:+.0f} factors of two ({between:+.2f} interpolated) from Adam's, "
            f"{verdict} one cell of the grid. At Adam's best rate {cost}."
            + ("" if arithmetic.interpolated(each) else " Its best rate is at the end of what was tried.")
        )
    return sentences


def _draw(figure: Any, losses: Mapping[str, arithmetic.Losses], factors: Mapping[float, float], rate: float) -> None:
    left, right = figure.subplots(1, 2)
    draw_losses(left, losses, "Loss by learning rate")
    cut(left, losses.values())
    left.set_ylabel("final validation loss (nats a character)")
    points = [(factor, loss) for factor, loss in factors.items() if loss < float("inf")]
    right.plot(*zip(*points, strict=True), **style(1))
    right.set_xscale("log", base=2)
    right.set_xticks(list(factors), [f"{factor:g}" for factor in factors])
    right.set_xlabel("RMS of Muon's updates over the learning rate")
    finish(right, f"Loss at Adam's best rate, {rate_text(rate)}")

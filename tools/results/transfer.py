"""Does the best learning rate stay where it is when the model gets wider?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tools.results import arithmetic
from tools.results.model import Setting
from tools.results.records import Context, Sweep
from tools.results.report import Report, cut, draw_losses, loss_table, loss_text, number_list, sizes

TITLE = "Learning-rate transfer over widths"
BASE = "64x3"
LAYERS = 3
WIDTHS = (64, 128, 256)
QUICK_WIDTHS = (32, 64)
STEPS = 150

WEIGHT_DECAY = 1e-3
"""Of the transfer rule, where it is not multiplied by the rate; about 0.1 times the best rate at the base width."""


@dataclass(frozen=True)
class Rule:
    """A way to choose sizes of updates, initialization and decay by the width.

    Attributes:
        title: in tables and pictures.
        values: of the setting.
        exponents: of two, of the first and the last rate of the grid.
    """

    title: str
    values: dict[str, Any]
    exponents: tuple[int, int]

    @property
    def rates(self) -> list[float]:
        """The grid, in factors of two."""
        return [2.0**exponent for exponent in range(self.exponents[0], self.exponents[1] + 1)]


TRANSFER = Rule(
    f"transfer from {BASE}",
    {
        "optimizer": "muon",
        "base": BASE,
        "weight_decay": WEIGHT_DECAY,
        "options": {"muon_scale_mode": "unit_rms_norm", "muon_weight_decay_method": "independent_scheduled"},
    },
    (-6, -2),
)
MOONLIGHT = Rule("Moonlight", {"optimizer": "muon", "options": {"muon_scale_mode": "moonlight"}}, (-8, -4))
ADAM = Rule("Adam", {"optimizer": "adam"}, (-10, -5))
RULES = {"transfer": TRANSFER, "moonlight": MOONLIGHT, "adam": ADAM}


def run(context: Context, rules: Mapping[str, Rule] = RULES) -> Report:
    """Sweep the learning rate at every width under every rule."""
    widths = QUICK_WIDTHS if context.quick else WIDTHS
    found: dict[str, dict[int, Sweep]] = {}
    for name, rule in rules.items():
        rates = rule.rates[2:5] if context.quick else rule.rates
        setting = context.setting(STEPS, width=widths[0], layers=LAYERS, rate=0.0, **rule.values)
        found[name] = {}
        for width in widths:
            found[name][width] = context.sweep(replace(setting, width=width), rates)
            # What is best for the smallest width is tried at all of them.
            rates = sorted({*rates, found[name][widths[0]].best})
    losses = {name: {width: sweep.losses for width, sweep in each.items()} for name, each in found.items()}
    return Report(
        name="transfer",
        title=TITLE,
        asked=(
            "A learning rate that is tuned on a small model serves a large one if the best rate does not move with "
            "the width. Muon under the transfer rule (`--muon-transfer`, arXiv 2512.05620), with "
            "`--muon-scale-mode unit_rms_norm` and decay that is independent of the rate, against Moonlight's scaling "
            "(`--muon-scale-mode moonlight`) and Adam, both with decoupled decay and an initialization of variance "
            "1 / fan-in: the rate in factors of two at each width, one rate for all weights."
        ),
        settings=(
            f"{LAYERS} layers; weight decay {WEIGHT_DECAY:g} under the transfer rule, where no rate multiplies it, and "
            f"{Setting.weight_decay:g} elsewhere. {sizes(setting, context)}"
        ),
        tables=[
            (f"{rules[name].title}, final validation loss by peak learning rate:", loss_table("width", _named(each)))
            for name, each in losses.items()
        ],
        findings=[sentence for name, each in losses.items() for sentence in findings(rules[name].title, each)],
        numbers={
            "rules": {
                name: {
                    "widths": {str(width): sweep.as_json() for width, sweep in each.items()},
                    "shift_in_factors_of_two": {str(width): shift for width, shift in shifts(losses[name]).items()},
                }
                for name, each in found.items()
            }
        },
        draw=lambda figure: _draw(figure, rules, losses),
        size=(5.0 * len(rules), 4.2),
    )


def shifts(losses: Mapping[int, arithmetic.Losses]) -> dict[int, dict[str, float]]:
    """How many factors of two the best rate of each width is above that of the smallest, on the grid and between."""
    smallest = losses[min(losses)]
    return {
        width: {
            "grid": arithmetic.cells(arithmetic.best(each), arithmetic.best(smallest)),
            "interpolated": arithmetic.cells(arithmetic.optimum(each), arithmetic.optimum(smallest)),
        }
        for width, each in losses.items()
    }


def findings(title: str, losses: Mapping[int, arithmetic.Losses]) -> list[str]:
    """What the numbers of a rule say."""
    moved = shifts(losses)
    widths = sorted(losses)
    parts = [f"{moved[width]['grid']:+.0f} ({moved[width]['interpolated']:+.2f} interpolated)" for width in widths[1:]]
    places = ", ".join(f"{part} at width {width}" for part, width in zip(parts, widths[1:], strict=True))
    power = arithmetic.slope(widths, [arithmetic.optimum(losses[width]) for width in widths])
    farthest = max(abs(each["grid"]) for each in moved.values())
    verdict = "stays within one cell of the grid" if farthest <= 1 else f"moves by {farthest:.0f} cells of the grid"
    ends = [str(width) for width in widths if arithmetic.interpolated(losses[width]) is None]
    if ends:
        verdict += f", as far as can be told: at width {number_list(ends)} it is at the end of what was tried"
    return [
        f"{title}: in factors of two, the best rate is {places} from that of width {widths[0]}. It {verdict}.",
        f"{title}: between the rates of the grid, the best one grows with the width to the power of {power:+.2f}.",
        _cost(title, losses),
    ]


def _cost(title: str, losses: Mapping[int, arithmetic.Losses]) -> str:
    """What it costs at the largest width to take the best rate of the smallest."""
    smallest, largest = min(losses), max(losses)
    rate = arithmetic.best(losses[smallest])
    lowest = losses[largest][arithmetic.best(losses[largest])]
    there = losses[largest][rate]
    above = "" if there == float("inf") else f", {there - lowest:.4f} above the best one there"
    return f"{title}: width {largest} at the best rate of width {smallest}: {loss_text(there)}{above}."


def _named(losses: Mapping[int, arithmetic.Losses]) -> dict[str, arithmetic.Losses]:
    return {str(width): each for width, each in losses.items()}


def _draw(figure: Any, rules: Mapping[str, Rule], losses: Mapping[str, Mapping[int, arithmetic.Losses]]) -> None:
    panels = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
    for axes, (name, each) in zip(panels, losses.items(), strict=True):
        draw_losses(axes, {f"width {width}": values for width, values in each.items()}, rules[name].title)
    cut(panels[0], [values for each in losses.values() for values in each.values()])
    panels[0].set_ylabel("final validation loss (nats a character)")

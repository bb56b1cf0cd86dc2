"""Do the first steps change activations by the same amount at every width and depth?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from tools.results import arithmetic, corpus
from tools.results.model import Setting, Training, forward
from tools.results.records import Context, be_healthy, describe
from tools.results.report import Report, finish, number_list, sizes, style, table
from tools.results.transfer import RULES as ALL_RULES

TITLE = "Coordinate check over widths and depths"
STEPS = 5
WIDTHS = (64, 128, 256, 512)
DEPTHS = (2, 4, 8, 16)
SEEDS = 3
"""At least; the runs are short."""

QUICK_WIDTHS = (32, 64)
QUICK_DEPTHS = (1, 2)
BASE_DEPTH = 3
FLAT = 0.05
"""A slope that is not larger, either way, counts as none."""

PLACES = {"middle": "half of the layers", "last": "last layer", "logits": "logits"}


RATE = 2.0**-7
MOONLIGHT_FACTOR = 0.2 * math.sqrt(64)
"""Moonlight's factor on the update of a square matrix of the base width."""

RATES = {"transfer": RATE, "moonlight": RATE / MOONLIGHT_FACTOR}
RULES = {name: ALL_RULES[name] for name in RATES}


def run(context: Context) -> Report:
    """Measure every rule at every width and depth, in the first steps."""
    context = context if context.quick else replace(context, seeds=max(context.seeds, SEEDS))
    widths, depths = (QUICK_WIDTHS, QUICK_DEPTHS) if context.quick else (WIDTHS, DEPTHS)
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for name, rule in RULES.items():
        setting = context.setting(
            STEPS, width=widths[0], layers=BASE_DEPTH, constant=True, rate=RATES[name], **rule.values
        )
        found[name] = {
            "width": {width: change(context, replace(setting, width=width)) for width in widths},
            "depth": {depth: change(context, replace(setting, layers=depth)) for depth in depths},
        }
    slopes = {name: {axis: _slopes(values) for axis, values in axes.items()} for name, axes in found.items()}
    return Report(
        name="coordinates",
        title=TITLE,
        asked=(
            f"Under a rule that transfers, {setting.steps} steps change the activations on a fixed batch by an RMS "
            "that does not depend on the size of the model: the residual stream after half of the layers and after "
            "all, and the logits. Muon under the transfer rule (`--muon-transfer`) against Moonlight's scaling, at "
            "one rate each, with which a square matrix of the base moves alike."
        ),
        settings=(
            f"Widths with {BASE_DEPTH} layers, depths with width {widths[0]}. {sizes(setting, context)} The loss "
            "is not used here: activations on one batch of the validation text are compared, before and after."
        ),
        tables=[
            (f"{rule.title}, rate {RATES[name]:.4g}, RMS of the change:", _table(found[name], slopes[name]))
            for name, rule in RULES.items()
        ],
        findings=[sentence for name, rule in RULES.items() for sentence in findings(rule.title, slopes[name])],
        numbers={
            "rms_of_change": {
                name: {axis: {str(size): each for size, each in values.items()} for axis, values in axes.items()}
                for name, axes in found.items()
            },
            "slopes": slopes,
        },
        draw=lambda figure: _draw(figure, found),
        size=(11.0, 4.2),
    )


def change(context: Context, setting: Setting) -> dict[str, float]:
    """RMS of the change of the activations on a fixed batch, by place; the mean over the seeds."""
    each = [_change(context, replace(setting, seed=context.seed + number)) for number in range(context.seeds)]
    return {place: sum(one[place] for one in each) / len(each) for place in PLACES}


def _change(context: Context, setting: Setting) -> dict[str, float]:
    return context.cached({"setting": asdict(setting), "measured": "change"}, lambda: measure(setting))


def measure(setting: Setting) -> dict[str, float]:
    """Train some steps, and compare the activations with those before."""
    data = corpus.load()
    batch = data.valid_batch(0, setting.valid_batches, setting.batch, setting.length)
    training = Training(setting, data)
    before = activations(training.model, batch)
    for _ in range(setting.steps):
        training.advance()
    be_healthy(setting, training.alarms)
    after = activations(training.model, batch)
    result = {place: float((after[place] - before[place]).square().mean().sqrt()) for place in PLACES}
    print(f"{describe(setting)}: " + ", ".join(f"{place} {value:.4f}" for place, value in result.items()), flush=True)
    return result


@torch.no_grad()
def activations(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The residual stream after half of the layers and after all, and the logits."""
    layers = model.module.decoder.layers
    model.eval()
    with _outputs({"middle": layers[(len(layers) - 1) // 2], "last": layers[-1]}) as found:
        found["logits"] = forward(model, batch, labels=False)
    model.train()
    return {place: tensor.detach().clone() for place, tensor in found.items()}


@contextmanager
def _outputs(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """A dictionary that gets what these modules return; of several things the first."""
    found: dict[str, torch.Tensor] = {}

    def keeper(place: str) -> Any:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            found[place] = output[0] if isinstance(output, tuple) else output

        return keep

    hooks = [module.register_forward_hook(keeper(place)) for place, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _slopes(values: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    return {place: arithmetic.slope(list(values), [each[place] for each in values.values()]) for place in PLACES}


def findings(title: str, slopes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What the slopes of a rule say."""
    sentences = []
    for axis, each in slopes.items():
        steepest = max(each, key=lambda place: abs(each[place]))
        text = number_list([f"{each[place]:+.3f} ({name})" for place, name in PLACES.items()])
        flat = [name for place, name in PLACES.items() if abs(each[place]) <= FLAT]
        sentences.append(
            f"{title}: the change goes as the {axis} to the power of {text}; "
            + (f"within {FLAT:g} of none at the {number_list(flat)}" if flat else f"nowhere within {FLAT:g} of none")
            + f". The steepest one multiplies the change by {2 ** each[steepest]:.2f} from one {axis} to the double."
        )
    return sentences


def _table(found: Mapping[str, Mapping[int, Mapping[str, float]]], slopes: Mapping[str, Mapping[str, float]]) -> str:
    rows = []
    for axis, values in found.items():
        rows += [[f"{axis} {size}", *(f"{each[place]:.4f}" for place in PLACES)] for size, each in values.items()]
        rows.append([f"**slope over {axis}s**", *(f"**{slopes[axis][place]:+.3f}**" for place in PLACES)])
    return table(["", *PLACES.values()], rows)


def _draw(figure: Any, found: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]) -> None:
    panels = figure.subplots(1, 2)
    for axes, axis in zip(panels, ("width", "depth"), strict=True):
        for number, (name, rule) in enumerate(RULES.items()):
            for dashes, place in zip(("-", "--", ":"), PLACES, strict=True):
                values = found[name][axis]
                line = {**style(number), "linestyle": dashes}
                axes.plot(
                    list(values), [each[place] for each in values.values()], label=f"{rule.title}, {place}", **line
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:.0f}")
        axes.yaxis.set_major_formatter(lambda size, _: f"{size:.2g}")
        axes.set_xlabel(axis)
        finish(axes, f"Change over {axis}s")
    panels[0].set_ylabel("RMS of the change")
    panels[1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))

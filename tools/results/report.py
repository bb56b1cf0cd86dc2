"""What an experiment writes: a page, its numbers and a picture, under one name."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_muon.monitor import plots
from tools.results import arithmetic
from tools.results.model import EMBEDDING_STD, Setting
from tools.results.records import Context, to_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The look of the other pictures.
COLOURS, STYLES, MARKERS = plots.COLOURS, plots._STYLES, "osD^vP*"
LINE = 120
CUT = 0.4
"""Losses so much above the highest of the best ones are not in the picture."""


@dataclass
class Report:
    """An experiment that is done.

    Attributes:
        name: of the files.
        title: of the page and over the picture.
        asked: what the experiment is for, a paragraph.
        settings: what was trained and how, a paragraph.
        tables: in Markdown, each with what is above it.
        findings: sentences that are made from the numbers.
        numbers: all of them, for the JSON file.
        draw: draws the picture.
        size: of the picture, in inches.
    """

    name: str
    title: str
    asked: str
    settings: str
    tables: Sequence[tuple[str, str]]
    findings: Sequence[str]
    numbers: dict[str, Any]
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (10.0, 4.2)


def write(report: Report, context: Context, out: Path) -> None:
    """Write the three files, each whole or not at all."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    with plots.replacing(out / f"{report.name}.md") as partial:
        partial.write_text(page(report, context))
    numbers = {
        "command": command(report.name, context),
        "machine": machine(),
        "settings": report.settings,
        **report.numbers,
    }
    with plots.replacing(out / f"{report.name}.json") as partial:
        partial.write_text(json.dumps(to_json(numbers), indent=1) + "\n")
    figure = Figure(figsize=report.size, layout="constrained", dpi=110)
    report.draw(figure)
    figure.suptitle(report.title, fontsize="medium")
    with plots.replacing(out / f"{report.name}.png") as partial:
        figure.savefig(partial, format="png")


def page(report: Report, context: Context) -> str:
    """The page in Markdown."""
    trial = ["A trial of the tool with sizes that show nothing (`--quick`).", ""] if context.quick else []
    lines = [f"# {report.title}", "", *trial, wrapped(report.asked), "", f"    {command(report.name, context)}", ""]
    lines += [wrapped(report.settings), "", f"![{report.title}]({report.name}.png)", ""]
    for above, rows in report.tables:
        lines += [wrapped(above), "", rows, ""]
    lines += ["## What came out", "", *(wrapped(f"* {sentence}", "  ") for sentence in report.findings), ""]
    lines += [wrapped(f"Machine: {machine()}. All numbers are in `{report.name}.json`.")]
    return "\n".join(lines) + "\n"


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines as long as those of the other documents."""
    return textwrap.fill(
        text, LINE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def command(name: str, context: Context) -> str:
    """The command that makes the report again."""
    words = [name]
    if context.steps is not None:
        words += ["--steps", str(context.steps)]
    if context.seed != Context.seed:
        words += ["--seed", str(context.seed)]
    if context.seeds != 1:
        words += ["--seeds", str(context.seeds)]
    if context.quick:
        words.append("--quick")
    return f'make results ARGS="{" ".join(words)}"'


def machine() -> str:
    """Cores in use and versions, without names of machines."""
    threads = torch.get_num_threads()
    return (
        f"{platform.machine()} CPU, {threads} core{'s' if threads > 1 else ''}, float32, torch {torch.__version__}, "
        f"megatron-core {version('megatron-core')}, Python {platform.python_version()}"
    )


def sizes(setting: Setting, context: Context) -> str:
    """The model, the data and the schedule in words."""
    schedule = "constant rate" if setting.constant else f"{setting.warmup:.0%} warm-up, then a line to 0"
    seeds = (
        f"seed {context.seed}" if context.seeds == 1 else f"seeds {context.seed} to {context.seed + context.seeds - 1}"
    )
    return (
        "A GPT of Megatron-Core's modules (RMSNorm, rotary embeddings, SwiGLU of twice the width, heads of 16, output "
        f"layer not tied, embeddings of standard deviation {EMBEDDING_STD:g}) learns the characters of Jane Austen's "
        f"novels: {setting.steps} steps of {setting.batch} sequences of {setting.length}, {schedule}; {seeds}. "
        "Optimizer and schedule are Megatron's, by its factory; Muon's momentum is 0.95 (Nesterov), Adam's betas are "
        "0.9 and 0.95, gradients are clipped at norm 1. Loss is in nats a character, on "
        f"{setting.valid_batches * setting.batch} sequences of chapters held out."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def loss_table(corner: str, losses: Mapping[str, arithmetic.Losses]) -> str:
    """Losses by learning rate, a row for each name, the lowest one bold; then the best rates."""
    rates = sorted({rate for each in losses.values() for rate in each})
    rows = []
    for name, each in losses.items():
        lowest = arithmetic.best(each)
        cells = [loss_text(each[rate], rate == lowest) if rate in each else "" for rate in rates]
        between = arithmetic.interpolated(each)
        rows.append([name, *cells, rate_text(lowest), "at the end" if between is None else rate_text(between)])
    return table([corner, *map(rate_text, rates), "best rate", "interpolated"], rows)


def loss_text(loss: float, bold: bool = False) -> str:
    """A loss in a table."""
    text = "diverged" if loss == float("inf") else f"{loss:.4f}"
    return f"**{text}**" if bold else text


def rate_text(rate: float) -> str:
    """A learning rate with three digits."""
    return f"{rate:.3g}"


def style(number: int) -> dict[str, Any]:
    """Colour, line and marker of the ``number``-th curve, told apart with any colour vision."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def draw_losses(axes: Axes, losses: Mapping[str, arithmetic.Losses], title: str) -> None:
    """Loss against rate, a curve for each name, with a ring at the best rate. Runs that diverged are left out."""
    for number, (name, each) in enumerate(losses.items()):
        points = [(rate, loss) for rate, loss in sorted(each.items()) if loss < float("inf")]
        axes.plot(*zip(*points, strict=True), label=name, **style(number))
        lowest = arithmetic.best(each)
        axes.plot([lowest], [each[lowest]], "o", markersize=10, fillstyle="none", color=style(number)["color"])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda rate, _: rate_text(rate))
    axes.tick_params(axis="x", labelsize="small")
    axes.set_xlabel("peak learning rate")
    finish(axes, title)
    axes.legend(fontsize="small", framealpha=0.9, edgecolor="none")  # lies over the curves of rates far too high


def cut(axes: Axes, losses: Iterable[arithmetic.Losses]) -> None:
    """Leave out of a picture what is much worse than the best of every curve; it is in the table."""
    curves = [[loss for loss in each.values() if loss < float("inf")] for each in losses]
    low, high = min(map(min, curves)), max(map(max, curves))
    top = min(high, max(map(min, curves)) + CUT)
    margin = 0.05 * (top - low) or 0.1
    axes.set_ylim(low - margin, top + margin)


def finish(axes: Axes, title: str) -> None:
    """The look of the other pictures."""
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def number_list(values: Sequence[str]) -> str:
    """``a, b and c``."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"

"""``python -m tools.docs``: write from the tables that the package walks ``docs/flags.md``, ``docs/refusals.md``,
``docs/hooks.md``, and alarms in ``docs/monitoring.md``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from megatron_muon.choices import OPTIMIZERS
from megatron_muon.config import MuonConfig, flag
from megatron_muon.knobs import EVERY_OPTIMIZER
from megatron_muon.monitor.alarms import ALARMS, Thresholds
from megatron_muon.refusals import OPTIONS, QK_CLIP, TRANSFER, UNMEASURED, Refusal
from megatron_muon.refusals.cpu import CHANGES, CPU
from megatron_muon.refusals.megatron import MEGATRON
from megatron_muon.refusals.plan import PLAN, READ
from megatron_muon.refusals.rule import flag_of
from tools import flags_page
from tools.upstream import page

FILE = Path(__file__).parents[1] / "docs" / "refusals.md"
MONITORING = FILE.with_name("monitoring.md")
HOOKS = FILE.with_name("hooks.md")

_HEAD = """\
# What is refused

Made by `python -m tools.docs` from the tables in `megatron_muon/refusals/` and `megatron_muon/config.py`; a test
compares.

A combination of flags that cannot be honoured, or that would do nothing, stops the run before the model is built. The
message names flags, values, the reason and what to do instead; if there are several, it has all of them. The command
line, an `OptimizerConfig` made in code, `python -m megatron_muon plan` and the CPU runtime walk through the same
rows, each with what it knows. A value that a flag cannot have is refused everywhere too; `SCRIPT --help` says what
each takes.
"""

_MODEL = """\
## What the model decides

These need weights or process groups, and stop all ranks when the optimizer is built (most of them in a plan, too): a
weight of a module that no rule knows, `--muon-param-rule` that matches nothing, `--optimizer stiefel_muon` without a
weight on the manifold ([routing](routing.md)); low-rank adapters, and weights of zeros, where norms are kept; models
that `--muon-transfer` has no rule for ([variants](variants.md)); buffers of `DistributedDataParallel` that do not fit
the routes; weights cut by rematerialisation groups; modes of tensor parallelism that cannot hold a split
([parallelism](parallelism-and-cost.md)); layers that QK-clip cannot clip ([MuonClip](muonclip.md)); checkpoints of
other rules or models ([checkpoints](checkpoints.md)).
"""


def render() -> str:
    """The page."""
    knobs = {f"`{flag(knob.name)}`": knob.metadata["readers"] for knob in fields(MuonConfig)}
    some = {name: readers for name, readers in knobs.items() if readers not in (OPTIMIZERS, EVERY_OPTIMIZER)}
    some["`--adaptive-muon-moment2-method`, `--adaptive-muon-beta2`, `--adaptive-muon-eps`"] = ("adaptive_muon",)
    every = [name for name, readers in knobs.items() if readers == EVERY_OPTIMIZER]
    parts = [
        _HEAD,
        "## Flags that the optimizer does not read\n",
        "Another value than the default is refused with any `--optimizer` that does not read the flag, Megatron's own "
        "included. Of a flag that Megatron-Core has, too, a line is said with its own optimizers: launch scripts give "
        "it for any. An `OptimizerConfig` for one of them may have any value: recipes set fields for all.\n",
        _table(("flag", "read by"), [(name, ", ".join(map(_code, readers))) for name, readers in some.items()]),
        f"{', '.join(every)} act with any optimizer; all other `--muon-*` flags are read by {_and(OPTIMIZERS)}.\n",
        "## Options with each other\n",
        _rows(OPTIONS),
        "## Options that set up param groups\n",
        _rows(TRANSFER),
        "## Megatron's settings\n",
        f"With `--optimizer` {_and(OPTIMIZERS)}.\n",
        _rows(MEGATRON),
        "## QK-clip\n",
        "These are refused with any optimizer.\n",
        _rows(QK_CLIP),
        "On the command line:\n",
        _rows(UNMEASURED),
        "## On the CPU\n",
        _rows(CPU),
        "These are changed, and listed once at start; in a `TransformerConfig` made in code they are refused:\n",
        _table(
            ("setting", "becomes", "why"),
            [(f"`{flag_of(change.name)}`", f"`{change.value}`", change.reason) for change in CHANGES],
        ),
        "## In a plan\n",
        _rows((*READ, *PLAN)),
        _MODEL,
    ]
    return "\n".join(parts)


def with_alarms(page: str) -> str:
    """The page about monitoring, with tables of alarms and their thresholds that are those of the package."""
    kinds = (
        (_code(kind.alarm), *(_coded(text.format(glob="GLOB")) for text in (kind.meaning, kind.cause, kind.remedy)))
        for kind in ALARMS.values()
    )
    limits = (
        (_code(each.name), f"{each.default:g}", each.metadata["reason"], each.metadata["source"])
        for each in fields(Thresholds)
    )
    tables = {
        "| alarm |": _table(("alarm", "raised by", "usual cause", "to try"), kinds),
        "| threshold |": _table(("threshold", "value", "what it is", "where it is from"), limits),
    }
    for first, table in tables.items():
        before, _, rest = page.partition(first)
        page = f"{before}{table}\n{rest.partition('\n\n')[2]}"
    return page


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(map(_code, names[:-1]))} and {_code(names[-1])}"


def _coded(text: str) -> str:
    """Flags in a sentence, so that two hyphens stay two."""
    return re.sub(r"(?<![\w-])--[\w-]+", lambda match: _code(match[0]), text)


def _code(name: str) -> str:
    return f"`{name}`"


def _rows(rows: Iterable[Refusal]) -> str:
    return _table(
        ("refused", "why", "instead"), [(row.words, _coded(row.because), _coded(row.instead)) for row in rows]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    flags_page.FILE.write_text(flags_page.render(), encoding="utf-8")
    FILE.write_text(render(), encoding="utf-8")
    HOOKS.write_text(page.render(), encoding="utf-8")
    MONITORING.write_text(with_alarms(MONITORING.read_text(encoding="utf-8")), encoding="utf-8")

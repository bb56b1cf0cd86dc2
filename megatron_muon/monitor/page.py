"""The sheet of runs as one HTML file that needs nothing else: no network, no server, no matplotlib."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_muon.monitor.metrics import Metrics
from megatron_muon.monitor.plots import COLOURS, loss_limits, replacing
from megatron_muon.monitor.sheet import HOW_TO_MEASURE, Panel, panels, summary

__all__ = ["write_page"]

_TEMPLATE = Path(__file__).with_name("page.html")
_ALARM = ("run", "alarm", "since", "told", "weights", "count", "value", "limit", "what it means")


def write_page(runs: Mapping[str, Metrics], path: Path, title: str | None = None) -> None:
    """Write the page: panels with values under the pointer, runs and classes to switch on and off, alarms, flags.

    All text of records stands in it as text, whatever it holds: they may come from elsewhere.
    """
    names = list(runs)
    unmeasured = [name for name, run in runs.items() if not run.muon]
    data = {
        "names": names,
        "runs": [summary(name, run) for name, run in runs.items()],
        "end": max((run.iteration for run in runs.values()), default=0),
        "limits": loss_limits(runs.values()),
        "panels": [_panel(panel, names) for panel in panels(runs, with_classes=True)],
        "alarms": [[names.index(name), a["iteration"], a["alarm"]] for name, run in runs.items() for a in run.alarms],
    }
    told = [_alarm(name, alarm) for name, run in runs.items() for alarm in run.alarms]
    values = {
        "TITLE": escape(title or "Runs: " + ", ".join(runs)),
        "COLOURS": "".join(f"--c{number}:{colour};" for number, colour in enumerate(COLOURS)),
        "NOTE": escape(HOW_TO_MEASURE.format(runs=", ".join(unmeasured))) if unmeasured else "",
        "ALARMS": _table(_ALARM, told, "alarms") if told else "<p>There are none in the record.</p>",
        "STARTS": "".join(_compared(runs, key) for key in ("flags", "versions", "routes")),
        # Nothing in it can end the element that it stands in.
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    text = _TEMPLATE.read_text()
    before, *parts = text.split("{{")
    for part in parts:
        name, _, after = part.partition("}}")
        before += values[name] + after
    with replacing(path) as partial:
        partial.write_text(before)


def _panel(panel: Panel, names: Sequence[str]) -> dict[str, Any]:
    lines = []
    for line in panel.lines:
        iterations, *columns = zip(*line.points, strict=True)
        y, low, high = ([None if v is None else float(f"{v:.4g}") for v in column] for column in columns)
        ranges = {} if all(value is None for value in low) else {"l": low, "h": high}
        entry = {"r": names.index(line.run), "n": line.name, "k": line.role, "x": iterations, "y": y, **ranges}
        lines.append(entry)
    own: dict[str, Any] = {"key": panel.key, "title": panel.about.title, "meaning": panel.about.meaning}
    own["log"] = panel.about.is_logarithmic
    return {**own, "alarms": panel.alarms, "limits": panel.limits, "further": panel.is_further, "lines": lines}


def _alarm(name: str, alarm: Mapping[str, Any]) -> list[str]:
    weights = alarm.get("weights", [])
    named = ", ".join(map(str, weights[:4])) + f" and {len(weights) - 4} more" * (len(weights) > 4)
    keys = ("alarm", "since", "iteration", "", "count", "value", "limit", "text")
    return [name, *(named if not key else _text(alarm.get(key)) for key in keys)]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _compared(runs: Mapping[str, Metrics], key: str) -> str:
    """A table of what the ``start`` lines say under ``key``, a column for each run; what differs comes first."""
    columns = []
    for run in runs.values():
        column: dict[str, list[str]] = {}
        for start in run.starts:
            for name, value in start.get(key, {}).items():
                said = column.setdefault(str(name), [])
                said += [_text(value)] * (said[-1:] != [_text(value)])
        columns.append({name: " \u2192 ".join(said) for name, said in column.items()})
    rows = [[name, *(column.get(name, "") for column in columns)] for name in sorted(set().union(*columns))]
    rows = [[("\u2260 " if len(set(row[1:])) > 1 else "") + row[0], *row[1:]] for row in rows]
    if not rows:
        return f"<details><summary>{key.title()}</summary><p>They were not recorded.</p></details>"
    rows.sort(key=lambda row: not row[0].startswith("\u2260"))
    return f"<details><summary>{key.title()}</summary>{_table((key, *runs), rows)}</details>"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = list(head)
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-of="{escape(n)}">{escape(v)}</td>' for n, v in zip(head, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'

"""The page from the JSON file: ``python -m tools.gpu_check.page [FILE] > docs/results/gpu.md``.

Only the standard library is imported here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check.report import FAILED, NOT_RUN, PASSED, UNFINISHED
from tools.gpu_check.targets import TARGETS

HEAD = """\
# On a GPU

    make gpu-check                                  # or: python3 -m tools.gpu_check
    python3 -m tools.gpu_check.page runs/gpu_check/gpu.json > docs/results/gpu.md

"""

NEVER = """\
**Nothing of this package has been run on a GPU yet.** All results in this repository are of CPUs. The command above
checks and measures on one GPU, nine minutes a call at most, what only a GPU can tell; its page takes this one's place.
"""

ON_CPU = """\
**This page is of a run on a CPU**, with small sizes: it shows that the command runs, and nothing of a GPU.
"""

WAY = """\
Times are CUDA events, medians after a warm-up, of inputs in turn that together are larger than the cache. Random data,
never zeros; what kernels write is filled with NaN before. An item that failed, or was not run, says why.
"""


def render(document: Mapping[str, Any] | None) -> str:
    """The page in Markdown.

    Args:
        document: of the JSON file; None if there is none yet.
    """
    targets = "## Targets\n\n" + "\n".join(f"* {target}" for target in TARGETS.values()) + "\n"
    if document is None:
        return HEAD + NEVER + "\n" + targets
    machine, versions = document["machine"], document["versions"]
    text = [HEAD.rstrip("\n"), *([] if machine["device"] == "cuda" else [ON_CPU.rstrip("\n")])]
    text.append(f"{', '.join(machine['gpus']) or machine['processor']}. " + _sentence(versions))
    text += [WAY.rstrip("\n"), _parts(document), _targets(document), _failures(document)]
    for name, part in document["parts"].items():
        text += _tables(name, part)
    text.append(_left_out(document))
    return "\n\n".join(each for each in text if each) + "\n"


def state_of(part: Mapping[str, Any]) -> str:
    """The state of a part: the worst of its items'."""
    states = {result["state"] for result in part["items"].values()}
    return next((state for state in (FAILED, UNFINISHED, PASSED, NOT_RUN) if state in states), UNFINISHED)


def _sentence(versions: Mapping[str, str]) -> str:
    there = [f"{name} {number}" for name, number in versions.items() if number != "not installed"]
    absent = [name for name, number in versions.items() if number == "not installed"]
    return f"{', '.join(there)}." + (f" Not installed: {', '.join(absent)}." if absent else "")


def _parts(document: Mapping[str, Any]) -> str:
    columns = (PASSED, FAILED, NOT_RUN, UNFINISHED)
    rows = []
    for name, part in document["parts"].items():
        states = [result["state"] for result in part["items"].values()]
        counts = [str(states.count(state) or "") for state in columns]
        rows.append([name, part["title"], state_of(part), *counts, f"{part['seconds']:.0f}"])
    sources = {result.get("source") for part in document["parts"].values() for result in part["items"].values()}
    note = "\n\nThe items are of several states of the source." if len(sources - {None}) > 1 else ""
    return "## Parts\n\n" + table(["part", "", "state", *columns, "seconds"], rows) + note


def _targets(document: Mapping[str, Any]) -> str:
    rows = []
    for key, target in TARGETS.items():
        found = [each for _, _, result in _items(document) for each in result.get("targets", ()) if each[0] == key]
        missed = [each for each in found if not each[3]]
        values = "; ".join(f"{of}: {value:.3g}" for _, value, of, _ in found)
        state = "not measured" if not found else f"missed {len(missed)} of {len(found)}" if missed else "reached"
        rows.append([str(target), state, values])
    return "## Targets\n\n" + table(["", "", ""], rows)


def _failures(document: Mapping[str, Any]) -> str:
    lines = []
    for part, item, result in _items(document):
        if result["state"] != FAILED:
            continue
        reasons = [*([result["reason"]] if "reason" in result else []), *reasons_of(result)]
        lines.append(f"* {part}, {item}: {_cell('; '.join(reasons))}")
    return "## What failed\n\n" + ("\n".join(lines) or "Nothing.")


def reasons_of(result: Mapping[str, Any]) -> list[str]:
    """What an item has said that is not as it must be."""
    found = [f"{what}: {text}" for what, passed, text in result.get("checks", ()) if not passed]
    missed = [each for each in result.get("targets", ()) if not each[3]]
    return found + [f"{key} of {of} is {value:.3g}; {TARGETS[key]}" for key, value, of, _ in missed]


def _tables(name: str, part: Mapping[str, Any]) -> list[str]:
    """The tables of a part, and how many checks it has passed."""
    merged: dict[str, list[Mapping[str, Any]]] = {}
    for result in part["items"].values():
        for title, rows in result.get("rows", {}).items():
            merged.setdefault(title, []).extend(rows)
    checks = [each for result in part["items"].values() for each in result.get("checks", ())]
    text = [f"## {part['title']}"]
    if checks:
        text.append(f"{sum(1 for each in checks if each[1])} of {len(checks)} checks passed.")
    for title, rows in merged.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        body = [[_number(row.get(column, "")) for column in columns] for row in rows]
        text.append(f"### {title[0].upper()}{title[1:]}\n\n{table(columns, body)}")
    return text if len(text) > 1 else []


def _left_out(document: Mapping[str, Any]) -> str:
    """What was not run, each reason once."""
    lines: dict[str, list[str]] = {}
    for part, item, result in _items(document):
        if result["state"] in (NOT_RUN, UNFINISHED):
            lines.setdefault(result.get("reason") or "; ".join(result.get("notes", ())), []).append(f"{part}, {item}")
        else:
            for note in result.get("notes", ()):
                lines.setdefault(note.removeprefix("not run: "), []).append(f"in {part}, {item}")
    text = "\n".join(f"* {_cell(reason)} ({'; '.join(names)})" for reason, names in lines.items())
    return f"## Not run\n\n{text}" if text else ""


def _items(document: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    return [(name, item, r) for name, part in document["parts"].items() for item, r in part["items"].items()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(str(cell)) for cell in line)} |" for line in lines)


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(argv: Sequence[str]) -> int:
    """Print the page of a file; without one, that of a package that has never been run on a GPU."""
    document = json.loads(Path(argv[0]).read_text()) if argv else None
    sys.stdout.write(render(document))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command: parts within a budget of minutes, results in one JSON file and one page, a list of what failed."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tools.gpu_check.page import reasons_of, render, state_of
from tools.gpu_check.process import START, PartRun
from tools.gpu_check.report import FAILED, NOT_RUN, PASSED, UNFINISHED, repository

JSON, PAGE, LOG = "gpu.json", "gpu.md", "log.txt"

LEAST_S = 10.0
"""No part is begun with less left."""

CPU_PATIENCE = 4.0
"""Factor on the limits of parts and items on CPUs, which are slow, and busy with other things."""


@dataclass(frozen=True)
class Part:
    """What is run by itself.

    Attributes:
        title: for the page.
        limit: seconds that it may take.
        module: that has its ``items``; by default the one of its name in :mod:`tools.gpu_check.parts`.
    """

    title: str
    limit: float
    module: str = ""


PARTS = {
    "rates": Part("What the machine does", 40),
    "kernels": Part("Kernels against float64", 120),
    "steps": Part("A step of every optimizer against float64 on the CPU", 120),
    "bench": Part("Steps on the shapes of six models", 240),
    "ranks": Part("Several ranks", 200),
    "graph": Part("CUDA graph of the step", 60),
    "demo": Part("The demo, trained", 150),
    "te": Part("TransformerEngine", 150),
}
"""In the order in which they are run: first what tells most."""

PACKAGES = (
    *("torch", "triton", "megatron-core", "emerging-optimizers", "gram-newton-schulz", "quack-kernels"),
    *("transformer-engine", "nvidia-nccl-cu13", "nvidia-cublas"),
)


def main(argv: Sequence[str] | None = None, parts: Mapping[str, Part] = PARTS) -> int:
    """Entry point.

    Args:
        argv: arguments without the program's name; those of the process by default.
        parts: what there is to run.

    Returns:
        0 if nothing has failed and all of it was run, as far as what it needs is installed; 1 if something failed; 3 if
        something is left for another call.
    """
    args = _parser(parts).parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    document = _begin(out, args.device)
    chosen = list(dict.fromkeys(args.part)) or list(parts)
    end = time.time() + 60 * args.minutes
    if args.again:
        for name in chosen:
            document["parts"].pop(name, None)
    # What was never run comes before what failed.
    for name in sorted(chosen, key=lambda name: not _is_left(document, name)):
        _run(name, parts[name], document, end, args, out)
    _write(out, document)
    return _conclude(document, chosen, out)


def _parser(parts: Mapping[str, Part]) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:8} {part.title} (at most {part.limit:.0f} s)" for name, part in parts.items())
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description=f"Check and measure on a GPU what only a GPU can tell.\n\n{listed}\n\n"
        "What has passed is kept in --out: the same command goes on with the rest, and repeats what failed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="cpu: small, to see that all of it runs"
    )
    parser.add_argument("--part", nargs="+", choices=tuple(parts), default=[], help="only these (default: all)")
    parser.add_argument("--out", default="runs/gpu_check", help=f"folder for {JSON}, {PAGE} and {LOG}")
    parser.add_argument("--minutes", type=float, default=9.0, help="that it may take (default: 9)")
    parser.add_argument("--again", action="store_true", help="repeat what has passed, too")
    return parser


def _begin(out: Path, device: str) -> dict[str, Any]:
    """The document, with the results that there are; those of another machine or of other versions are put aside."""
    machine = {"device": device, "processor": _processor(), "gpus": _gpus() if device == "cuda" else []}
    fresh = {"machine": machine, "versions": _versions(), "parts": {}}
    path = out / JSON
    try:
        known = json.loads(path.read_text())
        changed = [f"{key}: {known.get(key)}" for key in ("machine", "versions") if known.get(key) != fresh[key]]
    except FileNotFoundError:
        return fresh
    except ValueError as error:
        known, changed = fresh, [f"it cannot be read, {error}"]
    if not changed:
        return known
    number = 1
    while (other := path.with_name(f"{path.stem}-old-{number}{path.suffix}")).exists():
        number += 1
    path.rename(other)
    print(f"what was in {path} is of other circumstances ({'; '.join(changed)}): kept as {other}", flush=True)
    return fresh


def _is_left(document: Mapping[str, Any], name: str) -> bool:
    """Whether something of a part has not been run."""
    items = document["parts"].get(name, {}).get("items")
    return not items or any(result["state"] == UNFINISHED for result in items.values())


def _run(name: str, part: Part, document: dict[str, Any], end: float, args: argparse.Namespace, out: Path) -> None:
    """Run what is left of a part."""
    entry = document["parts"].setdefault(name, {"items": {}, "seconds": 0.0})
    entry["title"] = part.title
    items, source = entry["items"], source_hash()
    items.pop(START, None)
    done, failed = ([item for item, its in items.items() if its["state"] == state] for state in (PASSED, FAILED))
    left = end - time.time()
    if left < LEAST_S:
        if not items:
            items[START] = {"state": UNFINISHED, "reason": "no time was left"}
        return
    print(f"\n{name}: {part.title}", flush=True)
    begin = time.time()

    def found(item: str, result: dict[str, Any]) -> None:
        items[item] = result | {"source": source}
        entry["seconds"] += time.time() - before[0]
        before[0] = time.time()
        document["source"] = source
        _write(out, document)
        print(_line(item, result), flush=True)

    before = [begin]
    patience = CPU_PATIENCE if args.device == "cpu" else 1.0
    limit, module = patience * part.limit, part.module or f"tools.gpu_check.parts.{name}"
    run = PartRun(module, args.device, min(limit, left), left < limit, patience, out / LOG, found)
    run.run(done, failed)
    for item in [item for item in items if item not in run.names and item != START and run.names]:
        del items[item]  # of an earlier state of the source
    if done and len(done) == len(run.names):
        print(f"  {len(done)} passed before", flush=True)


def _line(item: str, result: Mapping[str, Any]) -> str:
    seconds = f" ({result['seconds']:.1f} s)" if "seconds" in result else ""
    reason = f": {' '.join(result['reason'].split())[:400]}" if "reason" in result else ""
    lines = [f"  {result['state']:10} {item}{seconds}{reason}"]
    lines += [f"FAILED: {reason}" for reason in reasons_of(result)]
    lines += [note for note in result.get("notes", ()) if note != f"not run: {result.get('reason')}"]
    return ("\n" + 13 * " ").join(lines)


def _conclude(document: Mapping[str, Any], chosen: Sequence[str], out: Path) -> int:
    """Say what failed, what was not run, and what is left; the exit code."""
    by_state: dict[str, list[str]] = {state: [] for state in (PASSED, FAILED, NOT_RUN, UNFINISHED)}
    for name in chosen:
        for item, result in document["parts"][name]["items"].items():
            reasons = [*([result["reason"]] if "reason" in result else []), *reasons_of(result)]
            reasons = [" ".join(reason.split())[:400] for reason in reasons]
            by_state[result["state"]].append(": ".join([name, item, *(["; ".join(reasons)] if reasons else [])]))
    print(f"\n{len(by_state[PASSED])} items passed. {out / JSON}, {out / PAGE}, {out / LOG}")
    for state, title in ((NOT_RUN, "Not run"), (UNFINISHED, "Left for another call"), (FAILED, "FAILED")):
        if by_state[state]:
            print(f"{title}, {len(by_state[state])}:\n" + "\n".join(f"  {each}" for each in by_state[state]))
    if by_state[FAILED]:
        return 1
    return 3 if by_state[UNFINISHED] or any(state_of(document["parts"][name]) == UNFINISHED for name in chosen) else 0


def _write(out: Path, document: Mapping[str, Any]) -> None:
    """Both files, each whole or not at all."""
    for name, text in ((JSON, json.dumps(document, indent=1) + "\n"), (PAGE, render(document))):
        partial = out / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


def source_hash() -> str:
    """Of the package and of these checks: results of another state of the source are told apart."""
    found = hashlib.sha256()
    for folder in ("megatron_muon", "tools/gpu_check", "tools/bench"):
        for path in sorted((repository() / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _gpus() -> list[str]:
    """As the driver names them, by its own tool; torch's names are in the part ``rates``."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return []

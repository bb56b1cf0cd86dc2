"""``python -m megatron_muon doctor``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_muon.checkpoint import folders
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.commands import refusing, write_json
from megatron_muon.errors import ConfigError
from megatron_muon.monitor.doctor import comparison, report
from megatron_muon.monitor.doctor.run import read
from megatron_muon.monitor.doctor.words import ERROR


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: with code 1 if something of severity "error" is found; 2 after a message, for what cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_muon doctor",
        description="Say what is odd in a run, the gravest first, and what to do; of two runs also what differs.",
    )
    kinds = "file of --muon-log-jsonl, text of a run, or folder with metrics.jsonl, text (*.log, *.out) or checkpoints"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"{kinds}; one or two")
    for name, value, what in (("--checkpoint", "DIR", "checkpoints (--save)"), ("--log", "FILE", "text (stdout)")):
        told = f"{what}, if elsewhere than in the folder; of two runs: twice"
        parser.add_argument(name, action="append", default=[], type=Path, metavar=value, help=told)
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    args = parser.parse_args(argv)
    if max(len(args.runs), len(args.checkpoint)) > 2 or len(args.checkpoint) > len(args.runs):
        parser.error("one run or two, and a --checkpoint for each at most")
    with refusing("doctor", (OSError, ValueError, CheckpointError, ConfigError)):
        _doctor(args)


def _doctor(args: argparse.Namespace) -> None:
    runs, found = [], []
    for number, path in enumerate(args.runs):
        logs = args.log if len(args.runs) == 1 else args.log[number : number + 1]
        run = read(path, logs)
        given = args.checkpoint[number] if number < len(args.checkpoint) else None
        folder = given or next((each for each in (path, *sorted(path.glob("*/"))) if _has_checkpoints(each)), None)
        if folder is not None:
            run.checkpoint = _checkpoint(folder)
        runs.append(run)
        found.append(report.examine(run))
    differences = comparison.compare(*runs) if len(runs) == 2 else []
    if differences:
        print(f"{runs[0].name} against {runs[1].name}:", *(f"  {each}" for each in differences), "", sep="\n")
    print("\n\n".join(report.render(run, findings) for run, findings in zip(runs, found, strict=True)), flush=True)
    if args.json is not None:
        plain = [report.plain(run, findings) for run, findings in zip(runs, found, strict=True)]
        write_json(args.json, {"runs": plain, "differences": differences})
    if any(each.severity == ERROR for findings in found for each in findings):
        raise SystemExit(1)


def _has_checkpoints(folder: Path) -> bool:
    return folder.is_dir() and (folders.tracked(folder) is not None or any(folder.glob("iter_*")))


def _checkpoint(folder: Path) -> dict[str, Any]:
    """What is known of a run's checkpoints: which are whole, and how the newest was saved."""
    if not folder.is_dir():
        raise ConfigError(f"--checkpoint {folder}: no such folder. Give that of --save, or one iteration's.")
    one = folders.iteration_of(folder) is not None
    places = {folders.iteration_of(each): each for each in ([folder] if one else folders.entries(folder))}
    every = sorted(iteration for iteration in places if iteration is not None)
    if any(any(places[each].glob("mp_rank_*")) for each in every):
        return {"iterations": every}  # --ckpt-format torch, of which nothing more is read
    text = None if one else folders.interruption(folder)
    problems = [text] if text else []
    found: dict[str, Any] = {
        "iterations": [each for each in every if folders.is_whole(places[each])],
        "problems": problems,
    }
    try:
        found |= _contents(folders.resolve(folder))
    except CheckpointError as error:
        problems += [str(error)] * (not problems)
    return found


def _contents(folder: Path) -> dict[str, Any]:
    from megatron_muon import cpu

    cpu.install()
    from megatron_muon.checkpoint import inspection
    from megatron_muon.checkpoint.reading import read_index

    args = read_index(folder).stored.common.get("args")
    told = inspection.inspect(folder)
    flags = {"--" + name.replace("_", "-"): value for name, value in (vars(args) if args is not None else {}).items()}
    settings = {
        name: told[name] for name in ("optimizer", "package", "form", "layout", "world_size", "updates", "numbers")
    }
    rules = {f"{rule['weight']} rule": rule["rule"] for rule in told["rules"]}
    return {"iteration": told["iteration"], "flags": flags, "settings": settings | rules}

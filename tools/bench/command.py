"""The command: ``python -m tools.bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize import coefficient_types
from megatron_muon.orthogonalize.bfloat16 import slow_bfloat16
from tools.bench import document, text
from tools.bench.accuracy import WrongUpdateError
from tools.bench.cases import Case, cases_of_shapes, cases_of_widths, standard_cases
from tools.bench.launch import launch
from tools.bench.measure import Settings, measure
from tools.bench.memory import refuse_too_large
from tools.bench.model import case_of_model
from tools.bench.ranks import choose_device, joined
from tools.bench.rounds import Plan
from tools.bench.start import RanksError

__all__ = ["main"]

_DESCRIPTION = """\
Measure a step of this package's Muon against those of Megatron-Core (each of its modes), emerging-optimizers and torch,
and of AdamW, on the same random weights and gradients, in alternation: time, error against the exact update, memory,
bytes exchanged, and the share of the machine's rate of matrix products.

Without arguments: a dense model at tensor parallelism 1, 2 and 4, and small experts at expert parallelism 1 and 2, in
fp32 and, where processors have 16-bit units, bf16, in about ten minutes on two CPU cores. Ranks are started by the
command itself, on CPUs (gloo) or GPUs (NCCL); under torchrun its processes are the ranks.

  python -m tools.bench --model examples/models/llama3_8b.args --layers 2 --dtype bf16
  python -m tools.bench --shapes 4096x4096*8,14336x4096*4 --tp 2
"""


_LARGE = (256, 512)
"""The product that tells whether bfloat16 is fast."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Raises:
        SystemExit: with code 2 after a message for what cannot be measured, and with code 1 if an update is wrong or a
            rank fails.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    try:
        _bench(args, argv)
    except (ConfigError, WrongUpdateError, RanksError) as error:
        if _rank() == 0:
            print(f"bench: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model", metavar="FILE", help="Muon's weights of the first pipeline stage of a file of Megatron flags"
    )
    what.add_argument("--shapes", metavar="MxN[*COUNT],...", help="these matrices; --tp divides their longer side")
    what.add_argument(
        "--widths", nargs="+", type=int, metavar="W", help="W x W and 4W x W matrices, a case for each W; one process"
    )
    what.add_argument("--case", nargs="+", metavar="NAME", default=[], help="dense, experts; default: both")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel size; default: the cases' own, or 1")
    parser.add_argument("--ep", type=int, metavar="N", help="expert-parallel size; default: the cases' own, or 1")
    parser.add_argument("--layers", type=int, metavar="N", help="only so many layers of the model or the cases")
    parser.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: fp32, and bf16 where it is fast"
    )
    parser.add_argument(
        "--coefficients", nargs="+", metavar="SET", default=[], choices=coefficient_types(),
        help="measure ours with these sets too, beside quintic: " + ", ".join(coefficient_types()),
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, metavar="N", help="timed rounds; default: at least 7, about 15 s of each case"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on a rank; default: cores // ranks")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and 3 rounds: to see that all of it runs")
    return parser


def _bench(args: argparse.Namespace, argv: Sequence[str]) -> None:
    _check(args)
    cases = _cases(args)
    cases, left_out = _that_fit(cases, args)
    device = choose_device(args.device, max(case.ranks for case in cases))
    slow = slow_bfloat16(torch.device(device), *_LARGE)
    if args.dtype is None:
        args.dtype = ["fp32"] if slow else ["fp32", "bf16"]
        left_out += [f"left out: bf16: {slow}; --dtype bf16 measures it"] if slow else []
    elif slow and "bf16" in args.dtype and _rank() == 0:
        print(f"bench: --dtype bf16: {slow}: its steps take far longer.", file=sys.stderr, flush=True)
    for case in cases:
        refuse_too_large(case, args.dtype, torch.device(device), args.coefficients)
    begin = time.time()
    whole: dict[str, Any] = {
        "command": ["python", "-m", "tools.bench", *argv],
        "quick": args.quick,
        "machine": document.machine(device),
        "versions": document.versions(),
        "settings": document.settings(),
        "left_out": left_out,
        "complete": False,
        "cases": [],
    }

    def done(entry: dict[str, Any]) -> None:
        whole["cases"].append(entry)
        if _rank() == 0:
            print(f"\n{text.render_case(entry)}", flush=True)
            whole["took_seconds"], whole["load_after"] = time.time() - begin, document.load()
            _write(args.json, whole)

    if _rank() == 0:
        print("\n".join([text.heading(whole["machine"], whole["versions"]), *left_out]), flush=True)
    _measure(cases, _settings(args, device), device, done)
    if _rank() == 0:
        whole["complete"] = True
        _write(args.json, whole)
        print(f"\n{text.NOTES}", flush=True)


def _check(args: argparse.Namespace) -> None:
    """What argparse does not."""
    for name in ("tp", "ep", "layers", "steps", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give a whole number of at least 1.")
    if args.widths is not None and (min(args.widths) < 1 or args.tp or args.ep or args.layers):
        raise ConfigError("--widths: give whole numbers of at least 1, without --tp, --ep and --layers.")
    if args.shapes is not None and args.layers is not None:
        raise ConfigError(f"--layers {args.layers} with --shapes: these have no layers; leave one of the two out.")
    if args.json is not None and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        raise ConfigError(f"--json {args.json}: give a file in a folder that exists.")


def _cases(args: argparse.Namespace) -> list[Case]:
    if args.model is not None:
        return [case_of_model(args.model, args.tp, args.ep, args.layers)]
    if args.shapes is not None:
        return cases_of_shapes(args.shapes, args.tp, args.ep)
    if args.widths is not None:
        return cases_of_widths(args.widths)
    return standard_cases(args.case, args.tp, args.ep, args.layers, args.quick)


def _that_fit(cases: Sequence[Case], args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """The cases for which there are processes and GPUs, and a line on each of the others.

    Raises:
        ConfigError: if there are none for a layout that was asked for by its size, or for any.
    """
    started = int(os.environ["WORLD_SIZE"]) if _started_by_launcher() else None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and args.device != "cpu" else None
    kept, left_out = [], []
    for case in cases:
        if started is not None and case.ranks != started:
            reason = f"it takes {case.ranks} processes and the launcher has started {started}"
        elif gpus is not None and case.ranks > gpus:
            reason = f"it takes {case.ranks} GPUs and there are {gpus}; --device cpu measures it without"
        else:
            kept.append(case)
            continue
        left_out.append(f"left out: {case.label}: {reason}")
    explicit = args.tp is not None or args.ep is not None
    if not kept or (left_out and explicit):
        size = f"--tp {args.tp or 1} --ep {args.ep or 1}: " if explicit else ""
        raise ConfigError(f"{size}{left_out[0]}. Choose other sizes, or start as many processes.")
    return kept, left_out


def _settings(args: argparse.Namespace, device: str) -> Settings:
    dtypes = tuple(dict.fromkeys(args.dtype))
    if args.quick:
        return Settings(dtypes, Plan(args.steps or 3), 256, args.threads, 0.1, tuple(args.coefficients))
    size = 8192 if device == "cuda" else 2048
    return Settings(dtypes, Plan(args.steps), size, args.threads, coefficients=tuple(args.coefficients))


def _measure(cases: Sequence[Case], settings: Settings, device: str, done: Callable[[dict[str, Any]], None]) -> None:
    """Here, or on ranks of our own."""
    if _started_by_launcher():
        with joined(device, settings.threads) as world:
            measure(cases, settings, world, done)
        return
    for ranks, group in groupby(sorted(cases, key=lambda case: case.ranks), key=lambda case: case.ranks):
        if ranks == 1:
            with joined(device, settings.threads) as world:
                measure(list(group), settings, world, done)
        else:
            launch(ranks, list(group), settings, device, done)


def _started_by_launcher() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _write(path: str | None, content: object) -> None:
    """After each case, so that little is lost if a later one fails."""
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}. Give a file in a folder that exists.") from None

"""``python -m megatron_muon ckpt``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.commands import refusing, write_json
from megatron_muon.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: with code 2 after a message, for folders that cannot be used; 1 if ``inspect`` finds a problem, or
            ``diff`` a difference.
    """
    args = _parser().parse_args(argv)
    with refusing("ckpt", (CheckpointError, ConfigError)):
        from megatron_muon import cpu

        cpu.install()
        if any(str(value).startswith("msc:") for value in vars(args).values()):
            from megatron_muon.checkpoint import reading

            reading.enable_stores()
        args.command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_muon ckpt", description="Checkpoints of --ckpt-format torch_dist, without GPUs."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")

    inspect = add("inspect", "tell what a checkpoint has, who updates what, and whether it is sound")
    inspect.add_argument("folder", metavar="DIR", help="of a run (--save), or of one iteration")
    inspect.add_argument("--contents", action="store_true", help="also read all tensors and compare their sums")
    inspect.add_argument("--json", metavar="FILE", help="also write everything to this file")
    inspect.set_defaults(command=_inspect)
    convert = add(
        "convert", "write a checkpoint of Adam for Muon, of Muon for Adam, or for Megatron-Core without this package"
    )
    convert.add_argument("source", metavar="SRC", help="folder of a run or of one iteration; only read")
    convert.add_argument("target", metavar="DST", help="a new folder, for --load")
    convert.add_argument(
        "--to",
        choices=("muon", "adam", "megatron-muon", "megatron-adam"),
        required=True,
        help="the optimizer that goes on: with this package, or Megatron-Core's own without it",
    )
    convert.add_argument(
        "--workers", type=int, metavar="N", help="files that are written at once (default: cores, 8 at most)"
    )
    convert.add_argument(
        "--value",
        action="append",
        type=_value,
        default=[],
        metavar="NAME=NUMBER",
        help="an argument of the run that is to read it, where the checkpoint has another or none: "
        "expert_model_parallel_size, lr, min_lr, weight_decay...",
    )
    convert.set_defaults(command=_convert)
    diff = add("diff", "tell which weights and states of two checkpoints differ, and by how much")
    diff.add_argument("a", metavar="A", help="folder of a run or of one iteration")
    diff.add_argument("b", metavar="B", help="another, saved at any layout")
    diff.add_argument(
        "--tolerance", type=float, metavar="X", help="norm of a difference, by the greater of both (default: bits)"
    )
    diff.add_argument("--moments", action="store_true", help="compare Muon's momentum with Adam's first moment, too")
    diff.add_argument("--fast", action="store_true", help="do not read what both have saved with the same sum of bits")
    diff.add_argument("--json", metavar="FILE", help="also write everything to this file")
    diff.set_defaults(command=_diff)
    for command in (inspect, convert, diff):
        command.add_argument("--trust", action="store_true", help="read pickles in full, which may run code in them")
    return parser


def _value(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number) if set(number) & set(".en") else int(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: NAME=NUMBER is wanted") from None


def _inspect(args: argparse.Namespace) -> None:
    from megatron_muon.checkpoint import folders, inspection

    found = inspection.inspect(folders.resolve(args.folder), args.contents, args.trust)
    print(inspection.render(found))
    if args.json is not None:
        write_json(args.json, found)
    if found["problems"]:
        raise SystemExit(1)


def _diff(args: argparse.Namespace) -> None:
    from megatron_muon.checkpoint import comparison, folders
    from megatron_muon.checkpoint.reading import read_index

    a, b = (read_index(folders.resolve(folder), args.trust) for folder in (args.a, args.b))
    found = comparison.compare(a, b, tolerance=args.tolerance, moments=args.moments, fast=args.fast)
    print(comparison.render(found))
    if args.json is not None:
        write_json(args.json, found)
    if not found["same"]:
        raise SystemExit(1)


def _convert(args: argparse.Namespace) -> None:
    from megatron_muon.checkpoint import conversion, folders

    iteration = conversion.convert(
        folders.resolve(args.source),
        folders.path_of(args.target) if "://" in args.target else Path(args.target),
        args.to,
        values=dict(args.value),
        workers=args.workers,
        trust=args.trust,
    )
    optimizer = args.to.removeprefix("megatron-")
    print(f"{args.target}: iteration {iteration}; resume with --load {args.target} --optimizer {optimizer}")

"""``python -m megatron_muon plan``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from megatron_muon.commands import refusing, write_json
from megatron_muon.errors import ConfigError

_DESCRIPTION = """\
Tell, for the flags of a Megatron training run, what Muon will do and what it costs: which optimizer updates each
weight and as which matrices, parameters and optimizer state of each rank, the operations of Newton-Schulz, what
tensor-parallel ranks exchange, and the optimizer's share of a step.

Needs no GPU, and no memory for the model. ARGS are Megatron's flags; they override those of --model, a text
file of them as on a command line. The sources of this package have such files of six model families. Example:

  python -m megatron_muon plan --model llama3_8b.args --tensor-model-parallel-size 4
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: with code 2 after a message, for flags that cannot be trained with.
    """
    parser = _parser()
    args, flags = parser.parse_known_args(argv)
    if args.model is None and not flags:
        parser.error("give Megatron's flags (--num-layers 32 ...), or a text file of them: --model FILE")
    with refusing("plan"):
        _plan(args, flags)


def _plan(args: argparse.Namespace, flags: Sequence[str]) -> None:
    from megatron_muon import cpu, plugin
    from megatron_muon.planning import document, fitting, survey, text
    from megatron_muon.planning.accounts import GIB
    from megatron_muon.planning.flags import read_flags
    from megatron_muon.planning.rates import Rates

    if args.model is not None:
        file = read_flags(args.model)
        args = _with_options_of_file(args, file.plan_options)
        flags = [*file.flags, *flags]
    if args.activations_gb and args.memory_gb is None:
        raise ConfigError("--activations-gb tells what is left of --memory-gb: give that, too.")
    rates = None if args.device is None else Rates.of(args.device)
    cpu.install()
    plugin.install()
    make = functools.partial(survey.make_plan, world=args.world_size, tokens=args.tokens)
    plan = make(flags)
    durations = None if rates is None else document.Durations.of(plan, rates)
    print(text.render(plan, durations))
    found = None
    if args.memory_gb is not None:
        memory, activations = args.memory_gb * GIB, args.activations_gb * GIB
        found = fitting.fit(make, flags, plan, memory, activations, rates)
        print("", *fitting.render(found), sep="\n")
    if args.json is not None:
        content = {"model": args.model, "flags": list(flags), **document.to_document(plan, durations)}
        write_json(args.json, {**content, "fit": None if found is None else found.to_document()})


def _with_options_of_file(args: argparse.Namespace, options: Sequence[str]) -> argparse.Namespace:
    """What the file says about world size and tokens holds unless the command line says otherwise."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    _add_options(parser)
    own, unknown = parser.parse_known_args(options)
    if unknown:
        raise ConfigError(f"--model {args.model}: '# plan: {' '.join(unknown)}' holds no option of the plan.")
    for name, value in vars(own).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_muon plan",
        usage="%(prog)s [--model FILE] [--json FILE] [--device NAME] [--memory-gb N]\n"
        "       [--activations-gb N] [--world-size N] [--tokens N] [ARGS ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="FILE", help="file of Megatron flags, one or more a line")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument(
        "--device", metavar="NAME", help="also tell milliseconds of a step on a100, h100, h200 or b200 GPUs"
    )
    parser.add_argument(
        "--memory-gb",
        type=_gibibytes,
        metavar="N",
        help="also find the cheapest setting that fits N GiB a GPU: weights, gradients, optimizer and its step",
    )
    parser.add_argument(
        "--activations-gb",
        type=_gibibytes,
        default=0.0,
        metavar="N",
        help="with --memory-gb: GiB of activations, which are not counted otherwise",
    )
    _add_options(parser)
    return parser


def _gibibytes(text: str) -> float:
    """A number of GiB."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give a number of GiB, such as 79")
    return value


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Those that a file of flags may hold too, in lines that begin with ``# plan:``."""
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of ranks; default: that of the file, or the smallest that holds the model once",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens in a step; default: --global-batch-size x --seq-length"
    )

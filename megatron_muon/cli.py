"""``python -m megatron_muon``: the launcher and the tools around it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_muon import plugin
from megatron_muon.errors import ConfigError
from megatron_muon.leaving import LEAVING
from megatron_muon.plugin.telling import REFUSALS, tell
from megatron_muon.version import __version__

TOOLS = {
    "plot": "draw recorded runs: losses, and all that was measured of Muon's work",
    "plan": "tell from a run's flags, without GPUs, who updates what and what the optimizer costs",
    "doctor": "say what is odd in a run, or what differs between two, and what to do",
    "ckpt": "inspect, compare or convert checkpoints",
}
"""Commands beside ``run``, a file each in :mod:`megatron_muon.commands`."""

_RUN_DESCRIPTION = """\
Run a Megatron-LM pretraining script, unedited, with this package's optimizers in place.

SCRIPT is a Python file; everything after it goes to the script, such as Megatron's own flags and the --muon-* flags
(SCRIPT --help lists them). Start it under torchrun, as the script itself would be:

  torchrun --nproc-per-node 8 -m megatron_muon run pretrain_gpt.py --optimizer muon ...

A line in the script does the same on GPUs:  import megatron_muon; megatron_muon.install()
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command line.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in TOOLS:  # they parse their own arguments, and are imported only when used
        importlib.import_module(f"megatron_muon.commands.{argv[0]}").main(argv[1:])
        return
    args = _parser().parse_args(argv)
    args.command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_muon",
        description="Muon for Megatron-Core: --optimizer muon in pretraining scripts.",
        epilog="COMMAND --help tells more.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run",
        help="run a Megatron-LM pretraining script with --optimizer muon available, on GPUs or CPUs",
        description=_RUN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="cuda: GPUs and NCCL, as the script expects; cpu: the same script on CPU processes and gloo; auto "
        "(default): cuda if this machine has a GPU, else cpu",
    )
    run.add_argument("script", metavar="SCRIPT", help="the pretraining script")
    run.add_argument("script_args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    run.set_defaults(command=_run)
    for name, text in TOOLS.items():
        commands.add_parser(name, help=text)
    return parser


def _run(args: argparse.Namespace) -> None:
    script = Path(args.script)
    if not script.is_file():
        raise SystemExit(f"megatron_muon run: {script}: no such file. Give the path of a pretraining script.")
    # The script must see what it would see if Python had been started with it.
    sys.argv = [str(script), *args.script_args]
    _replace_working_directory(str(script.resolve().parent))
    try:
        on_cpu = _prepare(args.device)
        with _noting_the_end() if on_cpu else contextlib.nullcontext():
            runpy.run_path(str(script), run_name="__main__")
    except REFUSALS as error:
        tell(error)
        raise SystemExit(2) from None


@contextlib.contextmanager
def _noting_the_end() -> Iterator[None]:
    """What the status of the process will be, as Python would have it."""
    try:
        yield
    except SystemExit as exit_call:
        LEAVING.at(exit_call)
        raise
    except BaseException as error:
        refused = isinstance(error, REFUSALS)
        LEAVING.status = 2 if refused else 130 if isinstance(error, KeyboardInterrupt) else 1
        raise
    LEAVING.status = 0


def _replace_working_directory(folder: str) -> None:
    """Put the script's folder where ``python -m`` has put the working directory, as ``python SCRIPT`` does.

    Otherwise a checkout of Megatron-LM in the working directory would hide the installed megatron-core. This package,
    where it is not installed but lies there, comes last: processes that the script starts must find it.
    """
    if sys.path and Path(sys.path[0]).resolve() == Path.cwd():
        sys.path[0] = folder
    else:
        sys.path.insert(0, folder)
    own = str(Path(__file__).parents[1])
    if own not in sys.path:
        sys.path.append(own)


def _prepare(device: str) -> bool:
    """Choose the device and install the hooks, before the script imports Megatron; whether it is the CPU."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("--device cuda: torch finds no GPU on this machine. Use --device cpu, or auto.")
    on_cpu = device == "cpu" or (device == "auto" and not available)
    if on_cpu:
        from megatron_muon import cpu

        cpu.install()
    plugin.install()
    return on_cpu

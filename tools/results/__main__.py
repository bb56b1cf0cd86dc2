"""Do the experiments of ``docs/results``: trainings of small models on the CPU, a page, numbers and a picture of each.

    python -m tools.results [coordinates] [transfer] [moonlight] [sphere] [stiefel] [sets] [momentum_dtype]
                            [--out FOLDER] [--steps N]

Without a name, all of them. Each run is kept under ``--runs``, so that what was interrupted goes on where it was, and
a page is written again in a moment; ``--fresh`` makes the runs again. ``--quick`` tries everything in a minute with
sizes that show nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from tools.results.records import AlarmError, Context
from tools.results.report import write

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ("coordinates", "transfer", "moonlight", "sphere", "stiefel", "sets", "momentum_dtype")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.results",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}; all without one")
    parser.add_argument("--out", type=Path, help="folder for the pages (docs/results, or with --quick runs/quick)")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="folder for the records of runs")
    parser.add_argument("--steps", type=int, help="iterations of each training; by default the experiment's own")
    parser.add_argument("--seed", type=int, default=1234, help="of the weights and the order of the data")
    parser.add_argument("--seeds", type=int, default=1, help="repeat every run with so many seeds, and take the mean")
    parser.add_argument("--quick", action="store_true", help="try everything with sizes that show nothing")
    parser.add_argument(
        "--alarms",
        type=int,
        default=10,
        metavar="N",
        help="measure Muon's work in every N-th step; an alarm at the best rate of a sweep ends the command; 0: never",
    )
    parser.add_argument("--fresh", action="store_true", help="make runs again that were made before")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in EXPERIMENTS:
            parser.error(f"{name}: choose from {', '.join(EXPERIMENTS)}")
    for name in ("steps", "seeds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1 is needed")
    arguments.out = arguments.out or (Path("runs/quick") if arguments.quick else ROOT / "docs/results")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Do the experiments and write what came out; the exit status."""
    arguments = parse_arguments(argv)
    context = Context(
        arguments.runs,
        arguments.seeds,
        arguments.seed,
        arguments.steps,
        arguments.quick,
        arguments.fresh,
        1 if arguments.quick and arguments.alarms else arguments.alarms,
    )
    for name in arguments.names or EXPERIMENTS:
        begin = time.perf_counter()
        try:
            report = importlib.import_module(f"tools.results.{name}").run(context)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on with the run that was not finished", file=sys.stderr)
            return 130
        except AlarmError as error:
            print(error, file=sys.stderr)
            return 1
        write(report, context, arguments.out)
        print("\n".join(f"* {sentence}" for sentence in report.findings))
        print(f"wrote {arguments.out / name}.md, .json and .png; {time.perf_counter() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

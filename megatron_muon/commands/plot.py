"""``python -m megatron_muon plot``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_muon.monitor import metrics
from megatron_muon.monitor.plots import METRICS_FILE, find_runs, plot_losses, write_csv


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: with code 2 after a message, for folders without a run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_muon plot", description="Plot the losses of runs recorded with --muon-log-jsonl."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help=f"a file of JSON lines, a folder with {METRICS_FILE}, or a folder of such folders",
    )
    parser.add_argument("--out", type=Path, default=Path("losses.png"), help="picture to write (%(default)s)")
    parser.add_argument("--csv", type=Path, help="also write the curves as a table")
    parser.add_argument("--title", help="title of the picture")
    arguments = parser.parse_args(argv)
    try:
        runs = {name: metrics.read(path) for name, path in find_runs(arguments.runs).items()}
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    plot_losses(runs, arguments.out, arguments.title)
    print(f"wrote {arguments.out}")
    if arguments.csv:
        write_csv(runs, arguments.csv)
        print(f"wrote {arguments.csv}")

"""``python -m megatron_muon plot``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_muon.monitor import metrics, page
from megatron_muon.monitor.plots import METRICS_FILE, find_runs, plot_losses, plot_sheet, write_csv


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: with code 2 after a message, for folders without a run, and files that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_muon plot", description="Draw runs recorded with --muon-log-jsonl."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help=f"a file of JSON lines, a folder with {METRICS_FILE}, or a folder of such folders",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="picture to write (sheet.png or losses.png, by --kind)"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page for a browser, and a picture only with --out"
    )
    parser.add_argument(
        "--kind",
        choices=("losses", "sheet"),
        help="of the picture: the losses, or a sheet of all that was measured, which is the default for runs with"
        " --muon-log-interval",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the curves as a table")
    parser.add_argument("--title", help="title of the picture")
    arguments = parser.parse_args(argv)
    try:
        runs = {name: metrics.read(path) for name, path in find_runs(arguments.runs).items()}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.html:
        _write(parser, arguments.html, lambda path: page.write_page(runs, path, arguments.title))
    if arguments.out or not arguments.html:
        kind = arguments.kind or ("sheet" if any(run.muon for run in runs.values()) else "losses")
        draw = plot_sheet if kind == "sheet" else plot_losses
        _write(parser, arguments.out or Path(f"{kind}.png"), lambda path: draw(runs, path, arguments.title))
    if arguments.csv:
        _write(parser, arguments.csv, lambda path: write_csv(runs, path))


def _write(parser: argparse.ArgumentParser, path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:  # whose message names no file where the disk is full
        parser.error(f"{path}: {error.strerror or error}. Give a file in a folder where there is room for it.")
    except ValueError as error:  # a kind of picture that there is not
        parser.error(f"{path}: {error}")
    print(f"wrote {path}")

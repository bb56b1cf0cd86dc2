"""``python -m megatron_muon plot``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_muon.monitor import metrics, page
from megatron_muon.monitor.plots import METRICS_FILE, find_runs, plot_losses, plot_sheet, write_csv


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Raises:
        SystemExit: with code 2 after a message, for folders without a run.
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
    parser.add_argument("--out", type=Path, help="picture to write (sheet.png or losses.png, by --kind)")
    parser.add_argument(
        "--html", type=Path, help="write a page to look into with a browser, and a picture only for --out"
    )
    parser.add_argument(
        "--kind",
        choices=("losses", "sheet"),
        help="of the picture: the losses, or a sheet of all that was measured, which is the default for runs with"
        " --muon-log-interval",
    )
    parser.add_argument("--csv", type=Path, help="also write the curves as a table")
    parser.add_argument("--title", help="title of the picture")
    arguments = parser.parse_args(argv)
    try:
        runs = {name: metrics.read(path) for name, path in find_runs(arguments.runs).items()}
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if arguments.html:
        page.write_page(runs, arguments.html, arguments.title)
        print(f"wrote {arguments.html}")
    if arguments.out or not arguments.html:
        kind = arguments.kind or ("sheet" if any(run.muon for run in runs.values()) else "losses")
        out = arguments.out or Path(f"{kind}.png")
        (plot_sheet if kind == "sheet" else plot_losses)(runs, out, arguments.title)
        print(f"wrote {out}")
    if arguments.csv:
        write_csv(runs, arguments.csv)
        print(f"wrote {arguments.csv}")

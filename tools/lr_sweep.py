"""Find the learning rates of ``examples/demo.py``: short runs on a factor-two grid for each optimizer.

    python tools/lr_sweep.py [--steps 150] [--out runs/lr_sweep] [--report docs/results/lr_sweep.md]

A run differs from the demo's in its length and peak learning rate only; warm-up and cosine decay shrink with it. The
best is the lowest final validation loss. Where that is at the end of the grid, the grid grows until it is not. Runs are
resumed and not repeated, as in the demo. The report has the numbers and the command; beside it they are also in JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from prepare_data import PreparedData, prepare  # noqa: E402
from recipes import OPTIMIZERS, Settings, choose_device  # noqa: E402
from runner import RunFailedError, train  # noqa: E402

from megatron_muon.monitor import metrics, plots  # noqa: E402
from megatron_muon.monitor.metrics import summarize  # noqa: E402

GRIDS = {"muon": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3), "adam": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
MAX_GROWTH = 4  # values beyond the grid, before the sweep gives up


def final_loss(optimizer: str, settings: Settings, data: PreparedData, out: Path) -> float:
    """Final validation loss of one run; infinity if it is not finite."""
    folder = out / optimizer / f"lr-{settings.learning_rate:g}"
    train(optimizer, settings, data, folder, title=f"{optimizer} lr {settings.learning_rate:g}")
    loss = summarize(metrics.read(folder / plots.METRICS_FILE)).final_valid_loss
    return math.inf if loss is None else loss


def sweep(optimizer: str, base: Settings, data: PreparedData, out: Path) -> dict[float, float]:
    """Final validation loss by learning rate, in order; the best is inside the grid.

    Raises:
        RuntimeError: if the best value is still at an end after :data:`MAX_GROWTH` more runs.
    """
    losses: dict[float, float] = {}
    wanted = list(GRIDS[optimizer])
    for _ in range(MAX_GROWTH + 1):
        for rate in wanted:
            losses[rate] = final_loss(optimizer, replace(base, learning_rate=rate), data, out)
        best, low, high = min(losses, key=losses.__getitem__), min(losses), max(losses)
        if best not in (low, high):
            return dict(sorted(losses.items()))
        wanted = [low / 2 if best == low else high * 2]
    raise RuntimeError(
        f"{optimizer}: the best learning rate is beyond {best:g}, the end of the grid; give another grid"
    )


def report(results: dict[str, dict[float, float]], base: Settings) -> str:
    """The results as Markdown."""
    rates = sorted({rate for losses in results.values() for rate in losses})
    lines = [
        "# Learning rates of the example",
        "",
        f"Final validation loss (nats per token) of `examples/demo.py`'s model after {base.steps} steps at each peak",
        "learning rate, with the same data, initial weights and schedule (20 % warm-up, cosine to a tenth). The best",
        "of each row is bold and is the demo's default. Muon's matrices and the weights that Adam updates share it.",
        "",
        "    python tools/lr_sweep.py" + f" --steps {base.steps} --seed {base.seed}",
        "",
        "| | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for optimizer, losses in results.items():
        best = min(losses, key=losses.__getitem__)
        cells = [_cell(losses.get(rate), rate == best) for rate in rates]
        lines.append(f"| {optimizer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(loss: float | None, best: bool) -> str:
    if loss is None:
        return ""
    text = "diverged" if math.isinf(loss) else f"{loss:.4f}"
    return f"**{text}**" if best else text


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="iterations of each run")
    parser.add_argument("--seed", type=int, default=1234, help="of the weights and the order of the data")
    parser.add_argument("--out", type=Path, default=Path("runs/lr_sweep"), help="folder for the runs")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="folder for the datasets")
    parser.add_argument("--report", type=Path, default=ROOT / "docs/results/lr_sweep.md", help="file to write")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if there are any")
    parser.add_argument("--tp", type=int, help="tensor-parallel processes; two where two fit")
    arguments = parser.parse_args()
    try:
        device, tp = choose_device(arguments.device, arguments.tp)
    except ValueError as error:
        parser.error(str(error))
    base = Settings(arguments.steps, 0.0, arguments.seed, device, tp)
    data = prepare(arguments.data)
    try:
        results = {optimizer: sweep(optimizer, base, data, arguments.out) for optimizer in OPTIMIZERS}
    except (RunFailedError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    text = report(results, base)
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(text)
    content = {name: {f"{rate:g}": loss for rate, loss in losses.items()} for name, losses in results.items()}
    arguments.report.with_suffix(".json").write_text(
        json.dumps({"steps": base.steps, "seed": base.seed, "final_valid_loss": content}, indent=1) + "\n"
    )
    print("\n" + text + f"\nwrote {arguments.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

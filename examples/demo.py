"""Train a small model twice, with Muon and with Adam, and compare: what ``make train`` runs.

    python examples/demo.py [--model gpt] [--steps 150] [--out runs/demo] [--device auto]

The model (a GPT with RoPE, RMSNorm, SwiGLU, GQA) learns Jane Austen's novels on two tensor-parallel processes, on two
CPU cores or on GPUs. Both runs have the same initial weights, the same data in the same order and the same schedule;
their learning rates are the best of a sweep (``docs/results/lr_sweep.md``, ``tools/lr_sweep.py``). ``--model hybrid``
(``make train-hybrid``) has GatedDeltaNet layers with gated softmax attention between them; no sweep was made for it.

Interrupt it whenever you like: the same command goes on from the last checkpoint, and a finished run is not repeated.
A run with other settings starts afresh, and the old one is kept beside it. The results are a table, and in ``--out``
``summary.json``, ``curves.csv`` and ``losses.png``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from prepare_data import prepare
from recipes import LEARNING_RATES, MODELS, OPTIMIZERS, Settings, check_modules, choose_device
from runner import RunFailedError, train

from megatron_muon.monitor import metrics, plots
from megatron_muon.monitor.metrics import Summary, steps_to_reach, summarize


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table(summaries: Mapping[str, Summary], muon_steps: int | None) -> str:
    """The results, one column for each optimizer."""
    rows = [("", *summaries)]
    rows.append(("final train loss", *(_loss(s.final_train_loss) for s in summaries.values())))
    rows.append(("final validation loss", *(_loss(s.final_valid_loss) for s in summaries.values())))
    rows.append(("steps", *(str(s.steps) for s in summaries.values())))
    rows.append(("time per step", *(f"{1000 * s.seconds_per_step:.0f} ms" for s in summaries.values())))
    rows.append(("of it in the optimizer", *(f"{100 * s.optimizer_share:.0f} %" for s in summaries.values())))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    if {"muon", "adam"} <= summaries.keys():
        lines += ["", _verdict(muon_steps, summaries["adam"])]
    return "\n".join(lines)


def _verdict(muon_steps: int | None, adam: Summary) -> str:
    if muon_steps is None:
        return "Muon did not reach Adam's final validation loss."
    return (
        f"Muon passed Adam's final validation loss at step {muon_steps}, "
        f"{100 * muon_steps / adam.steps:.0f} % of Adam's {adam.steps} steps."
    )


def write_summary(
    path: Path, summaries: Mapping[str, Summary], muon_steps: int | None, settings: Mapping[str, Settings]
) -> None:
    """Write ``summary.json``, whole or not at all."""
    packages = ("torch", "megatron-core", "emerging-optimizers", "sentencepiece")
    content = {
        **{name: asdict(summary) for name, summary in summaries.items()},
        "muon_steps_to_adam_final": muon_steps,
        "settings": {name: asdict(value) for name, value in settings.items()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def compare(out: Path, settings: Mapping[str, Settings]) -> None:
    """Print the table and write the results of finished runs."""
    runs = {name: metrics.read(out / name / plots.METRICS_FILE) for name in settings}
    summaries = {name: summarize(run) for name, run in runs.items()}
    muon_steps = steps_to_reach(runs["muon"], runs["adam"]) if {"muon", "adam"} <= runs.keys() else None
    print("\n" + table(summaries, muon_steps) + "\n")
    write_summary(out / "summary.json", summaries, muon_steps, settings)
    plots.write_csv(runs, out / "curves.csv")
    model = MODELS[next(iter(settings.values())).model]
    plots.plot_losses(runs, out / "losses.png", f"{model.title} on Jane Austen's novels")
    print("wrote " + ", ".join(str(out / name) for name in ("summary.json", "curves.csv", "losses.png")))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="gpt", help="what to train")
    parser.add_argument("--steps", type=int, default=150, help="iterations of each run")
    parser.add_argument("--out", type=Path, help="folder for runs and results (runs/demo, or runs/hybrid)")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="folder for the datasets")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if there are any")
    parser.add_argument("--tp", type=int, help="tensor-parallel processes; two where two fit")
    parser.add_argument("--seed", type=int, default=1234, help="of the weights and the order of the data")
    parser.add_argument("--optimizers", default="muon,adam", help="which runs to do")
    for name, value in LEARNING_RATES.items():
        parser.add_argument(f"--lr-{name}", type=float, default=value, help=f"peak learning rate of {name}")
    parser.add_argument("--muon-flags", default="", help="further flags of Muon's run: '--muon-blockwise-period 5'")
    parser.add_argument("--fresh", action="store_true", help="delete earlier runs in the folder first")
    arguments = parser.parse_args()
    arguments.optimizers = arguments.optimizers.split(",")
    for name in arguments.optimizers:
        if name not in OPTIMIZERS:
            parser.error(f"--optimizers {name}: choose from {', '.join(OPTIMIZERS)}")
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1 is needed")
    try:
        arguments.device, arguments.tp = choose_device(arguments.device, arguments.tp)
        check_modules(arguments.model, arguments.device)
    except ValueError as error:
        parser.error(str(error))
    arguments.out = arguments.out or Path("runs") / MODELS[arguments.model].runs
    return arguments


def main() -> int:
    """Do the runs and compare them; the exit status."""
    arguments = parse_arguments()
    data = prepare(arguments.data)
    common = arguments.seed, arguments.device, arguments.tp, arguments.model, arguments.muon_flags
    base = Settings(arguments.steps, 0.0, *common)
    settings = {name: replace(base, learning_rate=getattr(arguments, f"lr_{name}")) for name in arguments.optimizers}
    try:
        for name, value in settings.items():
            if arguments.fresh:
                shutil.rmtree(arguments.out / name, ignore_errors=True)
            train(name, value, data, arguments.out / name, show_report=True)
    except RunFailedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    compare(arguments.out, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())

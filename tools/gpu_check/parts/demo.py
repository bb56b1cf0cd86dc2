"""The demo, trained with Muon and with Adam by the launcher and Megatron's own loop: what ``make train`` does."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

from megatron_muon.monitor import metrics, plots
from tools.gpu_check.report import Item, Report, Setting, environment, need, repository

STEPS = {"cuda": 150, "cpu": 6}


def items(setting: Setting) -> list[Item]:
    """See :mod:`tools.gpu_check.parts`."""
    return [Item("muon and adam", partial(_train, setting), 145.0)]


def _train(setting: Setting, report: Report) -> None:
    need("megatron.core", "megatron.training", "emerging_optimizers", "sentencepiece", "matplotlib", "psutil", "tqdm")
    out, steps = setting.folder / "demo", STEPS[setting.device]
    words = [sys.executable, str(repository() / "examples" / "demo.py"), "--device", setting.device]
    words += ["--steps", str(steps), "--out", str(out), "--data", str(setting.folder / "data")]
    words += ["--tp", "1"]  # several ranks are a part of their own
    ended = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=setting.folder)
    print(ended.stdout, ended.stderr, sep="\n", flush=True)
    tail = " | ".join((ended.stdout + ended.stderr).strip().splitlines()[-30:])
    report.check("it ends well", ended.returncode == 0, f"status {ended.returncode}: {tail[-3000:]}")
    if ended.returncode:
        return
    summary = json.loads((out / "summary.json").read_text())
    for name in ("muon", "adam"):
        found = summary[name]
        first = _first_loss(out / name)
        report.row(
            "demo",
            optimizer=name,
            steps=found["steps"],
            first_train_loss=first,
            final_train_loss=found["final_train_loss"],
            final_valid_loss=found["final_valid_loss"],
            ms_a_step=1e3 * found["seconds_per_step"],
            optimizer_share=found["optimizer_share"],
        )
        last = found["final_train_loss"]
        report.check(f"{name}'s loss falls", math.isfinite(last) and last < first, f"{first} to {last}")
    if setting.is_gpu:
        muon, adam = (summary[name]["final_valid_loss"] for name in ("muon", "adam"))
        report.check("Muon's validation loss is below Adam's", muon < adam, f"{muon}, {adam}")


def _first_loss(folder: Path) -> float:
    loss = metrics.read(folder / plots.METRICS_FILE).train[0].loss
    return math.nan if loss is None else loss

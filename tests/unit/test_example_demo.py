"""The driver behind ``make train`` and the learning-rate sweep; the runs themselves are replaced."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.monitor import metrics
from megatron_muon.monitor.metrics import Summary

pytest.importorskip("sentencepiece")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tools")]

import demo  # noqa: E402
import lr_sweep  # noqa: E402
import recipes  # noqa: E402
import runner  # noqa: E402
from prepare_data import PreparedData  # noqa: E402

SETTINGS = recipes.Settings(steps=4, learning_rate=1e-3, seed=1, device="cpu", tp=2)
DATA = PreparedData("train", "valid", "cache", "tokenizer.model", 1, 1)


def fake_command(script: str) -> Any:
    """Replaces the launcher by a Python script, which gets the run's folder."""
    return lambda optimizer, settings, data, folder: [sys.executable, "-c", script, str(folder)]


FINISHES = """
import json, pathlib, sys
train = {"kind": "train", "learning_rate": 1, "grad_norm": 1, "seconds": 1, "optimizer_seconds": 0.1}
with open(pathlib.Path(sys.argv[1]) / "metrics.jsonl", "w") as file:
    print(json.dumps({"kind": "start", "iteration": 0, "train_iters": 4}), file=file)
    for i in range(1, 5):
        print(json.dumps({**train, "iteration": i, "losses": {"lm loss": 5.0 / i}}), file=file)
    print(json.dumps({"kind": "valid", "set": "validation", "iteration": 4, "losses": {"lm loss": 1.5}}), file=file)
"""


def test_a_finished_run_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "command", fake_command(FINISHES))
    assert runner.train("adam", SETTINGS, DATA, tmp_path / "adam")
    assert metrics.read(tmp_path / "adam" / "metrics.jsonl").iteration == 4
    monkeypatch.setattr(runner, "command", fake_command("raise SystemExit('not again')"))
    assert not runner.train("adam", SETTINGS, DATA, tmp_path / "adam")
    assert "finished before" in capsys.readouterr().out


def test_the_table_of_who_updates_what_is_shown_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "other lines\nmegatron_muon 0.1\nweight  optimizer\n\nmore"
    says = f"import time; print({lines!r}, flush=True); time.sleep(0.7)"
    monkeypatch.setattr(runner, "command", fake_command(says + FINISHES))
    runner.train("muon", SETTINGS, DATA, tmp_path / "muon", show_report=True)
    runner.train("muon", SETTINGS, DATA, tmp_path / "quiet")
    assert capsys.readouterr().out.strip() == "megatron_muon 0.1\nweight  optimizer"


def test_other_settings_begin_afresh_and_keep_the_old_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "command", fake_command(FINISHES))
    runner.train("adam", SETTINGS, DATA, tmp_path / "adam")
    for rate in (2e-3, 3e-3):
        assert runner.train("adam", dataclasses.replace(SETTINGS, learning_rate=rate), DATA, tmp_path / "adam")
    assert "learning_rate 0.001 -> 0.002" in capsys.readouterr().out
    old = json.loads((tmp_path / "adam-old-1" / "run.json").read_text())
    assert old["settings"]["learning_rate"] == 1e-3
    assert (tmp_path / "adam-old-2").exists()


def test_a_failure_shows_the_error_and_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "print('noise\\n' * 100); raise RuntimeError('out of luck')"
    monkeypatch.setattr(runner, "command", fake_command(script))
    with pytest.raises(runner.RunFailedError) as failure:
        runner.train("muon", SETTINGS, DATA, tmp_path / "muon")
    text = str(failure.value)
    assert "RuntimeError: out of luck" in text
    assert "noise" not in text
    assert str(tmp_path / "muon" / "train.log") in text
    assert not (tmp_path / "muon" / "finished").exists()


def test_an_interrupt_ends_the_processes_and_lets_them_save(tmp_path: Path) -> None:
    """What Ctrl-C does to the driver reaches the training processes, not the launcher; the driver waits for them."""
    worker = f"""
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(tmp_path)!r}, "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(tmp_path)!r}, "started").touch()
time.sleep(60)
"""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    driver = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "examples")]!r}
import pathlib, recipes, runner
from prepare_data import PreparedData
runner.command = lambda *_: [sys.executable, "-c", {launcher!r}]
settings = recipes.Settings(4, 1e-3, 1, "cpu", 2)
data = PreparedData("train", "valid", "cache", "tokenizer.model", 1, 1)
try:
    runner.train("muon", settings, data, pathlib.Path({str(tmp_path / "muon")!r}))
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = subprocess.Popen([sys.executable, "-c", driver])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "muon" / "finished").exists()


def summary(loss: float) -> Summary:
    return Summary(300, loss + 0.01, loss, 0.5, 0.1, 0.2)


def test_results_are_a_table_and_a_file(tmp_path: Path) -> None:
    summaries = {"muon": summary(4.0), "adam": summary(4.25)}
    text = demo.table(summaries, 180)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "final validation loss 4.000 4.250" in rows
    assert "time per step 500 ms 500 ms" in rows
    assert "Muon passed Adam's final validation loss at step 180, 60 % of Adam's 300 steps." in text
    assert "did not reach" in demo.table(summaries, None)

    demo.write_summary(tmp_path / "summary.json", summaries, 180, {"muon": SETTINGS, "adam": SETTINGS})
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["muon_steps_to_adam_final"] == 180
    for name in ("muon", "adam"):
        assert content[name].keys() >= {"final_train_loss", "final_valid_loss", "steps", "seconds_per_step"}
    assert content["settings"]["muon"]["learning_rate"] == 1e-3
    assert os.listdir(tmp_path) == ["summary.json"]  # noqa: PTH208


def test_only_the_optimizer_differs_between_the_runs() -> None:
    muon, adam = (recipes.flags(name, SETTINGS, DATA) for name in ("muon", "adam"))
    start = muon.index("--optimizer")
    assert muon[:start] == adam[:start]
    assert muon[len(muon) - (len(adam) - start - 2) :] == adam[start + 2 :]


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_megatron_accepts_the_flags(optimizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = pytest.importorskip("megatron.training.arguments")
    import megatron_muon

    words = recipes.command(optimizer, SETTINGS, DATA, tmp_path)
    script = next(i for i, word in enumerate(words) if word.endswith("pretrain_gpt.py"))
    monkeypatch.setattr(sys, "argv", words[script:])
    installed = megatron_muon.is_installed()
    megatron_muon.install()
    try:
        args = arguments.parse_args()
    finally:
        if not installed:
            megatron_muon.uninstall()
    assert args.optimizer == optimizer
    assert (args.num_query_groups, args.normalization, args.swiglu) == (2, "RMSNorm", True)
    assert args.num_query_groups % SETTINGS.tp == 0
    assert args.tensor_model_parallel_size == 2


def test_any_number_of_steps_has_intervals_that_megatron_takes(tmp_path: Path) -> None:
    for steps in range(1, 32):
        words = recipes.command("muon", dataclasses.replace(SETTINGS, steps=steps), DATA, tmp_path)
        interval, kept = (int(words[words.index(f"--save-{name}") + 1]) for name in ("interval", "retain-interval"))
        assert kept % interval == 0 and kept >= steps


def test_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert recipes.choose_device("auto", None) == ("cpu", 2)
    with pytest.raises(ValueError, match=r"--device cuda.*--device cpu"):
        recipes.choose_device("cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert recipes.choose_device("auto", None) == ("cuda", 1)
    assert recipes.choose_device("cpu", None) == ("cpu", 2)
    with pytest.raises(ValueError, match=r"--tp 4.*1 GPUs"):
        recipes.choose_device("auto", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert recipes.choose_device("auto", None) == ("cuda", 2)


def test_sweep_grows_until_the_best_rate_is_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = []

    def final_loss(optimizer: str, settings: recipes.Settings, *_: Any) -> float:
        tried.append(settings.learning_rate)
        return abs(settings.learning_rate - 0.03)

    monkeypatch.setattr(lr_sweep, "final_loss", final_loss)
    losses = lr_sweep.sweep("adam", SETTINGS, DATA, tmp_path)
    assert list(losses) == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064]
    assert len(tried) == 8
    text = lr_sweep.report({"adam": losses}, SETTINGS)
    assert "| adam | 0.0295 | 0.0290 | 0.0280 | 0.0260 | 0.0220 | 0.0140 | **0.0020** | 0.0340 |" in text

    monkeypatch.setattr(lr_sweep, "final_loss", lambda optimizer, settings, *_: -settings.learning_rate)
    with pytest.raises(RuntimeError, match="beyond"):
        lr_sweep.sweep("adam", SETTINGS, DATA, tmp_path)


def test_the_demo_uses_the_recorded_sweep() -> None:
    recorded = json.loads((ROOT / "docs/results/lr_sweep.json").read_text())["final_valid_loss"]
    for optimizer, losses in recorded.items():
        assert float(min(losses, key=losses.__getitem__)) == recipes.LEARNING_RATES[optimizer]
        assert len(losses) >= 5


@pytest.mark.slow
def test_an_interrupted_demo_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Two real runs of a few steps on two CPU processes, one of them interrupted after its fifth step."""
    line = [sys.executable, str(ROOT / "examples" / "demo.py"), "--steps", "10", "--device", "cpu", "--tp", "2"]
    line += ["--data", str(tmp_path / "data"), "--optimizers", "muon"]
    subprocess.run([*line, "--out", str(tmp_path / "whole")], check=True, timeout=600)

    interrupted = subprocess.Popen([*line, "--out", str(tmp_path / "parts")])
    file = tmp_path / "parts" / "muon" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not file.exists() or metrics.read(file).iteration < 5:
        assert time.monotonic() < deadline
        assert interrupted.poll() is None
        time.sleep(0.1)
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(timeout=200) == 130
    subprocess.run([*line, "--out", str(tmp_path / "parts")], check=True, timeout=600)

    starts = [record for record in map(json.loads, file.read_text().splitlines()) if record["kind"] == "start"]
    assert len(starts) == 2
    assert starts[1]["iteration"] >= 5
    whole, parts = metrics.read(tmp_path / "whole" / "muon" / "metrics.jsonl"), metrics.read(file)
    assert [(p.iteration, p.loss) for p in parts.train] == [(p.iteration, p.loss) for p in whole.train]
    assert parts.valid == whole.valid
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["muon"]["steps"] == 10

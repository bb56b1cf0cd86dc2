"""Summary, table of numbers, picture and progress bar of recorded runs."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from megatron_muon.commands import plot
from megatron_muon.monitor import plots, progress
from megatron_muon.monitor.metrics import (
    WINDOW,
    Metrics,
    TrainPoint,
    rewrite_until,
    smoothed,
    steps_to_reach,
    summarize,
)
from tests.unit.test_monitor_metrics import START, train_line, valid_line, write


def point(iteration: int, loss: float | None, seconds: float = 0.5, after_start: bool = False) -> TrainPoint:
    return TrainPoint(iteration, loss, 1e-3, 1.0, seconds, seconds / 5, after_start)


def test_summary() -> None:
    losses = [10.0] * 5 + [4.0] * (WINDOW - 1) + [2.0]
    points = [point(i, loss, 50.0 if i <= 3 else 0.5, i <= 3) for i, loss in enumerate(losses, start=1)]
    result = summarize(Metrics(25, points, {10: 6.0, 25: 5.0}))
    assert result.steps == 25
    assert result.final_train_loss == pytest.approx((4.0 * (WINDOW - 1) + 2.0) / WINDOW)
    assert result.final_valid_loss == 5.0
    assert result.seconds_per_step == 0.5
    assert result.optimizer_share == pytest.approx(0.2)


def test_summary_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training iteration"):
        summarize(Metrics())


def test_smoothed_is_a_trailing_mean_without_losses_that_are_not_finite() -> None:
    run = Metrics(train=[point(1, 4.0), point(2, None), point(3, 2.0), point(4, 3.0)])
    assert smoothed(run, window=2) == [(1, 4.0), (3, 3.0), (4, 2.5)]


def test_steps_to_reach_counts_measured_validation_losses() -> None:
    adam = Metrics(valid={10: 6.0, 20: 5.0, 30: 4.0})
    assert steps_to_reach(Metrics(valid={10: 5.0, 20: 4.0, 30: 3.0}), adam) == 20  # equal is enough
    assert steps_to_reach(Metrics(valid={10: 5.0, 20: 4.01, 30: 3.0}), adam) == 30  # nothing is interpolated
    assert steps_to_reach(Metrics(valid={10: 5.0, 20: None, 30: 4.5}), adam) is None


def test_steps_to_reach_without_evaluations_takes_the_training_loss() -> None:
    adam = Metrics(train=[point(i, 5.0) for i in range(1, 101)])
    muon = Metrics(train=[point(i, 4.0 if i > 40 else 6.0) for i in range(1, 101)])
    assert steps_to_reach(muon, adam) == 40 + WINDOW // 2
    assert steps_to_reach(Metrics(train=[point(1, 1.0)]), adam) is None  # no whole window yet


@pytest.fixture
def runs_folder(tmp_path: Path) -> Path:
    for name, shift in (("muon", 0.0), ("adam", 0.5)):
        folder = tmp_path / "demo" / name
        folder.mkdir(parents=True)
        lines = [START]
        for i in range(1, 51):
            lines.append(train_line(i, 3 + 4 / i + shift))
            if i % 10 == 0:
                lines.append(valid_line(i, 3.1 + 4 / i + shift))
        write(folder / plots.METRICS_FILE, lines)
    return tmp_path / "demo"


def test_plot_command_writes_picture_and_table(runs_folder: Path, tmp_path: Path) -> None:
    picture, table = tmp_path / "out" / "losses.png", tmp_path / "out" / "curves.csv"
    plot.main([str(runs_folder), "--out", str(picture), "--csv", str(table)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in picture.parent.iterdir()) == ["curves.csv", "losses.png"]
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 100
    row = next(row for row in rows if row["run"] == "adam" and row["iteration"] == "20")
    assert float(row["train_loss"]) == pytest.approx(3.7, abs=1e-5)
    assert float(row["valid_loss"]) == pytest.approx(3.8, abs=1e-5)
    assert next(row for row in rows if row["iteration"] == "21")["valid_loss"] == ""


def test_plot_command_takes_files_and_folders_and_refuses_what_is_no_run(
    runs_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plots.find_runs([runs_folder / "adam", runs_folder / "muon" / plots.METRICS_FILE])
    assert list(found) == ["adam", "muon"]
    with pytest.raises(ValueError, match="two runs are called 'adam'"):
        plots.find_runs([runs_folder / "adam", runs_folder])
    with pytest.raises(SystemExit):
        plot.main([str(runs_folder.parent / "nowhere")])
    assert "no run here" in capsys.readouterr().err


def test_a_picture_without_a_single_finite_loss_is_still_written(tmp_path: Path) -> None:
    plots.plot_losses({"muon": Metrics(train=[point(1, None)])}, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 0


def test_progress_bar_follows_a_file_that_grows_and_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    path = tmp_path / "m.jsonl"
    with progress.ProgressBar(path, 10, "muon") as bar:
        bar.poll()
        write(path, [START, train_line(1, 7.25), train_line(2, 6.5)], end="\n" + train_line(3)[:10])
        bar.poll()
        assert "2/10" in screen.getvalue()
        assert "train=6.500" in screen.getvalue()
        rewrite_until(path, 1)
        with path.open("a") as file:
            file.write(train_line(2, 5.5) + "\n" + valid_line(2, 5.75) + "\n")
        bar.poll()
    assert "train=5.500, validation=5.750" in screen.getvalue()

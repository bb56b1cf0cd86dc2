"""The file of JSON lines: reading it, and cutting it when a run resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_muon.monitor import metrics


def train_line(iteration: int, loss: float | None = 5.0, seconds: float = 0.5) -> str:
    return json.dumps(
        {
            "kind": "train",
            "iteration": iteration,
            "losses": {"lm loss": loss},
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "seconds": seconds,
            "optimizer_seconds": 0.1,
        }
    )


def valid_line(iteration: int, loss: float, name: str = "validation") -> str:
    return json.dumps({"kind": "valid", "iteration": iteration, "set": name, "losses": {"lm loss": loss}})


START = json.dumps({"kind": "start", "iteration": 0, "train_iters": 10})


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_text("\n".join(lines) + end)
    return path


def test_read_keeps_curves_and_the_first_validation_set(tmp_path: Path) -> None:
    lines = [START, train_line(1, 7.0), train_line(2, None), valid_line(2, 6.5, "validation-a")]
    lines += [valid_line(2, 9.9, "validation-b"), valid_line(2, 8.8, "test"), valid_line(2, 6.4, "validation-a")]
    run = metrics.read(write(tmp_path / "m.jsonl", lines))
    assert run.train_iters == 10
    assert [(point.iteration, point.loss) for point in run.train] == [(1, 7.0), (2, None)]
    assert run.valid == {2: 6.4}
    assert run.iteration == 2


def test_first_points_of_each_start_are_marked(tmp_path: Path) -> None:
    again = json.dumps({"kind": "start", "iteration": 5, "train_iters": 10})
    lines = [START, *map(train_line, range(1, 6)), again, *map(train_line, range(6, 11))]
    run = metrics.read(write(tmp_path / "m.jsonl", lines))
    assert [point.iteration for point in run.train if point.after_start] == [1, 2, 3, 6, 7, 8]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_last_line_that_is_cut_off_is_left_out(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "m.jsonl", [START, train_line(1), train_line(2)])
    path.write_text(path.read_text()[:-cut])
    assert metrics.read(path).iteration == 1


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [START, '{"kind": "tra', train_line(2)])
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not a record"):
        metrics.read(path)


def test_rewrite_until_removes_what_will_be_done_again(tmp_path: Path) -> None:
    lines = [START, *map(train_line, range(1, 9)), valid_line(4, 5.0), valid_line(8, 4.0)]
    path = write(tmp_path / "m.jsonl", lines, end="\n" + train_line(9)[:20])
    metrics.rewrite_until(path, 4)
    run = metrics.read(path)
    assert [point.iteration for point in run.train] == [1, 2, 3, 4]
    assert run.valid == {4: 5.0}
    assert path.read_text().endswith("\n")
    assert list(tmp_path.iterdir()) == [path]


def test_rewrite_until_without_a_file_does_nothing(tmp_path: Path) -> None:
    metrics.rewrite_until(tmp_path / "m.jsonl", 4)
    assert not list(tmp_path.iterdir())

"""What the hooks write, with stand-ins for the functions of Megatron that they are put around."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon.monitor import metrics
from megatron_muon.plugin import recording


class IntervalTimer:
    """Megatron's interval timer, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        value = self.now
        if reset:
            self.now = 0.0
        return value


class Training:
    """As much of Megatron's training loop as the hooks see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, **args: Any) -> None:
        self.args = SimpleNamespace(
            muon_log_jsonl=str(path), iteration=0, train_iters=8, world_size=1, log_interval=1,
            consumed_train_samples=0, multiple_validation_sets=False, validation_set_names=None,
        )  # fmt: skip
        vars(self.args).update(args)
        self.interval = IntervalTimer()
        module = ModuleType("megatron.training.global_vars")
        module.get_args = lambda: self.args  # type: ignore[attr-defined]
        module.get_timers = lambda: lambda name: self.interval  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
        hooks = {patch.path: patch.make for patch in recording.PATCHES}
        self.log = hooks["training_log"](self._training_log)
        self.evaluate = hooks["evaluate"](self._evaluate)
        self.evaluate_and_print = hooks["evaluate_and_print_results"](self._evaluate_and_print_results)
        self.timer = hooks["Timers.__call__"](lambda timers, name: SimpleNamespace(start=_nothing, stop=_nothing))
        self.run: Callable[[Callable[[], None]], Any] = hooks["train"](lambda body: body())

    def _training_log(
        self,
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        skipped_iter: int,
        grad_norm: Any,
        is_first_iteration: bool = False,
    ) -> str:
        if iteration % self.args.log_interval == 0 or is_first_iteration:
            self.interval.elapsed(reset=not is_first_iteration)
        return "reported"

    def _evaluate(self, loss: float) -> tuple[dict[str, torch.Tensor], None, bool]:
        return {"lm loss": torch.tensor(loss)}, None, False

    def _evaluate_and_print_results(self, prefix: str, iteration: int, losses: list[float]) -> None:
        for loss in losses:
            self.evaluate(loss)

    def step(self, iteration: int, loss: float, seconds: float = 1.0, skipped: int = 0, first: bool = False) -> None:
        timer = self.timer(None, "optimizer")
        timer.start(barrier=False)
        self.timer(None, "optimizer").stop()
        self.interval.now += seconds
        losses = {"lm loss": torch.tensor(loss)}
        assert self.log(losses, {}, 1e-3, iteration, skipped, 2.0, is_first_iteration=first) == "reported"


def _nothing(**_: Any) -> None: ...


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, path.read_text().splitlines()) if record["kind"] == kind]


def test_each_iteration_has_its_own_loss_and_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Megatron's first log line does not restart its sums: its second is an average of two iterations."""
    training = Training(monkeypatch, tmp_path / "run" / "m.jsonl")

    def body() -> None:
        training.step(1, 7.0, seconds=9.0, first=True)
        training.step(2, 6.0, seconds=2.0)
        training.step(3, 5.0, seconds=1.5)

    training.run(body)
    records = lines(tmp_path / "run" / "m.jsonl", "train")
    assert [record["losses"]["lm loss"] for record in records] == [7.0, 6.0, 5.0]
    assert [record["seconds"] for record in records] == pytest.approx([9.0, 2.0, 1.5])
    assert all(0 < record["optimizer_seconds"] < 0.1 for record in records)


def test_averages_over_the_log_interval_without_skipped_iterations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "m.jsonl"
    training = Training(monkeypatch, path, log_interval=4)

    def body() -> None:
        training.step(1, 8.0, first=True)
        training.step(2, float("nan"), skipped=1)
        training.step(3, 6.0)
        training.step(4, 4.0)

    training.run(body)
    first, second = lines(path, "train")
    assert (first["iteration"], first["iterations"], first["losses"]) == (1, 1, {"lm loss": 8.0})
    assert (second["iteration"], second["iterations"], second["skipped"]) == (4, 3, 1)
    assert second["losses"] == {"lm loss": 5.0}
    assert second["seconds"] == pytest.approx(1.0)


def test_resume_goes_on_from_the_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = Training(monkeypatch, path)
    first.run(lambda: [first.step(i, 7.0, first=i == 1) for i in range(1, 7)])
    with path.open("a") as file:
        file.write('{"kind": "train", "iter')
    second = Training(monkeypatch, path, iteration=4)
    second.run(lambda: [second.step(i, 3.0, first=i == 5) for i in range(5, 9)])
    run = metrics.read(path)
    assert [(point.iteration, point.loss) for point in run.train] == [
        (1, 7.0), (2, 7.0), (3, 7.0), (4, 7.0), (5, 3.0), (6, 3.0), (7, 3.0), (8, 3.0),
    ]  # fmt: skip
    assert [record["iteration"] for record in lines(path, "start")] == [0, 4]


def test_a_record_that_cannot_be_written_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank writes, and the others are in the next iteration: it goes on, and says so once."""
    path = tmp_path / "m.jsonl"
    training = Training(monkeypatch, path)

    def body() -> None:
        training.step(1, 8.0, first=True)
        path.unlink()
        path.symlink_to("/dev/full")  # writing to it fails as on a full disk
        training.step(2, 7.0)
        training.step(3, 6.0)

    training.run(body)
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "No space left on device; nothing more is recorded" in said


def test_evaluations_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    training = Training(monkeypatch, path)
    training.run(lambda: None)
    training.evaluate_and_print("iteration 4", 4, [6.0])
    training.evaluate_and_print("iteration 8 on test set", 8, [5.0])
    training.args.multiple_validation_sets = True
    training.args.validation_set_names = ["news", "code"]
    training.evaluate_and_print("iteration 8 on validation set", 8, [4.0, 3.0])
    found = [(r["iteration"], r["set"], r["losses"]["lm loss"]) for r in lines(path, "valid")]
    assert found == [(4, "validation", 6.0), (8, "test", 5.0), (8, "validation-news", 4.0), (8, "validation-code", 3.0)]


def test_values_that_json_lacks_become_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    training = Training(monkeypatch, path)
    training.run(lambda: training.step(1, float("inf"), first=True))
    assert "Infinity" not in path.read_text()
    assert metrics.read(path).train[0].loss is None


@pytest.mark.parametrize(("flag", "rank"), [("", 0), ("m.jsonl", 1)])
def test_nothing_is_written_without_the_flag_or_on_other_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str, rank: int
) -> None:
    monkeypatch.chdir(tmp_path)
    training = Training(monkeypatch, tmp_path / "m.jsonl", muon_log_jsonl=flag)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: rank + 1)
    training.run(lambda: training.step(1, 7.0, first=True))
    training.evaluate_and_print("iteration 1", 1, [6.0])
    assert not list(tmp_path.iterdir())


def test_every_hook_names_something_that_megatron_has() -> None:
    pytest.importorskip("megatron.training.training")
    for patch in recording.PATCHES:
        owner: Any = sys.modules[patch.module]
        for name in patch.path.split("."):
            owner = getattr(owner, name)
        assert callable(patch.make(owner))

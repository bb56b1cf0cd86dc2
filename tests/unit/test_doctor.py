"""What the doctor says of prepared records, word for word; what else is odd; and what cannot be read.

The words of the prepared records lie in ``tests/unit/doctor``; ``python -m tests.unit.test_doctor`` writes them anew.
Records are made here by a seeded function, but for two that runs of version 0.1.0 have written, before it measured
anything: ``examples/pretrain_gpt.py`` with the flags of ``tests/launch.py``, once resumed at iteration 60 (``old``),
once killed with signal 9 (``killed``); with the lines of their text that count.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_muon.commands import doctor
from megatron_muon.monitor.alarms import ALARMS
from megatron_muon.monitor.doctor import losses
from megatron_muon.monitor.doctor.report import examine
from megatron_muon.monitor.doctor.run import read
from megatron_muon.monitor.doctor.words import WORDS
from megatron_muon.monitor.plots import METRICS_FILE

GOLDEN = Path(__file__).parent / "doctor"
HOURS = 2 * 3600

Lines = list[dict[str, Any]]
Change = Callable[[Lines], object]

CLASSES = {
    "decoder.layers.*.self_attention.linear_qkv.weight[q]": 24,
    "decoder.layers.*.mlp.linear_fc2.weight": 24,
    "decoder.layers.*.mlp.experts.linear_fc1.weight*[gate]": 192,
}
VERSIONS = {"megatron-muon": "0.1.0", "megatron-core": "0.19.2", "torch": "2.15.0", "emerging-optimizers": "0.3.0"}


def healthy(seed: int = 0) -> Lines:
    """A run of 400 iterations on 16 ranks, measured in every tenth."""
    noise = random.Random(seed)
    flags = {"--muon-log-interval": 10, "--clip-grad": 1.0, "--lr": 0.02}
    routes = {name.partition("[")[0]: "muon: whole" for name in CLASSES} | {"output_layer.weight": "adam: output layer"}
    start = {"train_iters": 400, "world_size": 16, "device": "cuda", "flags": flags, "versions": {**VERSIONS}}
    lines: Lines = [{"kind": "start", "iteration": 0, **start, "routes": routes}]
    for iteration in range(1, 401):
        rate = 0.02 * min(iteration / 40, 0.55 + 0.45 * math.cos(math.pi * iteration / 400))
        loss = 3.0 + 8.0 / (1 + iteration / 20) + noise.gauss(0, 0.02)
        lines.append(
            {"kind": "train", "iteration": iteration, "iterations": 1, "losses": {"lm loss": loss}, "skipped": 0}
            | {"seconds": 2.0 * noise.uniform(0.98, 1.02), "optimizer_seconds": 0.1, "learning_rate": rate}
            | {"grad_norm": 0.4 * noise.uniform(0.8, 1.2), "peak_memory_bytes": 60 << 30, "max_attention_logit": 12.0}
        )
        if iteration % 10 == 0:
            lines.append({"kind": "muon", "iteration": iteration, **measured(rate)})
        if iteration % 100 == 0:
            lines.append(
                {"kind": "valid", "iteration": iteration, "set": "validation", "losses": {"lm loss": loss + 0.1}}
            )
    return lines


def measured(rate: float) -> dict[str, Any]:
    numbers = {"gradient_norm": 0.1, "zero_gradient": 0.0, "at_bound": 0.0, "nonfinite": 0.0, "stable_rank": 40.0}
    numbers |= {"unlifted": 0.02, "defect": 0.08, "update_ratio": rate / 10, "cosine": 0.6, "spectral_norm": 5.0}
    times = {
        "step": 0.09,
        "products": 0.06,
        "exchange": 0.01,
        "waiting": 0.005,
        "chunks": 6,
        "bytes": 3e8,
        "collectives": 12,
    }
    return {
        "classes": {
            name: {"matrices": count} | {stat: [value, value, value] for stat, value in numbers.items()}
            for name, count in CLASSES.items()
        },
        "times": {name: [value, value, value] for name, value in times.items()},
        "rates": {"lr": rate, "weight_decay": 0.1},
    }


def each(lines: Lines, kind: str, since: int = 0) -> Lines:
    return [line for line in lines if line["kind"] == kind and line["iteration"] > since]


def set_train(name: str, value: Callable[[float], Any], since: int = 0) -> Change:
    """A number of the logged iterations, of 0 to 1 from ``since`` to the end."""

    def change(lines: Lines) -> None:
        for line in each(lines, "train", since):
            new = value((line["iteration"] - since) / (400 - since))
            line[name] = {"lm loss": new} if name == "losses" else new

    return change


def set_stat(name: str, value: Callable[[float], float | None], word: str = "", since: int = 0) -> Change:
    """A number of the classes with this word in their names, likewise."""

    def change(lines: Lines) -> None:
        for line in each(lines, "muon", since):
            for key, numbers in line["classes"].items():
                if word in key:
                    numbers[name] = [value((line["iteration"] - since) / (400 - since))] * 3

    return change


def set_times(**times: list[float]) -> Change:
    return lambda lines: [line["times"].update(times) for line in each(lines, "muon")]


def resumed(at: int, **start: Any) -> Change:
    """Another process from an iteration on."""

    def change(lines: Lines) -> None:
        place = next(number for number, line in enumerate(lines) if line["iteration"] > at)
        lines.insert(place, {**lines[0], "iteration": at, **start})

    return change


def ending(at: int) -> Change:
    def change(lines: Lines) -> None:
        lines[:] = [line for line in lines if line["iteration"] <= at]

    return change


def alarm(name: str, iteration: int, since: int, text: str, **more: Any) -> Change:
    line = {"kind": "alarm", "iteration": iteration, "since": since, "alarm": name, "text": text, **more}
    return lambda lines: lines.insert(next(n for n, x in enumerate(lines) if x["iteration"] > iteration), line)


OTHER = {"--muon-log-interval": 10, "--clip-grad": 1.0, "--lr": 0.01, "--muon-num-ns-steps": 4}


def as_told(
    name: str, iteration: int, since: int, classes: str, weights: list[str], value: float, limit: float
) -> Change:
    """An alarm in the words of runs."""
    kind = ALARMS[name]
    text = f"{name}: {classes}: {kind.meaning}: {value:.3g} (limit {limit:.3g}), since iteration {since}. "
    text += f"Usual cause: {kind.cause}. To try: {kind.remedy.format(glob='decoder.layers.*.mlp.linear_fc2.weight')}."
    return alarm(name, iteration, since, text, weights=weights[:4], count=len(weights), value=value, limit=limit)


EXPERTS = [f"decoder.layers.3.mlp.experts.linear_fc1.weight{number}[gate]" for number in range(32)]
DEAD = as_told(
    "dead_experts", 330, 300, "32 of decoder.layers.*.mlp.experts.linear_fc1.weight*[gate]", EXPERTS, 1.0, 0.5
)

COLLAPSED = [f"decoder.layers.{number}.mlp.linear_fc2.weight" for number in range(24)]
COLLAPSE = as_told("rank_collapse", 395, 370, "24 of decoder.layers.*.mlp.linear_fc2.weight", COLLAPSED, 0.95, 0.75)

RECORDS: dict[str, list[Change]] = {
    "healthy": [],
    "diverged": [
        set_train("losses", lambda t: 3.5 + 4 * t, since=300),
        set_train("grad_norm", lambda t: 0.5 + 9 * t, since=295),
        set_train("max_attention_logit", lambda t: 40 + 400 * t, since=200),
    ],
    "not_finite": [
        set_train("losses", lambda t: None, since=350), set_train("grad_norm", lambda t: 8.0 + t, since=349),
        set_train("skipped", lambda t: 1, since=380), set_stat("nonfinite", lambda t: 1.0, "fc2", since=350),
    ],
    "dead_experts": [set_stat("zero_gradient", lambda t: t / 6, "experts", since=300), DEAD],
    "logits": [set_train("max_attention_logit", lambda t: 10 * math.exp(3 * t))],
    "resumed": [resumed(200, flags=OTHER, world_size=8, versions={**VERSIONS, "torch": "2.5.1"}),
                set_train("learning_rate", lambda t: 0.01, since=200)],
    "waiting": [set_times(waiting=[0.001, 0.03, 0.05], products=[0.02, 0.04, 0.09])],
    "rank_collapse": [
        set_stat("stable_rank", lambda t: 40 * math.exp(-4 * t), "fc2"),
        set_stat("unlifted", lambda t: 0.02 + 0.97 * t, "fc2"), set_stat("defect", lambda t: 0.08 + 0.8 * t, "fc2"),
        COLLAPSE,
    ],
}  # fmt: skip
"""Name of a record -> what is odd in it."""


REAL = ("old", "killed")


def made(*changes: Change, seed: int = 0) -> Lines:
    lines = healthy(seed)
    for change in changes:
        change(lines)
    return lines


def write(folder: Path, lines: Lines, end: str = "") -> Path:
    """As a run that nobody has written to for two hours."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / METRICS_FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    os.utime(path, (time.time() - HOURS, time.time() - HOURS))
    return folder


def said(*arguments: object) -> tuple[str, int]:
    """The text of the command, and its status."""
    output, status = io.StringIO(), 0
    with contextlib.redirect_stdout(output):
        try:
            doctor.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    return output.getvalue(), status


def words_of(name: str, folder: Path) -> str:
    """Text and status, as they are kept."""
    if name in REAL:
        runs = [Path(shutil.copytree(GOLDEN / name, folder / name))]
        for file in runs[0].iterdir():
            os.utime(file, (time.time() - HOURS, time.time() - HOURS))
    elif name == "pair":
        changes = [set_train("losses", lambda t: 3.37 + 0.1 * t, since=301), DEAD, resumed(300, flags=OTHER)]
        runs = [write(folder / "first", made()), write(folder / "second", made(*changes))]
    else:
        runs = [write(folder / name, made(*RECORDS[name]))]
    text, status = said(*runs)
    return f"{text}exit status {status}\n"


@pytest.mark.parametrize("name", [*RECORDS, *REAL, "pair"])
def test_words_of_prepared_records(name: str, tmp_path: Path) -> None:
    assert words_of(name, tmp_path) == (GOLDEN / f"{name}.txt").read_text()


def stepping(rate: float) -> Change:
    """--weight-decay doubles halfway."""
    return lambda lines: [line["rates"].update(weight_decay=rate) for line in each(lines, "muon", 200)]


def spiking(lines: Lines) -> None:
    each(lines, "train")[250]["losses"]["lm loss"] += 2.0
    each(lines, "train")[249]["grad_norm"] = 3.0


# Finding -> what is odd in a record that is else healthy; only this is found in it, and what is named beside.
SICK: dict[str, tuple[Change, ...]] = {
    "flat": (set_train("losses", lambda t: 3.0),),
    "spikes": (spiking,),
    "skipped": (lambda lines: each(lines, "train")[100].update(skipped=1),),
    "many skipped": (set_train("skipped", lambda t: 1, since=370),),
    "gradients grow": (set_train("grad_norm", lambda t: 0.1 + t * 0.8),),
    "clipped": (set_train("grad_norm", lambda t: 1.5),),
    "jump": (stepping(0.2),),
    "no evaluation": (lambda lines: [lines.remove(line) for line in each(lines, "valid")],),
    "overfitting": (lambda lines: each(lines, "valid")[-1]["losses"].update({"lm loss": 4.0}),),
    "nonfinite matrices": (set_stat("nonfinite", lambda t: 1.0, "fc2", since=350),),
    "zero gradients": (set_stat("zero_gradient", lambda t: 1.0, "fc2", since=350),),
    "large updates": (set_stat("update_ratio", lambda t: 0.5 * t, "fc2"),),
    "tiny updates": (set_stat("update_ratio", lambda t: 1e-9, "fc2", since=100),),
    "back and forth": (set_stat("cosine", lambda t: 0.5 - t, "fc2"),),
    "weights grow": (set_stat("spectral_norm", lambda t: 5 + 60 * t, "fc2"),),
    "at bound": (set_stat("at_bound", lambda t: 0.5, "fc2", since=200),),
    "nothing measured": (lambda lines: [lines.remove(line) for line in each(lines, "muon")],),
    "unmeasured": (lambda lines: [line["classes"].popitem() for line in each(lines, "muon")],),
    "slower": (set_train("seconds", lambda t: 2 + t),),
    "slow lines": (lambda lines: [line.update(seconds=5.0) for line in each(lines, "train")[::10]],),
    "share": (set_train("optimizer_seconds", lambda t: 1.0),),
    "uneven": (set_times(products=[0.01, 0.04, 0.08]),),
    "exchange": (set_times(exchange=[0.03, 0.04, 0.05]),),
    "one chunk": (set_times(exchange=[0.03, 0.04, 0.05], chunks=[1, 1, 1]),),
    "memory": (set_train("peak_memory_bytes", lambda t: (50 + 20 * t) * 2**30),),
    "gaps": (lambda lines: [lines.remove(line) for line in each(lines, "train")[100:150]],),
    "version": (lambda lines: lines[0]["versions"].update(apex="0.9.10"),),
    "ended": (ending(300),),
    "left": (lambda lines: lines[0]["flags"].update({"--exit-interval": 100}), ending(300)),
}


def found(folder: Path) -> set[str]:
    return {finding.name for finding in examine(read(folder))}


@pytest.mark.parametrize("name", SICK)
def test_each_sickness_is_found_and_nothing_else(name: str, tmp_path: Path) -> None:
    assert found(write(tmp_path, made(*SICK[name]))) == {name}


def test_weights_grow_from_their_initial_sizes_in_a_short_run(tmp_path: Path) -> None:
    def rarely(lines: list[dict[str, Any]]) -> None:
        for line in each(lines, "muon")[::2]:
            lines.remove(line)

    assert found(write(tmp_path, made(*SICK["weights grow"], rarely))) == set()


def test_whoever_reads_may_stop(tmp_path: Path) -> None:
    folder = write(tmp_path, made())
    words = [sys.executable, "-m", "megatron_muon", "doctor", str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_every_finding_is_of_a_record_here() -> None:
    golden = "".join(path.read_text() for path in GOLDEN.glob("*.txt"))
    elsewhere = {"risen", "precision", "damage", "warnings", "checkpoint", "other flags", "beyond"}
    told = {name for name, words in WORDS.items() if words[1].partition("{")[0] in golden}
    assert WORDS.keys() == told | SICK.keys() | elsewhere


def test_few_losses_are_compared_with_the_first() -> None:
    def told(*values: float) -> list[str]:
        run: Any = SimpleNamespace(losses=list(enumerate(values)))
        return [each.title for each in losses._course(run)]

    assert told(6.2, 17.0, 72.0, 89.0, 41.0, 9.0) == ["the loss is higher than it was at first"]
    assert told(6.2, 17.0, 72.0, 9.0, 6.0) == told(6.2, 9.0, 9.0) == told() == []


@pytest.mark.parametrize("seed", range(5))
def test_healthy_runs_have_nothing_odd(seed: int, tmp_path: Path) -> None:
    assert found(write(tmp_path, made(seed=seed))) == set()


def test_ratios_that_rise_with_the_rate_are_not_odd(tmp_path: Path) -> None:
    """As in a long warm-up."""
    lines = made(set_stat("update_ratio", lambda t: 0.2 * t))
    for line in each(lines, "muon"):
        line["rates"]["lr"] = line["iteration"] / 400
    assert found(write(tmp_path, lines)) == set()


def rarely(interval: int) -> Change:
    """With --log-interval."""

    def change(lines: Lines) -> None:
        lines[:] = [line for line in lines if line["kind"] != "train" or line["iteration"] % interval == 0]
        for line in each(lines, "train"):
            line["iterations"] = interval

    return change


@pytest.mark.parametrize("interval", [7, 30])
def test_a_run_whose_last_iterations_fill_no_line_has_finished(interval: int, tmp_path: Path) -> None:
    folder = write(tmp_path, made(rarely(interval)))
    assert read(folder).state == "finished" and found(folder) == set()
    assert found(write(tmp_path, made(rarely(interval), ending(350)))) == {"ended"}


@pytest.mark.parametrize("interval", [1, 4, 20])
def test_the_steep_end_of_wsd_is_no_jump(interval: int, tmp_path: Path) -> None:
    lines = made(set_train("learning_rate", lambda t: 0.02), set_train("learning_rate", lambda t: 0.01 * (1 - t), 360))
    lines[0]["flags"]["--lr-decay-style"] = "WSD"
    rarely(interval)(lines)
    assert found(write(tmp_path, lines)) == set()
    lines[0]["flags"]["--lr-decay-style"] = "cosine"
    assert found(write(tmp_path, lines)) == {"jump"}


def test_null_is_no_number(tmp_path: Path) -> None:
    """As older versions, other writers and flags without a value have it."""
    lines = made(alarm("defect", 40, 30, "x", value=None, limit=0.3, weights=None, count=None))
    each(lines, "alarm")[0]["since"] = None
    for nothing in (None, "None"):
        lines[0]["flags"]["--clip-grad"] = nothing
        assert found(write(tmp_path, lines)) == {"alarm"}


def test_a_run_of_which_no_number_is_finite(tmp_path: Path) -> None:
    lines = made(set_train("losses", lambda t: None), set_train("grad_norm", lambda t: None))
    for name in ("nonfinite", "zero_gradient", "at_bound", "defect", "stable_rank", "update_ratio"):
        set_stat(name, lambda t: None)(lines)
    assert {"not finite", "nonfinite matrices"} <= found(write(tmp_path, lines))


def printed(iteration: int, total: int) -> str:
    """A line of Megatron's."""
    return (
        f" [2026-11-30 15:00:00.1] iteration {iteration:8d}/{total:8d} | elapsed time per iteration (ms): 100.0 | "
        f"lm loss: {5 - iteration / 100:.6E} | number of skipped iterations:   0 | number of nan iterations:   0 |\n"
    )


LAUNCHED = ("", "[default0]:", "[default0]:[rank0]: ", "0: ", "\x1b[31m", "2026-11-30T15:00:00Z ")


@pytest.mark.parametrize("before", LAUNCHED)
def test_what_launchers_put_before_lines_hides_nothing(before: str, tmp_path: Path) -> None:
    text = "---- arguments ----\n  lr .................. 0.01\n" + "".join(printed(n, 50) for n in range(5, 25, 5))
    text += "RuntimeError: boom\n"
    (tmp_path / "a.log").write_text("".join(before + line for line in text.splitlines(keepends=True)))
    run = read(tmp_path / "a.log")
    assert run.flags["--lr"] == "0.01" and len(run.errors) == 1
    assert sum(point.iterations for point in run.train) == 20


def test_text_tells_whether_a_run_was_to_end(tmp_path: Path) -> None:
    log, text = tmp_path / "a.log", "".join(printed(n, 50) for n in range(7, 50, 7))
    leaving = printed(56, 90) + "[x] exiting program at iteration 56\n"
    for end, expected in {"": "finished", printed(56, 90): "ended", leaving: "left"}.items():
        log.write_text(text + end)
        run = read(log, now=time.time() + HOURS)
        told = {finding.name for finding in examine(run)} & {"ended", "left"}
        assert (told or {run.state}) == {expected}


def test_damaged_lines_are_left_out_and_told(tmp_path: Path) -> None:
    folder = write(tmp_path, made())
    text = (folder / METRICS_FILE).read_text().replace('"learning_rate": ', '"learn', 1)
    (folder / METRICS_FILE).write_text(text + '{"kind": "train"}\n[1]\n{"kind": "tra')  # the last is being written
    run = read(folder)
    assert len(run.damaged) == 3 and run.iteration == 400 and {f.name for f in examine(run)} == {"damage"}


def test_a_record_that_is_being_written_is_of_a_running_run(tmp_path: Path) -> None:
    folder = write(tmp_path, made(ending(300)))
    os.utime(folder / METRICS_FILE)
    assert read(folder).state == "running" and found(folder) == set()


def test_rounding_is_told_with_losses_that_are_not_finite(tmp_path: Path) -> None:
    lines = made(*RECORDS["not_finite"])
    lines[0]["flags"] = {"--muon-momentum-dtype": "int8"}
    assert "precision" in found(write(tmp_path, lines))


def test_text_alone_is_a_run(tmp_path: Path) -> None:
    """Megatron leaves out losses that are not finite, and its second loss after a start is a mean."""
    text = (GOLDEN / "killed" / "train.log").read_text()
    late = text.replace("lm loss: 3.142139E+00 | ", "").replace(
        "number of nan iterations:   0", "number of nan iterations:   1"
    )
    (tmp_path / "a.log").write_text("WARNING blockwise is another optimizer\nmegatron_muon: WARNING x\n" + late)
    run = read(tmp_path / "a.log")
    assert (run.iteration, run.total, run.saved, run.means) == (27, 100000, [10, 20], [2])
    assert run.flags["--save-interval"] == "10" and len(run.warnings) == 2 and len(run.errors) == 3
    assert {"not finite", "warnings", "errors"} <= {finding.name for finding in examine(run)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "No such file"),
        ("empty.jsonl", "", "nothing of a run in it"),
        ("picture.png", "\x89PNG", "nothing of a run in it"),
        ("folder/readme", "", "no run here"),
        ("runs/muon/metrics.jsonl", "{}", "a folder of runs (muon)"),
    ],
)
def test_what_cannot_be_read_ends_with_2(
    name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    top = tmp_path / Path(name).parts[0]
    assert said(top)[1] == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron_muon doctor: error: ") and message in error and error.count("\n") == 1


def test_checkpoints_are_looked_at(tmp_path: Path) -> None:
    """Of a run that goes on after an interrupted save, with other flags."""
    folder = write(tmp_path, made())
    run = read(folder)
    run.checkpoint = {
        "iteration": 500,
        "iterations": [100, 500],
        "flags": {"--lr": 0.01, "--save": "x"},
        "problems": ["y"],
    }
    assert {finding.name for finding in examine(run)} == {"checkpoint", "other flags", "beyond"}


def test_json_has_everything(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", made()), write(tmp_path / "b", made(seed=1))
    text, status = said(first, second, "--json", tmp_path / "d.json")
    plain = json.loads((tmp_path / "d.json").read_text())
    assert status == 0 and [run["findings"] for run in plain["runs"]] == [[], []]
    assert all(f"  {line}" in text for line in plain["differences"])
    assert any("do not part beyond noise" in line for line in plain["differences"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for record in [*RECORDS, *REAL, "pair"]:
            (GOLDEN / f"{record}.txt").write_text(words_of(record, Path(place)))

"""The launcher with an unedited Megatron script, in forked ranks; ``test_left_behind.py`` has it under ``torchrun``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_muon
from megatron_muon import cli
from megatron_muon.checkpoint import folders
from tests.launch import FLAGS, ROOT, SCRIPT, TIMEOUT, Result, check, launch, records, torchrun, train

LAID_OUT = "the parameter layout"
LAST_WORDS = """
import atexit, os, sys

class Late:
    def __del__(self, mark=os.mkdir):
        mark("taken_down")

sys.late = Late()
atexit.register(lambda: open("at_exit", "w").close())
print("trained", end="")
sys.exit({status})
"""


@pytest.mark.parametrize("status", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_the_end_of_a_script(tmp_path: Path, status: int) -> None:
    """Its status, its output and its functions of atexit; but Python does not take itself down under gloo's threads."""
    script = tmp_path / "script.py"
    script.write_text(LAST_WORDS.replace("{status}", str(status)))
    line = [sys.executable, "-m", "megatron_muon", "run", "--device", "cpu", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert (result.returncode, result.stdout) == (status, "trained")
    assert (tmp_path / "at_exit").exists() and not (tmp_path / "taken_down").exists()
    if status:  # once: what the script would show if it were
        plain = subprocess.run([sys.executable, str(script)], cwd=tmp_path, timeout=TIMEOUT)
        assert plain.returncode == status and (tmp_path / "taken_down").exists()


def test_refusal_is_one_line_and_an_exit_code() -> None:
    """Under torchrun: ``test_launcher_errors.py``."""
    flags = [*FLAGS.split(), "--train-iters", "1", "--optimizer", "muon", "--fp16"]
    message = "megatron_muon: error: --fp16 with --optimizer muon: Muon needs no loss scale; use --bf16 or float32."
    result = launch(str(SCRIPT), *flags)
    assert result.returncode == 2
    assert result.stderr.splitlines().count(message) == 1
    assert "Traceback" not in result.stderr.split("megatron_muon: error:")[0]


def without_warnings(*arguments: str) -> Result:
    """A run that goes on; what torch says of how Megatron-Core reads a checkpoint is nobody's concern."""
    result = launch(*arguments)
    assert "Warning: " not in result.stderr
    return result


@pytest.mark.parametrize("run", [launch, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_a_dry_run_ends_when_all_is_built(tmp_path: Path, run: Any) -> None:
    """On all ranks, with status 0, when all has been said; and writes nothing."""
    flags = "--optimizer muon --use-distributed-optimizer --muon-dry-run --log-max-attention-logit --train-iters 2"
    places = (
        "--save",
        str(tmp_path / "saved"),
        "--save-interval",
        "1",
        "--muon-log-jsonl",
        str(tmp_path / "log.jsonl"),
    )
    output = check(run(str(SCRIPT), *FLAGS.split(), *flags.split(), *places))
    assert "decoder.layers.*.mlp.linear_fc1.weight" in output and "[before the start of training step]" not in output
    assert output.count("megatron_muon: --muon-dry-run: all is built and could be trained; nothing is.") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "parallelism",
    [
        pytest.param("--tensor-model-parallel-size 2", marks=pytest.mark.slow),
        pytest.param("--pipeline-model-parallel-size 2", marks=pytest.mark.slow),
        "--use-distributed-optimizer --bf16",
    ],
)
def test_unedited_script_trains_and_resumes(tmp_path: Path, parallelism: str) -> None:
    flags = parallelism.split()
    whole = train(*flags, "--train-iters", "6", log=tmp_path / "whole.jsonl")
    assert len(whole) == 6 and whole[-1] < whole[0]
    folder = str(tmp_path / "checkpoint")
    checkpoint = ["--save", folder, "--load", folder, "--save-interval", "3"]
    log = tmp_path / "halves.jsonl"
    flags += ["--muon-log-interval", "3", "--muon-check-replicas-interval", "2"]  # which change no bit
    train(*flags, *checkpoint, "--train-iters", "6", "--exit-interval", "3", log=log)
    halves = train(*flags, *checkpoint, "--train-iters", "6", log=log, run=without_warnings)
    assert halves == whole
    assert [record["iteration"] for record in records(log, "muon")] == [1, 3, 6] and records(log, "alarm") == []


def test_transfer_from_a_smaller_model(tmp_path: Path) -> None:
    """Initial weights are scaled before an unedited script builds its model: otherwise the optimizer refuses it."""
    log = tmp_path / "log.jsonl"
    flags = "--muon-transfer 32x1 --muon-scale-mode unit_rms_norm --muon-weight-decay-method independent_scheduled"
    flags += f" --tensor-model-parallel-size 2 --train-iters 4 --optimizer muon --muon-log-jsonl {log}"
    output = check(launch(str(SCRIPT), *FLAGS.split(), *flags.split()))
    assert "transfer from 32x1: 2 times wider, 2 times deeper" in output
    losses = [point["losses"]["lm loss"] for point in records(log)]
    assert losses[-1] < losses[0]


def test_how_nearly_tangent_updates_are_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    flags = "--optimizer stiefel_muon --muon-param-rule *.linear_qkv.weight=stiefel --tensor-model-parallel-size 2"
    flags += f" --train-iters 3 --muon-log-jsonl {log}"
    output = check(launch(str(SCRIPT), *FLAGS.split(), *flags.split()))
    assert "Stiefel manifold: 2 weights of this rank at radius 1; admm, 10 iterations" in output
    points = records(log)
    assert len(points) == 3
    for point in points:
        value, iteration = point["stiefel_tangency"], point["iteration"]
        assert 0 < value < 0.05
        assert f"Stiefel manifold after iteration {iteration}: tangency residual {value:.3g}" in output


def test_attention_logits_are_clipped_and_logged(tmp_path: Path) -> None:
    """In the log and the record, with an unedited script and without TransformerEngine."""
    log = tmp_path / "log.jsonl"
    flags = "--qk-clip --qk-clip-threshold 0.01 --log-max-attention-logit --muon-qk-log-layers 2 --train-iters 4"
    flags += f" --optimizer muon --muon-log-jsonl {log} --muon-log-interval 2 --muon-log-console --muon-nesterov"
    output = check(launch(str(SCRIPT), *FLAGS.split(), *flags.split()))
    assert "QK-clip: 8 heads in 2 layers are clipped above 0.01 (alpha 0.5, shared keys: q_only)" in output
    points = records(log)
    for point in points:
        value, iteration = point["max_attention_logit"], point["iteration"]
        assert value > 0.01 and 0 < point["heads_clipped"] <= 8
        assert f"QK-clip after iteration {iteration}: max attention logit {value:.5g}" in output
        layers = point.get("max_attention_logits")
        assert (layers is not None) == (iteration % 2 == 0)
        if layers is not None:
            assert list(layers) == [f"decoder.layers.{i}.self_attention" for i in range(2)]
            assert max(layers.values()) == value
    (begun,) = records(log, "start")
    assert begun["versions"]["megatron_muon"] == megatron_muon.__version__ and "megatron-core" in begun["versions"]
    assert begun["flags"]["--muon-nesterov"] is True and begun["flags"]["--qk-clip-threshold"] == 0.01
    assert begun["routes"]["output_layer.weight"] == "adam: embedding or output layer"
    assert begun["routes"]["decoder.layers.*.self_attention.linear_proj.weight"] == "muon: whole 64 x 64"
    measured = records(log, "muon")
    assert [each["iteration"] for each in measured] == [1, 2, 4]  # the last one too, after which there is no step
    for each in measured:
        point = points[each["iteration"] - 1]
        assert each["max_attention_logit"] == pytest.approx(point["max_attention_logit"])
        assert each["heads_clipped"] == point["heads_clipped"]
        # Megatron tells the rate of the step that comes.
        before = points[each["iteration"] - 2]["learning_rate"] if each["iteration"] > 1 else 0.001
        assert each["rates"]["lr"] == pytest.approx(before) and each["rates"]["weight_decay"] == 0.01
        assert each["times"]["step"][1] > 0
        assert f" Muon after iteration {each['iteration']}: update/weight " in output


def test_slices_are_clipped_before_they_are_gathered(tmp_path: Path) -> None:
    """Adam: parameters gathered while the next step computes, against whole weights on every rank."""
    overlap = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    clip = "--bf16 --qk-clip --qk-clip-threshold 0.01 --lr 1e-2 --clip-grad 0 --train-iters 5 --optimizer adam"
    found = []
    for number, flags in enumerate(("", overlap)):
        log = tmp_path / f"{number}.jsonl"
        losses = train(*clip.split(), *flags.split(), log=log)
        points = records(log)
        found.append((losses, [(point["max_attention_logit"], point["heads_clipped"]) for point in points]))
    assert found[0] == found[1] and min(clipped for _, clipped in found[0][1]) > 0


@pytest.mark.slow
def test_checkpoints_written_in_the_background(tmp_path: Path) -> None:
    """Each iteration, while the next ones are trained, by a process that lives as long as the run."""
    whole = train("--train-iters", "6", log=tmp_path / "whole.jsonl")
    folder = str(tmp_path / "checkpoint")
    flags = ["--save", folder, "--load", folder, "--save-interval", "1", "--train-iters", "6"]
    flags += ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    log = tmp_path / "halves.jsonl"
    train(*flags, "--exit-interval", "3", log=log)
    assert train(*flags, log=log) == whole
    assert [folders.is_whole(tmp_path / "checkpoint" / f"iter_{i:07d}") for i in range(1, 7)] == [True] * 6


@pytest.mark.parametrize("older", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_model_from_a_builder(tmp_path: Path, older: bool) -> None:
    """As Megatron-LM 0.19's own script has it: in the same buckets as by a model provider, so the same bits."""
    reports: list[str] = []

    def run(*arguments: str, **options: Any) -> Result:
        result = launch(*arguments, **options)
        reports.append(result.stdout)
        return result

    script = Path(__file__).parent / "scripts" / "pretrain_with_builder.py"
    flags = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--ddp-num-buckets", "3", "--train-iters", "4"]
    builder = train(*flags, log=tmp_path / "builder.jsonl", script=script, run=run)
    assert builder[-1] < builder[0]
    if older:
        lists = train(*flags, "--no-use-layer-wise-param-layout", log=tmp_path / "older.jsonl", script=script, run=run)
        assert lists == pytest.approx(builder, abs=1e-5)
    else:
        assert train(*flags, log=tmp_path / "provider.jsonl", run=run) == builder
    ways = [line for text in reports for line in text.splitlines() if line.startswith("layer-wise over ")]
    assert [line.split(" (")[0] for line in ways] == [
        "layer-wise over 2 data-parallel ranks, by the parameter layout",
        f"layer-wise over 2 data-parallel ranks, by {'lists, --no-use-layer-wise-param-layout' if older else LAID_OUT}",
    ]


def leave(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """What the command line leaves with, in this process."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as leaving:
        cli.main(arguments)
    return leaving.value.code


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(monkeypatch, "--help") == 0
    assert "run a Megatron-LM pretraining script" in " ".join(capsys.readouterr().out.split())
    assert leave(monkeypatch, "run", "--help") == 0
    text = capsys.readouterr().out
    for word in ("--device", "SCRIPT", "torchrun --nproc-per-node 8 -m megatron_muon run pretrain_gpt.py"):
        assert word in text


def test_missing_script(monkeypatch: pytest.MonkeyPatch) -> None:
    message = leave(monkeypatch, "run", "no_such_script.py")
    assert str(message).endswith("no_such_script.py: no such file. Give the path of a pretraining script.")


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert leave(monkeypatch, "run", "--device", "cuda", str(SCRIPT)) == 2
    assert "--device cuda: torch finds no GPU on this machine. Use --device cpu, or auto." in capsys.readouterr().err

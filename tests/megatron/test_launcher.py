"""The launcher with an unedited Megatron script, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_muon.checkpoint import folders

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
FLAGS = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 6 --lr-decay-style cosine "
    "--eval-iters 1 --eval-interval 100 --log-interval 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 "
    "--attention-dropout 0 --hidden-dropout 0 --num-workers 0"
)
TIMEOUT = 240


def launch(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """``torchrun ... -m megatron_muon run`` on CPU ranks."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    line = [*start, "-m", "megatron_muon", "run", "--device", "cpu", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, cwd=ROOT, **pipes)
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:  # after a time-out torchrun and its ranks, which are in sessions of their own
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.wait()
    return subprocess.CompletedProcess(line, process.returncode, output, errors)


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


@pytest.mark.parametrize("status", [0, 3])
def test_the_end_of_a_script(tmp_path: Path, status: int) -> None:
    """Its status, its output and its functions of atexit; but Python does not take itself down under gloo's threads."""
    script = tmp_path / "script.py"
    script.write_text(LAST_WORDS.replace("{status}", str(status)))
    line = [sys.executable, "-m", "megatron_muon", "run", "--device", "cpu", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert (result.returncode, result.stdout) == (status, "trained")
    assert (tmp_path / "at_exit").exists() and not (tmp_path / "taken_down").exists()
    plain = subprocess.run([sys.executable, str(script)], cwd=tmp_path, timeout=TIMEOUT)
    assert plain.returncode == status and (tmp_path / "taken_down").exists()


def train(*flags: str, log: Path, script: Path = SCRIPT) -> list[float]:
    """Train with the flags of this module and ``flags``; the training losses of the log."""
    result = launch(str(script), *FLAGS.split(), "--optimizer", "muon", "--muon-log-jsonl", str(log), *flags)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["losses"]["lm loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(
    "parallelism",
    [
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
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
    train(*flags, *checkpoint, "--train-iters", "6", "--exit-interval", "3", log=log)
    halves = train(*flags, *checkpoint, "--train-iters", "6", log=log)
    assert halves == whole


def test_transfer_from_a_smaller_model(tmp_path: Path) -> None:
    """Initial weights are scaled before an unedited script builds its model: otherwise the optimizer refuses it."""
    log = tmp_path / "log.jsonl"
    flags = "--muon-transfer 32x1 --muon-scale-mode unit_rms_norm --muon-weight-decay-method independent_scheduled"
    flags += f" --tensor-model-parallel-size 2 --train-iters 4 --optimizer muon --muon-log-jsonl {log}"
    result = launch(str(SCRIPT), *FLAGS.split(), *flags.split())
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "transfer from 32x1: 2 times wider, 2 times deeper" in result.stdout
    losses = [
        line["losses"]["lm loss"] for line in map(json.loads, log.read_text().splitlines()) if line["kind"] == "train"
    ]
    assert losses[-1] < losses[0]


def test_how_nearly_tangent_updates_are_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    flags = "--optimizer stiefel_muon --muon-param-rule *.linear_qkv.weight=stiefel --tensor-model-parallel-size 2"
    flags += f" --train-iters 3 --muon-log-jsonl {log}"
    result = launch(str(SCRIPT), *FLAGS.split(), *flags.split())
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "Stiefel manifold: 2 weights of this rank at radius 1; admm, 10 iterations" in result.stdout
    points = [line for line in map(json.loads, log.read_text().splitlines()) if line["kind"] == "train"]
    assert len(points) == 3
    for point in points:
        value, iteration = point["stiefel_tangency"], point["iteration"]
        assert 0 < value < 0.05
        assert f"Stiefel manifold after iteration {iteration}: tangency residual {value:.3g}" in result.stdout


def test_attention_logits_are_clipped_and_logged(tmp_path: Path) -> None:
    """In the log and the record, with an unedited script and without TransformerEngine."""
    log = tmp_path / "log.jsonl"
    flags = "--qk-clip --qk-clip-threshold 0.01 --log-max-attention-logit --muon-qk-log-layers 2 --train-iters 4"
    flags += f" --optimizer muon --muon-log-jsonl {log}"
    result = launch(str(SCRIPT), *FLAGS.split(), *flags.split())
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "QK-clip: 8 heads in 2 layers are clipped above 0.01 (alpha 0.5, shared keys: q_only)" in result.stdout
    points = [line for line in map(json.loads, log.read_text().splitlines()) if line["kind"] == "train"]
    for point in points:
        value, iteration = point["max_attention_logit"], point["iteration"]
        assert value > 0.01 and 0 < point["heads_clipped"] <= 8
        assert f"QK-clip after iteration {iteration}: max attention logit {value:.5g}" in result.stdout
        layers = point.get("max_attention_logits")
        assert (layers is not None) == (iteration % 2 == 0)
        if layers is not None:
            assert list(layers) == [f"decoder.layers.{i}.self_attention" for i in range(2)]
            assert max(layers.values()) == value


def test_slices_are_clipped_before_they_are_gathered(tmp_path: Path) -> None:
    """Adam: parameters gathered while the next step computes, against whole weights on every rank."""
    overlap = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    clip = "--bf16 --qk-clip --qk-clip-threshold 0.01 --lr 1e-2 --clip-grad 0 --train-iters 5 --optimizer adam"
    found = []
    for number, flags in enumerate(("", overlap)):
        log = tmp_path / f"{number}.jsonl"
        losses = train(*clip.split(), *flags.split(), log=log)
        points = [line for line in map(json.loads, log.read_text().splitlines()) if line["kind"] == "train"]
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


def test_model_from_a_builder(tmp_path: Path) -> None:
    """Megatron-LM 0.19's own script builds its model so; that path gives DDP no layer-wise parameter layout."""
    script = Path(__file__).parent / "scripts" / "pretrain_with_builder.py"
    flags = ["--use-distributed-optimizer", "--train-iters", "4"]
    builder = train(*flags, log=tmp_path / "builder.jsonl", script=script)
    provider = train(*flags, log=tmp_path / "provider.jsonl")
    assert len(builder) == 4 and builder[-1] < builder[0]
    assert builder == pytest.approx(provider, abs=1e-5)


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--fp16", "--fp16 with --optimizer muon: Muon needs no loss scale; use --bf16 or float32."),
        ("--muon-num-ns-steps 0", "--muon-num-ns-steps 0: give a whole number of at least 1 (5 is usual)."),
    ],
)
def test_refusal_is_one_line_and_an_exit_code(flags: str, message: str) -> None:
    result = launch(str(SCRIPT), *FLAGS.split(), "--train-iters", "1", "--optimizer", "muon", *flags.split(), ranks=1)
    assert result.returncode != 0
    assert f"megatron_muon: error: {message}" in result.stderr.splitlines()
    assert "Traceback" not in result.stderr.split("megatron_muon: error:")[0]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_muon", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def test_help() -> None:
    top, run = command("--help"), command("run", "--help")
    assert top.returncode == run.returncode == 0
    assert "run a Megatron-LM pretraining script" in " ".join(top.stdout.split())
    for word in ("--device", "SCRIPT", "torchrun --nproc-per-node 8 -m megatron_muon run pretrain_gpt.py"):
        assert word in run.stdout


def test_missing_script() -> None:
    result = command("run", "no_such_script.py")
    assert result.returncode != 0
    assert result.stderr.strip().endswith("no_such_script.py: no such file. Give the path of a pretraining script.")


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = command("run", "--device", "cuda", str(SCRIPT))
    assert result.returncode == 2
    assert "--device cuda: torch finds no GPU on this machine. Use --device cpu, or auto." in result.stderr

"""The launcher with an unedited Megatron script, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

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

"""A few iterations of Megatron's own training loop by the launcher, on data that it makes up."""

from __future__ import annotations

import shlex
import subprocess
import sys

from megatron_muon.monitor import metrics
from megatron_muon.monitor.metrics import TrainPoint
from tools.gpu_check.report import Report, Setting, environment, need, repository

ITERATIONS = {"cuda": 12, "cpu": 6}

_MODEL = (
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --kv-channels 64 "
    "--group-query-attention --num-query-groups 2 --seq-length 128 --max-position-embeddings 128 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0"
)

_TRAINING = (
    "--micro-batch-size 4 --global-batch-size 4 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --weight-decay 0.1 "
    "--clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer --vocab-size 511 --eval-interval 1000 --eval-iters 1 "
    "--log-interval 1 --num-workers 0 --no-create-attention-mask-in-dataloader --bf16 "
    "--no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion "
    "--optimizer muon --muon-nesterov --muon-extra-scale-factor 0.2"
)


def train(setting: Setting, report: Report, name: str, more: str) -> list[TrainPoint]:
    """Train; the recorded iterations, none if it failed.

    Args:
        setting: where.
        report: says whether it ended well, and whether losses are finite and fall.
        name: of the run, for messages.
        more: flags beside those of all runs.
    """
    need("megatron.core", "megatron.training", "emerging_optimizers", "tqdm")
    steps, log = ITERATIONS[setting.device], setting.folder / f"{name.replace(' ', '-')}.jsonl"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    words += ["-m", "megatron_muon", "run", "--device", setting.device]
    words += [str(repository() / "examples" / "pretrain_gpt.py"), *shlex.split(f"{_MODEL} {_TRAINING} {more}")]
    words += ["--train-iters", str(steps), "--muon-log-jsonl", str(log)]
    ended = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=setting.folder)
    print(ended.stdout, ended.stderr, sep="\n", flush=True)
    tail = " | ".join((ended.stdout + ended.stderr).strip().splitlines()[-30:])
    report.check(f"{name} ends well", ended.returncode == 0, f"status {ended.returncode}: {tail[-3000:]}")
    if ended.returncode:
        return []
    points = metrics.read(log).train
    losses = [point.loss for point in points if point.loss is not None]
    is_whole = len(points) == len(losses) == steps
    report.check(f"{name}: every loss is finite", is_whole, f"{len(losses)} of {steps}")
    report.check(f"{name}: the loss falls", is_whole and losses[-1] < losses[0], f"{losses[:1]} to {losses[-1:]}")
    later = [point for point in points if not point.after_start]
    report.row(
        "trainings",
        run=name,
        first_loss=losses[0] if losses else "",
        last_loss=losses[-1] if losses else "",
        ms_a_step=1e3 * min((point.seconds for point in later), default=float("nan")),
        ms_of_optimizer=1e3 * min((point.optimizer_seconds for point in later), default=float("nan")),
    )
    return points

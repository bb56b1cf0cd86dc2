"""Attention logits with and without QK-clip, at a learning rate that is too large for queries and keys.

    python examples/muonclip.py [--steps 100] [--out runs/muonclip] [--device auto]

Trains the demo's GPT (grouped-query attention) and a variant with multi-latent attention on Jane Austen's novels, on
two tensor-parallel processes, with Muon at ten times the demo's learning rate: once as it is, once with ``--qk-clip``.
Writes ``muonclip.png`` (largest logit of the whole model, and loss) and ``muonclip.md`` (a table) to ``--out``.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from prepare_data import PreparedData, prepare
from recipes import DECODER, EXAMPLES, LEARNING_RATES, MODELS, OPTIMIZERS, PORTABLE, TRAINING, choose_device

from megatron_muon.monitor import metrics, plots

THRESHOLD = 30
"""Of QK-clip; K2 uses 100 at its size, and 30 in small runs."""

RATE = 10 * LEARNING_RATES["muon"]

ATTENTION = {
    "grouped-query": "",
    "multi-latent": (
        "--multi-latent-attention --q-lora-rank 96 --kv-lora-rank 64 --qk-head-dim 32 --qk-pos-emb-head-dim 16 "
        "--v-head-dim 32 --rope-type rope"
    ),
}

CLIP = {"without": "--log-max-attention-logit", "with QK-clip": f"--qk-clip --qk-clip-threshold {THRESHOLD}"}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        attention: key of :data:`ATTENTION`.
        clip: key of :data:`CLIP`.
    """

    attention: str
    clip: str

    @property
    def name(self) -> str:
        """For the table, the picture and the folder."""
        return f"{self.attention}, {self.clip}"


RUNS = [Run(attention, clip) for attention in ATTENTION for clip in CLIP]


def command(run: Run, steps: int, device: str, processes: int, data: PreparedData, out: Path) -> list[str]:
    """The command line of a training."""
    decoder = DECODER
    if run.attention == "multi-latent":
        decoder = decoder.replace("--group-query-attention --num-query-groups 2 ", "").replace("--kv-channels 32 ", "")
    schedule = (
        f"--train-iters {steps} --lr {RATE} --min-lr {RATE / 10} --lr-warmup-iters {steps // 5} --seed 1234 "
        f"--eval-interval {steps} --eval-iters 6 --log-interval 1"
    )
    layout = f"--num-layers 4 --transformer-impl local --tensor-model-parallel-size {processes}"
    precision = "--bf16" if device == "cuda" else ""
    words = [decoder, ATTENTION[run.attention], layout, TRAINING, OPTIMIZERS["muon"], CLIP[run.clip], schedule]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *("-m", "megatron_muon", "run", "--device", device, str(EXAMPLES / MODELS["gpt"].script)),
        *shlex.split(" ".join([*words, precision, PORTABLE])),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", data.tokenizer),
        *("--train-data-path", data.train, "--valid-data-path", data.valid, "--data-cache-path", data.cache),
        *("--num-workers", "0", "--no-create-attention-mask-in-dataloader"),
        *("--muon-log-jsonl", str(out / run.name / plots.METRICS_FILE)),
    ]


def table(runs: dict[str, metrics.Metrics]) -> str:
    """What came out, in Markdown."""
    lines = [
        "| attention | largest logit of all steps | at the last step | steps with clipped heads "
        "| loss, mean of the last 10 steps | validation loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        logits = [point.max_attention_logit or 0.0 for point in run.train]
        clipped = sum(bool(point.heads_clipped) for point in run.train) if "with " in name else "-"
        last = [point.loss or float("nan") for point in run.train[-10:]]
        valid = next(reversed(run.valid.values()), None)
        lines.append(
            f"| {name} | {max(logits):.1f} | {logits[-1]:.1f} | {clipped} | {sum(last) / len(last):.3f} | "
            f"{'-' if valid is None else f'{valid:.3f}'} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Do the trainings, draw and tabulate them; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="iterations of each training")
    parser.add_argument("--out", type=Path, default=Path("runs/muonclip"), help="folder for logs and results")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="folder for the datasets")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if there are two")
    arguments = parser.parse_args()
    device, processes = choose_device(arguments.device, None)
    shutil.rmtree(arguments.out, ignore_errors=True)
    data = prepare(arguments.data)
    for run in RUNS:
        folder = arguments.out / run.name
        folder.mkdir(parents=True)
        print(run.name, flush=True)
        with (folder / "train.log").open("wb") as output:
            words = command(run, arguments.steps, device, processes, data, arguments.out)
            status = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        if status != 0:
            print(f"{run.name}: training ended with status {status}; see {folder / 'train.log'}", file=sys.stderr)
            return 1
    runs = {run.name: metrics.read(arguments.out / run.name / plots.METRICS_FILE) for run in RUNS}
    plots.plot_logits(runs, THRESHOLD, arguments.out / "muonclip.png", f"Muon at learning rate {RATE:g}")
    text = table(runs)
    (arguments.out / "muonclip.md").write_text(text + "\n")
    print(f"{text}\nwrote {arguments.out / 'muonclip.md'} and {arguments.out / 'muonclip.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One run, three parts: Adam at TP 2, then Muon on two data-parallel processes, then Muon at PP 2.

    python examples/switch_optimizer.py [--steps 60] [--out runs/switch] [--device auto]

Each part resumes the checkpoint of the one before. Weights, float32 master weights, learning rate schedule, data order
and what both optimizers have of state go on; the picture ``losses.png`` in ``--out`` shows one curve in three colours.
The second part needs ``--muon-ckpt-changes accept``, for its rules are not those of the checkpoint.
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
from recipes import DECODER, EXAMPLES, MODELS, OPTIMIZERS, PORTABLE, TRAINING, choose_device

from megatron_muon.monitor import metrics, plots


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        name: in the picture.
        optimizer: key of the demo's ``OPTIMIZERS``.
        flags: parallel layout, and what the switch needs.
    """

    name: str
    optimizer: str
    flags: str


PARTS = (
    # Without the flag, Adam's state would be in the form of the optimizer's buckets, which no other layout reads.
    Part(
        "Adam, TP 2",
        "adam",
        "--tensor-model-parallel-size 2 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
    ),
    Part("Muon, DP 2", "muon", "--use-distributed-optimizer --muon-ckpt-changes accept"),
    Part("Muon, PP 2", "muon", "--pipeline-model-parallel-size 2"),
)


def command(number: int, steps: int, device: str, data: PreparedData, out: Path) -> list[str]:
    """The command line of a part; ``--train-iters`` is that of the whole run, ``--exit-interval`` ends the part."""
    part = PARTS[number]
    schedule = (
        f"--train-iters {3 * steps} --lr 3e-3 --min-lr 3e-4 --lr-warmup-iters {steps // 3} --seed 1234 "
        f"--eval-interval {max(1, steps // 6)} --eval-iters 2 --log-interval 1 "
        f"--exit-interval {steps} --save-interval {steps}"
    )
    model = f"{DECODER} --num-layers 4 --transformer-impl local"
    precision = "--bf16" if device == "cuda" else ""
    batch = "--micro-batch-size 4"  # of eight, so that two data-parallel processes have one each
    text = " ".join([model, TRAINING, batch, OPTIMIZERS[part.optimizer], part.flags, schedule, precision, PORTABLE])
    checkpoints = str(out / "checkpoints")
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_muon", "run", "--device", device, str(EXAMPLES / MODELS["gpt"].script)),
        *shlex.split(text),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", data.tokenizer),
        *("--train-data-path", data.train, "--valid-data-path", data.valid, "--data-cache-path", data.cache),
        *("--num-workers", "0", "--no-create-attention-mask-in-dataloader"),
        *("--muon-log-jsonl", str(out / part.name / plots.METRICS_FILE), "--save", checkpoints, "--load", checkpoints),
    ]


def main() -> int:
    """Do the parts and draw them; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="iterations of each part")
    parser.add_argument("--out", type=Path, default=Path("runs/switch"), help="folder for checkpoints and results")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="folder for the datasets")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if there are two")
    arguments = parser.parse_args()
    device, processes = choose_device(arguments.device, None)
    device = device if processes == 2 else "cpu"
    shutil.rmtree(arguments.out, ignore_errors=True)
    data = prepare(arguments.data)
    for number, part in enumerate(PARTS):
        (arguments.out / part.name).mkdir(parents=True)
        log = arguments.out / part.name / "train.log"
        print(f"{part.name}: iterations {number * arguments.steps + 1} to {(number + 1) * arguments.steps}", flush=True)
        with log.open("wb") as output:
            words = command(number, arguments.steps, device, data, arguments.out)
            status = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        if status != 0:
            print(f"{part.name}: training ended with status {status}; see {log}", file=sys.stderr)
            return 1
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith(("megatron_muon: optimizer state", "  carried over", "  changed by flags")):
                print(f"  {line}")
    runs = {part.name: metrics.read(arguments.out / part.name / plots.METRICS_FILE) for part in PARTS}
    plots.plot_losses(runs, arguments.out / "losses.png", "One run: Adam, then Muon, at three layouts")
    for name, run in runs.items():
        print(f"{name}: loss {run.train[0].loss:.3f} at its first iteration, {run.train[-1].loss:.3f} at its last")
    print(f"wrote {arguments.out / 'losses.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the examples train: models, optimizers, learning rates, and the command line that they make.

The learning rates are the best of a sweep (``docs/results/lr_sweep.md``, ``tools/lr_sweep.py``).
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from prepare_data import PreparedData

from megatron_muon.monitor import plots

EXAMPLES = Path(__file__).resolve().parent

LEARNING_RATES = {"muon": 8e-3, "adam": 2e-3}

OPTIMIZERS = {
    # With these two scale flags Muon's update has the size of Adam's (Moonlight, arXiv 2502.16982), so that one
    # learning rate serves the matrices and the weights that Adam updates, embeddings and norms.
    "muon": (
        "--optimizer muon --muon-momentum 0.95 --muon-nesterov "
        "--muon-scale-mode spectral --muon-extra-scale-factor 0.2 --muon-fp32-matmul-prec high"
    ),
    "adam": "--optimizer adam",
}

DECODER = (
    "--hidden-size 192 --ffn-hidden-size 512 "
    "--num-attention-heads 6 --kv-channels 32 --group-query-attention --num-query-groups 2 "
    "--seq-length 256 --max-position-embeddings 256 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0"
)

TRAINING = (
    "--micro-batch-size 8 --global-batch-size 8 --adam-beta1 0.9 --adam-beta2 0.95 "
    "--weight-decay 0.1 --clip-grad 1.0 --lr-decay-style cosine"
)

# Megatron's fused kernels are in Apex or TransformerEngine; these models do without.
PORTABLE = "--no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion"


@dataclass(frozen=True)
class Model:
    """What can be trained.

    Attributes:
        script: in this folder.
        flags: beyond those that all models share.
        title: over the plot.
        runs: name of the default folder for runs and results.
        gpu_modules: modules that its layers need on GPUs.
    """

    script: str
    flags: str
    title: str
    runs: str
    gpu_modules: tuple[str, ...] = ()


MODELS = {
    "gpt": Model("pretrain_gpt.py", "--num-layers 5 --transformer-impl local", "GPT", runs="demo"),
    # Three layers of linear attention to one of softmax attention. Their specification is TransformerEngine's, which
    # the launcher replaces on the CPU.
    "hybrid": Model(
        "pretrain_hybrid.py",
        "--num-layers 4 --experimental-attention-variant gated_delta_net --linear-attention-freq 4 "
        "--linear-num-key-heads 4 --linear-num-value-heads 8 --linear-key-head-dim 32 --linear-value-head-dim 32 "
        "--attention-output-gate --qk-layernorm --transformer-impl transformer_engine",
        "GatedDeltaNet and gated attention",
        runs="hybrid",
        gpu_modules=("transformer_engine", "fla"),
    ),
}


@dataclass(frozen=True)
class Settings:
    """What one run depends on, besides the optimizer's name.

    Attributes:
        steps: number of iterations.
        learning_rate: the peak.
        seed: of the weights and the order of the data.
        device: ``"cpu"`` or ``"cuda"``.
        tp: number of tensor-parallel processes.
        model: key of :data:`MODELS`.
        muon_flags: further flags of a run with Muon.
    """

    steps: int
    learning_rate: float
    seed: int
    device: str
    tp: int
    model: str = "gpt"
    muon_flags: str = ""


def flags(optimizer: str, settings: Settings, data: PreparedData) -> list[str]:
    """Megatron's flags of a run, without those that say where its files go."""
    schedule = (
        f"--train-iters {settings.steps} --lr {settings.learning_rate} --min-lr {settings.learning_rate / 10} "
        f"--lr-warmup-iters {max(1, settings.steps // 5)} --seed {settings.seed} "
        f"--eval-interval {max(1, settings.steps // 20)} --eval-iters 6 --log-interval 1"
    )
    parallelism = f"--tensor-model-parallel-size {settings.tp}" + (" --bf16" if settings.device == "cuda" else "")
    model = f"{DECODER} {MODELS[settings.model].flags}"
    ours = f"{OPTIMIZERS[optimizer]} {settings.muon_flags if optimizer == 'muon' else ''}"
    words = shlex.split(" ".join([model, TRAINING, ours, schedule, parallelism, PORTABLE]))
    return [
        *words,
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", data.tokenizer),
        *("--train-data-path", data.train, "--valid-data-path", data.valid, "--data-cache-path", data.cache),
        *("--num-workers", "0", "--no-create-attention-mask-in-dataloader"),
    ]


def command(optimizer: str, settings: Settings, data: PreparedData, folder: Path) -> list[str]:
    """The whole command line of a run."""
    checkpoints, interval = str(folder / "checkpoints"), max(1, settings.steps // 5)
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.tp)),
        *("-m", "megatron_muon", "run", "--device", settings.device, str(EXAMPLES / MODELS[settings.model].script)),
        *flags(optimizer, settings, data),
        *("--muon-log-jsonl", str(folder / plots.METRICS_FILE)),
        *("--save", checkpoints, "--load", checkpoints, "--save-interval", str(interval)),
        # Checkpoints whose iteration is no multiple of this are deleted when the next one is complete. Megatron wants a
        # multiple of the interval.
        *("--save-retain-interval", str(interval * -(-settings.steps // interval))),
        "--exit-signal-handler",
    ]


def choose_device(device: str, tp: int | None) -> tuple[str, int]:
    """Device and number of processes.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        tp: number of processes, or None for two where two fit.

    Raises:
        ValueError: if the machine does not have what was asked for.
    """
    gpus = 0
    if device != "cpu":
        import torch

        gpus = torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: this machine has no GPU that torch can use; take --device cpu")
    if not gpus:
        return "cpu", tp or 2
    if tp is not None and tp > gpus:
        raise ValueError(f"--tp {tp}: this machine has {gpus} GPUs; take --tp {gpus} or --device cpu")
    if tp is None and gpus == 1:
        print("one GPU: training without tensor parallelism (--tp 1)")
    return "cuda", tp or min(2, gpus)


def check_modules(model: str, device: str) -> None:
    """Look for what a model needs on GPUs.

    Args:
        model: key of :data:`MODELS`.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: naming the modules that cannot be imported.
    """
    wanted = MODELS[model].gpu_modules if device == "cuda" else ()
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--model {model} on GPUs needs TransformerEngine and flash-linear-attention, and {' and '.join(missing)} "
            "cannot be imported here; install them, or take --device cpu"
        )

"""Hybrids through the launcher: examples/pretrain_hybrid.py and its demo, and Megatron-LM's own HybridModel."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.monitor import metrics
from tests.launch import FLAGS, ROOT, TIMEOUT, check, launch

sys.path.insert(0, str(ROOT / "examples"))

import demo

SCRIPT = ROOT / "examples" / "pretrain_hybrid.py"
HYBRID = (
    "--num-layers 4 --experimental-attention-variant gated_delta_net --linear-attention-freq 4 "
    "--linear-num-key-heads 2 --linear-num-value-heads 4 --linear-key-head-dim 8 --linear-value-head-dim 8 "
    "--attention-output-gate --qk-layernorm --train-iters 6 "
    # Megatron pads the vocabulary to a multiple of this times the tensor-parallel size, and each row of padding adds
    # to the loss: 64 gives 128 rows at both sizes.
    "--make-vocab-size-divisible-by 64"
)
MUON = "--optimizer muon --muon-nesterov --muon-fp32-matmul-prec highest"
# float32: tensor-parallel ranks add the same numbers in another order. Losses of about 4.5 have steps of 5e-7; eight of
# them are allowed, as in tests/megatron/test_layouts.py.
TOLERANCE = 4e-6


def train(log: Path, *flags: str, tp: int = 1) -> list[float | None]:
    """Train on ``tp`` tensor-parallel ranks; the training losses of the log."""
    arguments = [*FLAGS.split(), *MUON.split(), "--muon-log-jsonl", str(log), *flags]
    check(launch(str(SCRIPT), *arguments, "--tensor-model-parallel-size", str(tp), ranks=tp))
    return [point.loss for point in metrics.read(log).train]


@pytest.mark.slow
@pytest.mark.parametrize("in_proj", ["adam", "split"])
def test_losses_do_not_depend_on_tensor_parallelism(tmp_path: Path, in_proj: str) -> None:
    flags, folder = [*HYBRID.split(), "--muon-gdn-in-proj", in_proj], str(tmp_path / "checkpoint")
    first = train(tmp_path / "start", *flags, "--save", folder, "--save-interval", "2", "--exit-interval", "2")
    one, two = (train(tmp_path / f"tp{tp}", *flags, "--load", folder, tp=tp) for tp in (1, 2))
    assert (len(first), len(one)) == (2, 4)
    assert two == pytest.approx(one, abs=TOLERANCE)
    assert one[-1] < first[0]


def test_megatrons_own_hybrid_model(tmp_path: Path) -> None:
    """The example builds it by its pattern, with Megatron-Core's specification of the layers."""
    model = "--mamba-state-dim 8 --mamba-head-dim 8 --mamba-num-heads 16 --mamba-num-groups 2"
    losses = train(tmp_path / "log", *f"--hybrid-layer-pattern M*M- --train-iters 6 {model}".split(), tp=2)
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert "decoder.layers.*.mixer.in_proj.weight" in (tmp_path / "log").read_text(), "a GPT has no such layers"


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """The driver's flags and script, as ``make train-hybrid`` uses them."""
    line = [sys.executable, str(ROOT / "examples" / "demo.py"), "--model", "hybrid", "--steps", "2", "--device", "cpu"]
    line += ["--optimizers", "muon", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["muon"]["model"] == "hybrid"
    assert summary["muon"]["steps"] == 2
    assert "--linear-attention-freq 4" in (tmp_path / "out" / "muon" / "train.log").read_text()


def test_demo_says_what_gpus_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> Any:
        return None if name == "fla" else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ValueError, match=r"--model hybrid on GPUs .* and fla cannot be imported .* --device cpu"):
        demo.check_modules("hybrid", "cuda")
    demo.check_modules("hybrid", "cpu")
    demo.check_modules("gpt", "cuda")

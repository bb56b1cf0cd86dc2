"""TransformerEngine: forward, backward, step, QK-clip from its maxima, FP8 compute; on CPUs, Megatron's own modules."""

from __future__ import annotations

from functools import partial

from tools.gpu_check.report import Item, Report, Setting, need
from tools.gpu_check.training import train

CLIP = "--qk-clip --qk-clip-threshold 0.05 --log-max-attention-logit"
"""A threshold that is passed, so that heads are clipped."""


def items(setting: Setting) -> list[Item]:
    """See :mod:`tools.gpu_check.parts`."""
    return [
        Item("bf16", partial(_train, setting, "bf16", ""), 60.0),
        Item("QK-clip", partial(_clip, setting), 110.0),
        Item("FP8", partial(_train, setting, "FP8", "--fp8-format hybrid"), 60.0),
        Item("captured step", partial(_train, setting, "captured step", "--optimizer-cuda-graph"), 60.0),
    ]


def _layers(setting: Setting) -> str:
    if not setting.is_gpu:
        return "--transformer-impl local"
    need("transformer_engine")
    return "--transformer-impl transformer_engine"


def _train(setting: Setting, name: str, flags: str, report: Report) -> None:
    layers = _layers(setting)
    if not setting.is_gpu and flags:
        report.left_out(name, "it needs a GPU")
        return
    train(setting, report, name, f"{layers} {flags}")


def _clip(setting: Setting, report: Report) -> None:
    """Maxima from its kernels, and by a pass of our own, must be of the same logits."""
    found = {}
    for source in ("te" if setting.is_gpu else "scores", "exact"):
        points = train(setting, report, f"QK-clip, {source}", f"{_layers(setting)} {CLIP} --muon-qk-logits {source}")
        if not points:
            return
        found[source] = [point.max_attention_logit or 0.0 for point in points]
        clipped = sum(point.heads_clipped or 0 for point in points)
        report.check(f"{source}: heads are clipped", clipped > 0, f"{clipped}")
        report.row("largest logits", source=source, first=found[source][0], last=found[source][-1], clipped=clipped)
    one, other = (values[0] for values in found.values())
    # At the first step both have the same weights; bfloat16 rounds queries, keys and their product.
    report.at_most("maxima of the first step differ by a share", abs(one / other - 1), 0.02)

"""Records of runs as they are written, with what can be wrong in them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from megatron_muon.monitor.schema import STATS, TIMES

CLASSES = (
    "decoder.layers.*.self_attention.linear_qkv.weight[q]",
    "decoder.layers.*.self_attention.linear_qkv.weight[k]",
    "decoder.layers.*.self_attention.linear_qkv.weight[v]",
    "decoder.layers.*.self_attention.linear_proj.weight",
    "decoder.layers.*.mlp.linear_fc1.weight[gate]",
    "decoder.layers.*.mlp.linear_fc1.weight[up]",
    "decoder.layers.*.mlp.linear_fc2.weight",
)


def numbers(seed: int, at: float, is_sick: bool) -> dict[str, Any]:
    """Of one class at a share of the run; a sick one collapses in its second half, and ends in NaN."""
    rng = random.Random(f"{seed} {at}")
    sickness = max(0.0, at - 0.5) * is_sick
    middles = {
        "gradient_norm": 0.2 * math.exp(-at) + 5 * sickness,
        "zero_gradient": min(1.0, 1.5 * sickness),
        "momentum_norm": 0.5 * math.exp(-at),
        "at_bound": 0.0,
        "stable_rank": (20 + seed) * math.exp(-6 * sickness),
        "unlifted": 0.02 + 1.2 * sickness,
        "defect": 0.12 + 0.01 * seed + 1.1 * sickness,
        "largest_singular": 1.15,
        "update_rms": 0.004 * (1 - 0.9 * at),
        "weight_rms": 0.03 * (1 + at),
        "update_ratio": 0.1 * (1 - 0.9 * at) * math.exp(8 * sickness),
        "cosine": 0.3 + 0.1 * math.sin(9 * at + seed),
        "spectral_norm": 2 * (1 + at + 4 * sickness),
        "nonfinite": float(sickness > 0.45),
    }
    result: dict[str, Any] = {"matrices": 24}
    for stat in STATS:
        mean = middles[stat] * rng.uniform(0.95, 1.05)
        result[stat] = [0.8 * mean, mean, 1.3 * mean]
        if sickness > 0.45 and stat in ("defect", "stable_rank", "unlifted"):
            result[stat] = [None, None, None]
    return result


def write_record(
    path: Path,
    iterations: int = 200,
    interval: int = 5,
    is_sick: bool = False,
    classes: tuple[str, ...] = CLASSES,
    seed: int = 0,
    flags: dict[str, Any] | None = None,
) -> Path:
    """A whole record of the kinds of :mod:`megatron_muon.monitor.schema`. Without an interval, no ``muon`` lines."""
    rng = random.Random(seed)
    start = {"kind": "start", "iteration": 0, "train_iters": iterations, "world_size": 4, "device": "cuda"}
    start |= {"versions": {"torch": "2.9.0", "megatron-muon": "0.9"}, "flags": {"lr": 0.02 + seed, **(flags or {})}}
    lines: list[dict[str, Any]] = [{**start, "routes": dict.fromkeys(classes, "muon, split in q, k, v")}]
    for i in range(1, iterations + 1):
        at = i / iterations
        loss = 3 + 5 / (1 + 20 * at) + rng.gauss(0, 0.05) + is_sick * 40 * max(0.0, at - 0.7) ** 2
        is_lost = is_sick and at > 0.97
        lines.append(
            {"kind": "train", "iteration": i, "losses": {"lm loss": None if is_lost else loss}, "skipped": 0}
            | {"learning_rate": 0.02 * min(1, 20 * at) * (1 - 0.9 * at), "grad_norm": 0.3 + rng.random() + is_sick * at}
            | {"seconds": 0.5 + 0.02 * rng.random() + (i == 1), "optimizer_seconds": 0.06 + 0.01 * rng.random()}
            | {"max_attention_logit": 10 * math.exp(3 * at * (1 + is_sick)), "heads_clipped": 0}
        )
        if interval and i % interval == 0:
            sick = {c: numbers(s + seed, at, is_sick and s == 2) for s, c in enumerate(classes)}
            times = {t: [0.008 + 0.001 * k, 0.009 + 0.001 * k, 0.011 + 0.001 * k] for k, t in enumerate(TIMES)}
            times |= {"step": [0.06, 0.065, 0.072 + 0.02 * rng.random()]}
            lines.append({"kind": "muon", "iteration": i, "classes": sick, "times": times, "rates": {"lr": 0.02}})
        if i % 20 == 0:
            lines.append({"kind": "valid", "iteration": i, "set": "validation", "losses": {"lm loss": loss + 0.1}})
    if is_sick:
        for share, name, limit in ((0.55, "defect", 0.5), (0.7, "update_ratio", 0.1), (0.75, "dead_experts", 0.0)):
            told = {"since": int((share - 0.05) * iterations), "alarm": name, "weights": list(classes[2:3]), "count": 3}
            told |= {"value": 0.61, "limit": limit, "text": f"{name}: too much of it. Usual cause: lr. Try --lr 0.02."}
            lines.append({"kind": "alarm", "iteration": int(share * iterations), **told})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

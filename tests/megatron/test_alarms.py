"""Failures of real runs on ranks raise their alarm in the record, and no other; a healthy run raises none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.harness import Layout, Run, unwrap
from tests.megatron.test_replicas import MOE
from tests.pool import RankPool

FC2, QKV = "decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.1.self_attention.linear_qkv.weight"

Change = Callable[[Run, int], None]


def param_of(run: Run, name: str) -> Any:
    return dict(unwrap(run.chunks[0]).named_parameters())[name]


def one_direction(run: Run, step: int) -> None:
    grad = param_of(run, FC2).main_grad  # a part of the columns
    whole = torch.linspace(1.0, 2.0, grad.size(1) * dist.get_world_size())
    grad.copy_(
        torch.outer(torch.linspace(-1.0, 1.0, grad.size(0)), whole.chunk(dist.get_world_size())[dist.get_rank()])
    )


def not_a_number(run: Run, step: int) -> None:
    if step == 2 and dist.get_rank() == 1:
        param_of(run, FC2).main_grad.view(-1)[3] = float("nan")


def sharper_attention(run: Run, step: int) -> None:
    param_of(run, QKV).data.mul_(3.0)


def some_experts_alone(run: Run, step: int) -> None:
    for name, buffer in unwrap(run.chunks[0]).named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))


def nothing(run: Run, step: int) -> None:
    pass


# The alarm, what is done before each step, steps to be judged, options, the model.
CASES: dict[str, tuple[str | None, Change, int, dict[str, Any], dict[str, Any]]] = {
    "healthy": (None, nothing, 6, {}, {"log_max_attention_logit": True}),
    "gradients of one direction": ("rank_collapse", one_direction, 24, {}, {}),
    "NaN": ("nonfinite", not_a_number, 3, {"muon_nonfinite": "propagate", "clip_grad": 0.0}, {}),
    "eps": ("norm_at_bound", nothing, 4, {"muon_eps": 1e3}, {}),
    "rate": ("update_ratio", nothing, 2, {"lr": 100.0, "min_lr": 100.0}, {}),
    "attention": ("logits_growing", sharper_attention, 6, {"lr": 1e-4}, {"log_max_attention_logit": True}),
    "experts": ("dead_experts", some_experts_alone, 4, {}, MOE),
}


def train(layout: Layout, name: str, file: str) -> None:
    """A run whose gradients, or weights, are changed before each step."""
    _, change, steps, optimizer, model = CASES[name]
    options = {"muon_log_interval": 1, "muon_log_jsonl": file, **optimizer}
    run = harness.start(layout, optimizer=options, replicas=False, early=True, num_layers=2, **model)
    prepare = run.optimizer.prepare_grads

    def changed() -> Any:
        result = prepare()
        change(run, run.step)
        return result

    run.optimizer.prepare_grads = changed
    if change is some_experts_alone:
        change(run, -1)
    run.losses(steps + 1)  # a step is judged when the next one begins


QUICK = ("NaN", "experts")
"""The others judge numbers as tests/unit/test_monitor_alarms.py makes them up."""


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in CASES]
)
def test_failures_raise_their_alarm_and_no_other(pool: RankPool, tmp_path: Path, name: str) -> None:
    file = tmp_path / "metrics.jsonl"
    pool.run(train, 2, Layout(ep=2) if name == "experts" else Layout(tp=2), name, str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["kind"] for line in lines} >= {"muon"}
    alarms = [line for line in lines if line["kind"] == "alarm"]
    wanted = CASES[name][0]
    assert [each["alarm"] for each in alarms] == ([wanted] if wanted else [])
    if name == "experts":
        assert all(".local_experts.1." in each or ".local_experts.3." in each for each in alarms[0]["weights"])
        assert alarms[0]["count"] == 12

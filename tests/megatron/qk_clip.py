"""Models with QK-clip on ranks of the pool."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.qk_clip.clip import QKClip
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import MLA

GQA = {"num_query_groups": 2}
LATENT = {**MLA, "qk_layernorm": False}


def plain_optimizer(model: torch.nn.Module, layout: Layout) -> Any:
    """Megatron's wrapper of an optimizer that changes nothing."""
    from megatron.core.optimizer.optimizer import FP32Optimizer

    config = harness.optimizer_config(layout, name="sgd")
    return FP32Optimizer(torch.optim.SGD(model.parameters(), lr=0.0), config, None)


def forward(chunk: torch.nn.Module, sequences: int = 4) -> None:
    batch = torch.arange(sequences * 16).view(sequences, 16) * 7 % 64
    mask = torch.ones(1, 1, 16, 16).tril() < 0.5
    chunk(batch, torch.arange(16).expand(sequences, -1), mask)


def connect(chunks: list, optimizer: Any, options: dict[str, Any]) -> QKClip:
    """The clip of a model whose optimizer was not built by Megatron's function."""
    from megatron_muon.plugin.groups import ranks_of
    from megatron_muon.plugin.qk_clip_build import build_clip

    clip = build_clip(optimizer.config, chunks, MuonConfig(**options), optimizer, ranks_of(None))
    assert clip is not None
    return clip


def small_run(**changes: Any) -> Any:
    values: dict[str, Any] = {"qk_clip": True, "qk_clip_threshold": 0.05, **GQA, **changes}
    return harness.start(Layout(tp=dist.get_world_size()), **values)

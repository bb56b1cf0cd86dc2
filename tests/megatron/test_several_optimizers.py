"""Several optimizers of one model, with options of their own, saved in one checkpoint under names of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.test_qk_clip_models import GQA, PP2, build
from tests.pool import RankPool

ATTENTION = {"muon_qkv": "per_head", "muon_param_rule": ("*.linear_proj.weight=adam",)}


def pair() -> tuple[harness.Run, dict[str, Any]]:
    """Attention by one optimizer, the rest by another; each is built while what is not its own is frozen."""
    run = build(("*self_attention*",), **GQA)
    from megatron.core.optimizer import get_megatron_optimizer

    for name, param in run.chunks[0].named_parameters():
        param.requires_grad_("self_attention" in name)
    attention = get_megatron_optimizer(harness.optimizer_config(PP2, **ATTENTION), run.chunks)
    for param in run.chunks[0].parameters():
        param.requires_grad_(True)
    return run, {"rest": run.optimizer, "attention": attention}


def losses(run: harness.Run, optimizers: dict[str, Any], order: str) -> list[float]:
    found = []
    for name in order.split():
        run.optimizer = optimizers[name]
        found += run.losses(1)
    return found


def state_of(run: harness.Run, optimizers: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
    state = harness.model_state(run.chunks)
    return {
        **state,
        **{
            name: optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=harness.CHECKPOINT_METADATA)
            for name, optimizer in optimizers.items()
        },
    }


def resumed(folder: str) -> tuple[list[float], list[float]]:
    from megatron.core import dist_checkpointing

    run, optimizers = pair()
    losses(run, optimizers, "rest rest attention")
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    dist_checkpointing.save(state_of(run, optimizers), folder)
    expected = losses(run, optimizers, "attention rest attention")
    other, optimizers = pair()
    loaded = dist_checkpointing.load(state_of(other, optimizers, is_loading=True), folder)
    harness.load_model(other.chunks[0], loaded["model"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(loaded[name])
    other.step = 3
    return expected, losses(other, optimizers, "attention rest attention")


def test_each_goes_on_with_its_own_state_and_steps(pool: RankPool, tmp_path: Path) -> None:
    for expected, found in pool.run(resumed, 2, str(tmp_path / "checkpoint")):
        assert expected == found

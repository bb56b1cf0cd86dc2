"""Several optimizers, with options of their own, saved in one checkpoint under names of the user's: of one model, or of
two models of which one lives on fewer ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.megatron import harness, mimo
from tests.megatron.harness import CHECKPOINT_METADATA, Layout
from tests.megatron.layers import layer_spec, transformer_config
from tests.megatron.loading import FINE, Outcome, failure
from tests.megatron.test_checkpoint_damage import flip_bit_of
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


# --- two models ------------------------------------------------------------------------------------------------------


def models(seed: int) -> dict[str, tuple[Any, Any]]:
    """One on both ranks, in shards, and one on the first rank, each with its optimizer."""
    run = harness.start(Layout(tp=2), num_layers=1, seed=seed)
    found = {"": (run.chunks[0], run.optimizer)}
    groups = mimo.groups_of(mimo.grid_of(0, 1, 1))
    if groups is not None:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.optimizer import get_megatron_optimizer

        config = transformer_config(Layout(), num_layers=1)
        critic = GPTModel(config, layer_spec(config), 64, 16, position_embedding_type="rope", pg_collection=groups)
        chunks = harness.wrap([critic], Layout(overlap=False), groups=groups)
        options = harness.optimizer_config(Layout(overlap=False))
        optimizer = get_megatron_optimizer(options, chunks, use_gloo_process_groups=False, pg_collection=groups)
        found["critic."] = chunks[0], optimizer
    return found


def asked(models: dict[str, tuple[Any, Any]], is_loading: bool) -> dict[str, Any]:
    state = {}
    for prefix, (chunk, optimizer) in models.items():
        state[f"{prefix}model"] = model = harness.unwrap(chunk).sharded_state_dict(prefix=prefix)
        state[f"{prefix}optimizer"] = optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=CHECKPOINT_METADATA
        )
    return state


def load_two_models(folder: str) -> list[Outcome]:
    """As they were saved; then with one bit of a weight changed, of each model."""
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    dist_checkpointing.save(asked(models(1), False), folder)
    found = []
    for key in ("", "critic.decoder.layers.mlp.linear_fc2.weight", "decoder.layers.mlp.linear_fc2.weight"):
        if key and dist.get_rank() == 0:
            flip_bit_of(key, Path(folder))
        dist.barrier()
        again = models(2)
        found.append(failure(lambda again=again: dist_checkpointing.load(asked(again, True), folder)))
    return found


def test_each_model_is_compared_by_its_own_ranks(pool: RankPool, tmp_path: Path) -> None:
    for fine, of_critic, of_both in pool.run(load_two_models, 2, str(tmp_path / "checkpoint")):
        assert fine == FINE
        assert "  weight of critic.decoder.layers.mlp.linear_fc2.weight[0]" in of_critic[1]
        assert "  weight of decoder.layers.mlp.linear_fc2.weight[0]" in of_both[1]

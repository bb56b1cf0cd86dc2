"""Megatron-Core on gloo ranks: every kind of parallelism trains the same model with Adam.

Weights start from one checkpoint and each step has its own global batch, so losses must agree. float32: layouts add the
same numbers in another order, which costs about 1e-7 in each step, and Adam with gradient clipping keeps that small.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.slow import with_slow

STEPS = 4
TOLERANCE = 2e-5
ADAM = {"name": "adam", "clip_grad": 0.5}

DENSE: dict[str, Any] = {"normalization": "LayerNorm", "add_bias_linear": True}
MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_token_dispatcher_type": "alltoall",
}
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_query_groups": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
}
HYBRID: dict[str, Any] = {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MODELS = {"dense": DENSE, "moe": MOE, "mla": MLA, "hybrid": HYBRID}


def train(layout: Layout, weights: str, **options: Any) -> list[float]:
    """Losses of a few steps from the weights in a folder, of the modules that the CPU runtime chooses."""
    layout = dataclasses.replace(layout, local=True)
    warnings.simplefilter("ignore")
    return harness.start(layout, weights=weights, optimizer=ADAM, **options).losses(STEPS)


@pytest.fixture(scope="module")
def starts(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[float]]]:
    """For each model: a folder of initial weights, and the losses on one rank."""
    folder = tmp_path_factory.mktemp("cpu")
    found = {}
    for name, model in MODELS.items():
        weights = str(folder / name)
        pool.run(harness.save_initial_weights, 1, weights, local=True, **model)
        found[name] = (weights, pool.run(train, 1, Layout(), weights, **model)[0])
    return found


CASES = {
    "dense-tp2": ("dense", 2, Layout(tp=2)),
    "dense-tp2-sp": ("dense", 2, Layout(tp=2, sp=True)),
    "dense-pp2": ("dense", 2, Layout(pp=2)),
    "dense-pp2-vpp2": ("dense", 2, Layout(pp=2, vpp=2)),
    "dense-tp2-pp2-vpp2": ("dense", 4, Layout(tp=2, pp=2, vpp=2)),
    "dense-dp2": ("dense", 2, Layout()),
    "dense-dp2-buffers": ("dense", 2, Layout(ddp_buffers=True)),
    "moe-ep2": ("moe", 2, Layout(ep=2)),
    "moe-ep2-tp2-etp2-sp": ("moe", 4, Layout(ep=2, tp=2, etp=2, sp=True)),
    "moe-ep4-tp2-etp1-sp": ("moe", 4, Layout(ep=4, tp=2, etp=1, sp=True)),
    "mla-tp2": ("mla", 2, Layout(tp=2)),
    "mla-tp2-sp": ("mla", 2, Layout(tp=2, sp=True)),
    "hybrid-tp2": ("hybrid", 2, Layout(tp=2)),
    "hybrid-dp2-buffers": ("hybrid", 2, Layout(ddp_buffers=True)),
}


SLOW = (
    *("dense-tp2-sp", "dense-pp2", "dense-dp2", "moe-ep2-tp2-etp2-sp", "moe-ep4-tp2-etp1-sp", "mla-tp2-sp"),
    *("hybrid-dp2-buffers", "dense-tp2", "dense-pp2-vpp2"),
)


@pytest.mark.parametrize("case", with_slow(CASES, *SLOW))
def test_losses_equal_those_of_one_rank(pool: RankPool, starts: dict[str, tuple[str, list[float]]], case: str) -> None:
    name, world_size, layout = CASES[case]
    weights, reference = starts[name]
    losses = pool.run(train, world_size, layout, weights, **MODELS[name])
    assert all(rank == losses[0] for rank in losses)
    assert losses[0] == pytest.approx(reference, abs=TOLERANCE)
    assert reference[-1] != pytest.approx(reference[0], abs=100 * TOLERANCE), "the weights must have changed"


def test_dispatchers_agree(pool: RankPool, starts: dict[str, tuple[str, list[float]]]) -> None:
    weights, reference = starts["moe"]
    options = MOE | {"moe_token_dispatcher_type": "allgather"}
    assert pool.run(train, 2, Layout(ep=2), weights, **options)[0] == pytest.approx(reference, abs=TOLERANCE)


def test_bf16_trains(pool: RankPool, starts: dict[str, tuple[str, list[float]]]) -> None:
    weights, reference = starts["dense"]
    losses = pool.run(train, 2, Layout(tp=2, sp=True), weights, bf16=True, **DENSE)[0]
    assert losses == pytest.approx(reference, rel=2**-8)  # bfloat16 has eight bits; 1.2e-3 was measured


def grad_norms(layout: Layout, weights: str, **options: Any) -> tuple[float, float]:
    """Gradient norm as reported after a clipped step, and of the gradients clipped once more, over the whole model."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    run = harness.start(layout, weights=weights, optimizer=ADAM | {"clip_grad": 0.1}, **options)
    run.losses(1)
    run.optimizer.prepare_grads()
    norm = run.optimizer.get_grad_norm()
    for optimizer in run.optimizer.chained_optimizers:
        optimizer.clip_grad_norm(0.1)
    total = torch.zeros(1)
    for optimizer in run.optimizer.chained_optimizers:
        for param in optimizer.get_parameters():
            if param.grad is not None and param_is_not_tensor_parallel_duplicate(param):
                total += param.grad.square().sum()
    if layout.tp > 1:
        dist.all_reduce(total)
    return norm, total.sqrt().item()


def test_gradient_clipping(pool: RankPool, starts: dict[str, tuple[str, list[float]]]) -> None:
    weights, _ = starts["dense"]
    one = pool.run(grad_norms, 1, Layout(), weights, **DENSE)[0]
    two = pool.run(grad_norms, 2, Layout(tp=2), weights, **DENSE)
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, rel=1e-4)


def resume(folder: str, layout: Layout, load: bool, weights: str, param_layout: bool = True, **optimizer: Any) -> Any:
    """Train two steps and save, or load and train on; the losses of two further steps."""
    from megatron.core import dist_checkpointing

    bf16 = layout.layer_wise
    run = harness.start(
        layout, weights=weights, optimizer=ADAM | optimizer, bf16=bf16, param_layout=param_layout, **DENSE
    )
    metadata = {"distrib_optim_sharding_type": "dp_reshardable"}

    def state(is_loading: bool) -> dict[str, Any]:
        model = harness.model_state(run.chunks)
        own = run.optimizer.sharded_state_dict(model["model"], is_loading=is_loading, metadata=metadata)
        return model | {"optimizer": own}

    if load:
        loaded = dist_checkpointing.load(state(is_loading=True), folder)
        harness.unwrap(run.chunks[0]).load_state_dict(loaded["model"])
        run.optimizer.load_state_dict(loaded["optimizer"])
        run.step = 2
    else:
        run.losses(2)
        import torch.distributed as dist

        if dist.get_rank() == 0:
            Path(folder).mkdir()
        dist.barrier()
        dist_checkpointing.save(state(is_loading=False), folder)
    return run.losses(2)


RESUMES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "adam-tp2": (Layout(tp=2), {}),
    "adam-dp2-buffers": (Layout(ddp_buffers=True), {}),
    "muon-layer-wise": (Layout(layer_wise=True), {"name": "muon"}),
    "muon-layer-wise-legacy": (Layout(layer_wise=True), {"name": "muon", "param_layout": False}),
}


@pytest.mark.parametrize("case", with_slow(RESUMES, "adam-tp2", "muon-layer-wise", "muon-layer-wise-legacy"))
def test_resume_equals_going_on(
    pool: RankPool, starts: dict[str, tuple[str, list[float]]], tmp_path: Path, case: str
) -> None:
    weights, _ = starts["dense"]
    layout, options = RESUMES[case]
    folder = str(tmp_path / "checkpoint")
    went_on = pool.run(resume, 2, folder, layout, False, weights, **options)
    resumed = pool.run(resume, 2, folder, layout, True, weights, **options)
    assert resumed == went_on


def dropout_masks(weights: str) -> list[float]:
    """Losses with dropout, where ranks of a tensor-parallel group must agree on the masks of hidden states."""
    from torch.utils.data import DataLoader

    run = harness.start(Layout(tp=2), weights=weights, optimizer=ADAM, hidden_dropout=0.2, **DENSE)
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 0:  # as Megatron does: only the first rank of the group reads data
        next(iter(DataLoader(torch.arange(8), batch_size=2, pin_memory=True)))
    losses = run.losses(2)
    norm = next(p for n, p in run.chunks[0].named_parameters() if n.endswith("final_layernorm.weight"))
    gathered = [torch.empty_like(norm) for _ in range(2)]
    dist.all_gather(gathered, norm.detach())
    assert torch.equal(*gathered), "replicated weights have drifted apart"
    return losses


def test_replicas_draw_the_same_dropout(pool: RankPool, starts: dict[str, tuple[str, list[float]]]) -> None:
    weights, reference = starts["dense"]
    losses = pool.run(dropout_masks, 2, weights)
    assert losses[0] == losses[1]
    assert losses[0] != pytest.approx(reference[:2], abs=TOLERANCE)


def threads_after_rounds(rounds: int) -> list[int]:
    """The threads of this rank after each of some models with process groups of their own."""
    from megatron.core import parallel_state

    counts = []
    for _ in range(rounds):
        train_once = harness.start(Layout(tp=2), optimizer=ADAM)
        train_once.losses(1)
        parallel_state.destroy_model_parallel()
        del train_once
        gc.collect()
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    return counts


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux shows them")
def test_threads_of_destroyed_groups_end(pool: RankPool) -> None:
    for counts in pool.run(threads_after_rounds, 2, 4):
        assert len(set(counts)) == 1

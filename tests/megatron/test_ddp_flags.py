"""Layer-wise runs under the flags of DDP: the losses of one process, and replicas that are equal bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_routing import MOE
from tests.pairwise import covering
from tests.pool import RankPool

STEPS = 4
TOLERANCE = {False: 4e-6, True: 8e-3}
"""By whether numbers have 16 bits: losses are about 4. At most 4e-7 was measured in float32, 3e-3 in bfloat16."""
BUCKET = 6000
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def start(layout: Layout, weights: str, ddp: dict[str, Any], param_layout: bool, overlap: bool, **options: Any) -> Run:
    """``overlap``: the optimizer's ``overlap_param_gather``."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import wrap_model_chunks_with_ddp

    layout.initialize()
    bf16 = options.pop("bf16", False)
    chunks = harness.build_model(layout, bf16=bf16, **options)
    later = [number > 0 for number in range(len(chunks))]
    bucket = None if parallel_state.get_pipeline_model_parallel_rank() > 0 else BUCKET
    chunks = wrap_model_chunks_with_ddp(
        chunks,
        harness.unwrap(chunks[0]).config,
        DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, "bucket_size": BUCKET, **ddp}),
        use_layer_wise_distributed_optimizer=layout.layer_wise,
        use_layer_wise_param_layout=param_layout,
        bucket_sizes=[None if each else bucket for each in later],
        disable_bucketing_per_chunk=later,
    )
    if ddp.get("overlap_grad_reduce"):
        no_sync = [chunk.no_sync for chunk in chunks]
        harness.unwrap(chunks[0]).config.no_sync_func = no_sync if layout.vpp else no_sync[0]
    harness.load_weights(chunks, weights)
    config = harness.optimizer_config(layout, bf16=bf16, overlap_param_gather=overlap)
    return Run(layout, chunks, get_megatron_optimizer(config, chunks))


def train(*args: Any, **kwargs: Any) -> tuple[list[float], list[float], list[str]]:
    """Losses, gradient norms, and the weights that differ between replicas.

    Weights are gathered by force, as before evaluation, after every other step; or else by the next forward pass.
    """
    run = start(*args, **kwargs)
    losses, differ = [], []
    for _ in range(STEPS // 2):
        losses += run.losses(2)
        for chunk in run.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook()
        differ += [name for chunk in run.chunks for name in different(chunk)]
        for chunk in run.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.enable_forward_pre_hook()
    return losses, run.gradient_norms, differ


def different(chunk: Any) -> list[str]:
    """Weights whose replicas are not equal bit for bit."""
    found = []
    for name, param in chunk.named_parameters():
        group = chunk.dp_cp_group if getattr(param, "allreduce", True) else chunk.expt_dp_group
        replicas = [torch.empty_like(param.data) for _ in range(group.size())]
        dist.all_gather(replicas, param.data, group=group)
        found += [name] if any(not torch.equal(replicas[0], other) for other in replicas) else []
    return found


@pytest.fixture(scope="module")
def references(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Initial weights by whether there are experts, and the losses of one process by that and by precision."""
    found: dict[Any, Any] = {}
    for experts, model in ((False, {}), (True, MOE)):
        found[experts] = str(tmp_path_factory.mktemp("weights") / "initial")
        pool.run(harness.save_initial_weights, 1, found[experts], **model)
        for bf16 in (False, True):
            run = pool.run(train, 1, Layout(), found[experts], {}, True, False, bf16=bf16, **model)
            found[experts, bf16] = run[0][0]
    return found


def chosen(*factors: Any) -> list[tuple[Any, ...]]:
    """Cases that bring each pair of values together."""
    values = [list(factor) for factor in factors]
    places = covering([len(each) for each in values])
    return [tuple(each[place] for each, place in zip(values, case, strict=True)) for case in places]


FLAGS: dict[str, dict[str, Any]] = {
    "none": {},
    "padded": {"pad_buckets_for_high_nccl_busbw": True},
    "averaged": {"average_in_collective": True},
    "own_precision": {"grad_reduce_in_fp32": False},
    "own_precision_averaged": {"grad_reduce_in_fp32": False, "average_in_collective": True},
    "accumulated": {"grad_reduce_in_fp32": False, "reduce_scatter_with_fp32_accumulation": True},
    "local_fp32": {"grad_reduce_in_fp32": False, "param_name_patterns_for_fp32_local_accumulation": ("*fc1*",)},
}
LAYOUTS: dict[str, tuple[int, Layout, bool]] = {
    "dp2": (2, Layout(layer_wise=True), False),
    "vpp": (4, Layout(pp=2, vpp=2, layer_wise=True), False),
    "ep2": (2, Layout(ep=2, layer_wise=True), True),
    "tp2": (4, Layout(tp=2, sp=True, layer_wise=True), False),
    "ep2_dp2": (4, Layout(ep=2, layer_wise=True), True),
}
FAST = {
    *(("dp2", False, "padded"), ("dp2", True, "own_precision_averaged"), ("vpp", False, "accumulated")),
    ("ep2", True, "averaged"),
}


@pytest.mark.parametrize(
    ("name", "bf16", "flags"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in sorted({*FAST, *chosen(LAYOUTS, (False, True), FLAGS)})
    ],
)
def test_buckets(pool: RankPool, references: dict[Any, Any], name: str, bf16: bool, flags: str) -> None:
    """Several, which are reduced and gathered during the passes; by both of Megatron-Core's ways."""
    world, layout, experts = LAYOUTS[name]
    for param_layout in [True] if flags == "accumulated" else [True, False]:
        ddp = {**OVERLAP, **FLAGS[flags]}
        model = MOE if experts else {}
        ranks = pool.run(train, world, layout, references[experts], ddp, param_layout, True, bf16=bf16, **model)
        assert all(rank[0] == ranks[0][0] and rank[2] == [] for rank in ranks)
        assert ranks[0][0] == pytest.approx(references[experts, bf16], abs=TOLERANCE[bf16])


def overlapping(weights: str, param_layout: bool, bf16: bool) -> list[tuple[list[float], list[float], list[str]]]:
    """Runs on a rank: each side says yes or no to ``overlap_param_gather``."""
    layout = Layout(layer_wise=True)
    grads = {"overlap_grad_reduce": True}
    return [
        train(layout, weights, {**grads, "overlap_param_gather": of_ddp}, param_layout, of_optimizer, bf16=bf16)
        for of_ddp in (False, True)
        for of_optimizer in (False, True)
    ]


@pytest.mark.parametrize("param_layout", [True, False], ids=["layout", "lists"])
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_who_says_when_weights_are_gathered(
    pool: RankPool, references: dict[Any, Any], param_layout: bool, bf16: bool
) -> None:
    """DDP does, whatever the optimizer's config says: the same bits at whatever time they travel."""
    for runs in pool.run(overlapping, 2, references[False], param_layout, bf16):
        assert all(run == runs[0] for run in runs) and runs[0][2] == []
        assert runs[0][0] == pytest.approx(references[False, bf16], abs=TOLERANCE[bf16])

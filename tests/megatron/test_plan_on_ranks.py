"""A plan is what real optimizers hold and do on real ranks."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_muon import Muon
from megatron_muon.engine import MODES
from megatron_muon.engine.modes import Machine
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.planner import GROUPS, TINY, Planner
from tests.megatron.test_routing import GDN, MLA
from tests.pool import RankPool

EXPERTS = shlex.split(
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-token-dispatcher-type allgather"
)
EXPERT_MODEL = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_grouped_gemm": False}
DELTA = shlex.split("""
    --experimental-attention-variant gated_delta_net --linear-attention-freq 2 --linear-conv-kernel-dim 4
    --linear-key-head-dim 8 --linear-value-head-dim 8 --linear-num-key-heads 2 --linear-num-value-heads 4
    --attention-output-gate
""")
LATENT = shlex.split("""
    --multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8
    --qk-layernorm --rope-type rope
""")


@dataclass
class Measured:
    """Of one rank.

    Attributes:
        parameter_bytes: of its weights.
        state_bytes: of its optimizer state.
        flops: of one real step, by torch's count.
        counted_flops: by the engines' counters.
        bytes: sent to other ranks, likewise.
        collectives: likewise.
    """

    parameter_bytes: int
    state_bytes: int
    flops: int
    counted_flops: int
    bytes: float
    collectives: int


def measured(layout: Layout, bf16: bool, options: dict[str, Any]) -> Measured:
    """Runs on a rank: what it holds, and what it does in one real step."""
    # A plan is for an accelerator: mode auto must weigh operations and bytes by its rates here too.
    with mock.patch.object(Machine, "of", return_value=Machine.of("cuda")):
        run = harness.start(layout, bf16=bf16, **options)
        run.losses(1)
    for chunk in run.chunks:
        for param in chunk.parameters():
            param.main_grad = torch.ones_like(param, dtype=torch.float32)
    for muon in muons(run.optimizer):
        muon.prepare()
    engines = [engine for muon in muons(run.optimizer) for engine in muon.engines]
    for engine in engines:
        engine.counters.reset()
    with FlopCounterMode(display=False) as counter:
        run.optimizer.step()
    return Measured(
        sum(param.numel() * param.element_size() for chunk in run.chunks for param in chunk.parameters()),
        state_bytes(run.optimizer, bf16),
        counter.get_total_flops(),
        sum(engine.counters.flops for engine in engines),
        sum(engine.counters.bytes for engine in engines),
        sum(engine.counters.collectives for engine in engines),
    )


def muons(optimizer: Any) -> list[Muon]:
    """All instances in an optimizer of Megatron's."""
    if hasattr(optimizer, "chained_optimizers"):
        return [muon for part in optimizer.chained_optimizers for muon in muons(part)]
    return [optimizer.optimizer] if isinstance(optimizer.optimizer, Muon) else []


def state_bytes(optimizer: Any, main_copies: bool) -> int:
    """Moments, and main copies where they are not the model's own weights."""
    if hasattr(optimizer, "chained_optimizers"):
        return sum(state_bytes(part, main_copies) for part in optimizer.chained_optimizers)
    inner = optimizer.optimizer
    tensors = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    tensors = [tensor for tensor in tensors if tensor.dim() > 0]  # not Adam's count of steps
    if main_copies:
        tensors += [param for group in inner.param_groups for param in group["params"]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_mode(mode: str, ranks: int) -> tuple[list[str], dict[str, Any]]:
    """Flags of the plan, and options of the run, for a mode of tensor parallelism; in float32, which all modes do."""
    flags = ["--tensor-model-parallel-size", str(ranks), "--muon-tp-mode", mode]
    return flags, {"optimizer": {"muon_tp_mode": mode, "muon_fp32_matmul_prec": "highest"}}


def variant(name: str, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """Flags of the plan, and options of the run."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return ["--optimizer", name, *flags], {"optimizer": {"name": name, **options}}


STIEFEL_FLAGS, STIEFEL_OPTIONS = variant("stiefel_muon", muon_param_rule="*.linear_qkv.weight=stiefel")
STIEFEL_OPTIONS["optimizer"]["muon_param_rule"] = ("*.linear_qkv.weight=stiefel",)
ADAMUON_FLAGS, ADAMUON_OPTIONS = variant("adaptive_muon", adaptive_muon_moment2_method="adamuon")

CASES = {
    "plain": (Layout(), 1, [], {}),
    "adamuon": (Layout(), 1, ADAMUON_FLAGS, ADAMUON_OPTIONS),
    "adamuon, layer-wise": (
        Layout(layer_wise=True),
        2,
        [*ADAMUON_FLAGS, "--use-distributed-optimizer"],
        ADAMUON_OPTIONS,
    ),
    "normuon": (Layout(), 1, *variant("adaptive_muon", adaptive_muon_moment2_method="normuon")),
    "manifold": (Layout(), 1, STIEFEL_FLAGS, STIEFEL_OPTIONS),
    "manifold, tensor": (Layout(tp=2), 2, ["--tensor-model-parallel-size", "2", *STIEFEL_FLAGS], STIEFEL_OPTIONS),
    "manifold, layer-wise": (
        Layout(layer_wise=True),
        2,
        [*STIEFEL_FLAGS, "--use-distributed-optimizer"],
        STIEFEL_OPTIONS,
    ),
    **{f"tensor {mode}": (Layout(tp=2), 2, *in_mode(mode, 2)) for mode in MODES},
    "four tensor-parallel ranks": (Layout(tp=4), 4, ["--tensor-model-parallel-size", "4"], {}),
    "cut query groups, owner": (Layout(tp=4), 4, *in_mode("owner", 4)),
    "pipeline": (Layout(pp=2), 2, ["--pipeline-model-parallel-size", "2"], {}),
    "layer-wise": (Layout(layer_wise=True), 2, ["--use-distributed-optimizer"], {}),
    "layer-wise, four replicas": (Layout(layer_wise=True), 4, ["--use-distributed-optimizer"], {}),
    "layer-wise, older assignment": (
        Layout(layer_wise=True),
        2,
        ["--use-distributed-optimizer", "--no-use-layer-wise-param-layout"],
        {"param_layout": False},
    ),
    "layer-wise, tensor": (
        Layout(tp=2, layer_wise=True),
        4,
        ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer"],
        {},
    ),
    "layer-wise, virtual stages": (
        Layout(pp=2, vpp=2, layer_wise=True),
        4,
        [
            *("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
            "--use-distributed-optimizer",
        ],
        {},
    ),
    "rows under Adam's rule": (
        Layout(tp=2),
        2,
        ["--tensor-model-parallel-size", "2", "--muon-gdn-in-proj", "split", *DELTA],
        {**GDN, "optimizer": {"muon_gdn_in_proj": "split"}},
    ),
    "heads alone": (Layout(tp=2), 2, ["--tensor-model-parallel-size", "2", *LATENT], MLA),
    "experts": (
        Layout(ep=2),
        2,
        ["--expert-model-parallel-size", "2", *EXPERTS],
        EXPERT_MODEL,
    ),
    "layer-wise, experts": (
        Layout(ep=2, layer_wise=True),
        4,
        ["--expert-model-parallel-size", "2", "--use-distributed-optimizer", *EXPERTS],
        {**EXPERT_MODEL, "add_bias_linear": True},
    ),
    "layer-wise, copies of experts alone": (
        Layout(tp=2, etp=1, sp=True, layer_wise=True),
        2,
        [
            *("--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1", "--sequence-parallel"),
            *("--use-distributed-optimizer", *EXPERTS),
        ],
        EXPERT_MODEL,
    ),
}


BUCKETS = ["--overlap-grad-reduce", "--ddp-bucket-size", str(Layout.bucket_size)]
QUICK_IN_BF16 = ("tensor auto",)
SLOW_IN_FP32 = (
    *("plain", "adamuon", "manifold", "manifold, layer-wise", "tensor auto", "four tensor-parallel ranks"),
    *("pipeline", "layer-wise", "layer-wise, four replicas", "layer-wise, tensor", "experts"),
)
"""Parts of them are in other cases, which have two things at once."""


def case(name: str, bf16: bool) -> Any:
    slow = name not in QUICK_IN_BF16 if bf16 else name in SLOW_IN_FP32
    return pytest.param(name, bf16, id=f"{name}-{'bf16' if bf16 else 'fp32'}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("name", "bf16"), [case(name, bf16) for bf16 in (False, True) for name in CASES])
def test_plan_is_what_ranks_do(pool: RankPool, planner: Planner, name: str, bf16: bool) -> None:
    """Bytes and operations of every rank's real optimizer have the mean and the maximum that the plan tells."""
    layout, world, flags, options = CASES[name]
    # Newton-Schulz in bfloat16 for models in bfloat16, unless the case says otherwise.
    muon = {"muon_fp32_matmul_prec": "medium" if bf16 else "highest", **options.get("optimizer", {})}
    options, precision = {**options, "optimizer": muon}, muon["muon_fp32_matmul_prec"]
    groups = [] if flags[-len(LATENT) :] == LATENT else GROUPS
    flags = [*TINY, *BUCKETS, *groups, *flags, "--muon-fp32-matmul-prec", precision, *(["--bf16"] if bf16 else [])]
    if options.get("add_bias_linear"):
        flags.remove("--disable-bias-linear")
    document = planner.document(flags, world)
    figures, mode = document["all_ranks"], muon.get("muon_tp_mode", "auto")
    in_mode = document["tensor_parallel_modes"][mode]
    ranks = pool.run(measured, world, layout, bf16, options)
    for figure, planned in {
        "parameter_bytes": figures["parameter_bytes"],
        "state_bytes": figures["optimizer_state_bytes"],
        "counted_flops": figures["newton_schulz_flops"],
        "bytes": in_mode["exchanged_bytes"],
        "collectives": in_mode["collectives"],
        "flops": in_mode["newton_schulz_flops"],
    }.items():
        values = [getattr(rank, figure) for rank in ranks]
        assert max(values) == planned["max"], figure
        assert sum(values) / world == pytest.approx(planned["mean"], rel=1e-12), figure

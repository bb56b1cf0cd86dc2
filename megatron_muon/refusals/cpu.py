"""What cannot work on the CPU: settings that are changed (and reported), and those that are refused.

A setting is *changed* where the same training can be done another way (NCCL -> gloo, a fused kernel -> its plain form);
it is *refused* where nothing can do what was asked. A ``TransformerConfig`` made in code is never changed: whoever
writes it can write the right value at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_muon.choices import OPTIMIZERS
from megatron_muon.refusals.megatron import YAML
from megatron_muon.refusals.rule import Condition, Refusal, given, one_of, that

_CPU = "on the CPU"


@dataclass(frozen=True)
class Change:
    """A value that is replaced."""

    name: str  # of the setting
    value: Any  # what it becomes
    reason: str  # why
    applies: Callable[[Any], bool] = bool  # to which values


TE = "transformer_engine"

CHANGES: tuple[Change, ...] = (
    Change("distributed_backend", "gloo", "NCCL needs GPUs", lambda backend: "nccl" in str(backend)),
    Change(
        "transformer_impl",
        "local",
        "TransformerEngine's modules need a GPU",
        lambda value: value == "transformer_engine",
    ),
    Change("gradient_accumulation_fusion", False, "an Apex kernel"),
    Change("masked_softmax_fusion", False, "a CUDA kernel"),
    Change("apply_rope_fusion", False, "a TransformerEngine kernel"),
    Change("moe_permute_fusion", False, "a TransformerEngine kernel"),
    Change("moe_router_fusion", False, "a TransformerEngine kernel"),
    Change("moe_grouped_gemm", False, "a TransformerEngine kernel; experts run one after the other"),
    Change("tp_comm_overlap", False, "TransformerEngine's user buffers"),
    Change("te_rng_tracker", False, "TransformerEngine's random number tracker needs a GPU"),
    Change("use_te_activation_func", False, "a TransformerEngine kernel"),
)

IN_CONFIG: tuple[Refusal, ...] = tuple(
    Refusal(
        (that(f"TransformerConfig.{change.name}", change.applies, ""),),
        change.reason,
        f"use {change.name}={change.value!r}",
        _CPU,
    )
    for change in CHANGES
    # transformer_impl only selects a layer specification, which whoever builds a config in code selects too.
    if change.name != "transformer_impl"
)
"""What is changed in arguments, refused in a config."""


_LEAVE_OUT = "leave the flag out"

_NSIGHT = replace(
    given("profile"),
    holds=lambda settings: settings["profile"] and not settings.get("use_pytorch_profiler"),
    words="`--profile` without `--use-pytorch-profiler`",
)

_PRECISION_AWARE = replace(
    given("use_precision_aware_optimizer"),
    holds=lambda settings: (
        settings["use_precision_aware_optimizer"]
        and (settings.get("optimizer") or "").removeprefix("dist_") not in OPTIMIZERS
    ),
    words="`--use-precision-aware-optimizer` with an optimizer of Megatron's",
)

_REFUSED: tuple[tuple[Condition, str, str], ...] = (
    *((given(f"fp{bits}"), f"FP{bits} needs TransformerEngine and a GPU", "use --bf16 or fp32") for bits in (8, 4)),
    (given("enable_cuda_graph"), "CUDA graphs need a GPU", _LEAVE_OUT),
    (given("external_cuda_graph"), "CUDA graphs need a GPU", _LEAVE_OUT),
    (given("optimizer_cuda_graph"), "CUDA graphs need a GPU", _LEAVE_OUT),
    (
        that("cuda_graph_impl", lambda value: value not in (None, "none"), "other than `none`"),
        "CUDA graphs need a GPU",
        "use --cuda-graph-impl none",
    ),
    (
        that(
            "attention_backend", lambda value: getattr(value, "name", value) in ("flash", "fused"), "`flash`, `fused`"
        ),
        "its kernels need a GPU",
        "use --attention-backend auto or unfused",
    ),
    (given("use_flash_attn"), "flash attention needs a GPU", _LEAVE_OUT),
    (given("use_megatron_fsdp"), "Megatron-FSDP needs NCCL", "use --use-distributed-optimizer"),
    (given("use_torch_fsdp2"), "FSDP2 is not supported", "use --use-distributed-optimizer"),
    (_PRECISION_AWARE, "it needs TransformerEngine's FusedAdam and a GPU", _LEAVE_OUT),
    (given("optimizer_cpu_offload"), "the optimizer is there already", _LEAVE_OUT),
    (given("fine_grained_activation_offloading"), "activations are there already", _LEAVE_OUT),
    (given("cpu_offloading_num_layers"), "activations are there already", _LEAVE_OUT),
    (
        that("recompute_modules", lambda names: "moe_act" in (names or ()), "`moe_act`"),
        "moe_act belongs to the grouped experts of TransformerEngine",
        "leave it out of the list",
    ),
    (
        one_of("experimental_attention_variant", "dsa"),
        "DeepSeek's sparse attention needs TransformerEngine and a GPU",
        "use --multi-latent-attention without it",
    ),
    (
        that("hybrid_layer_pattern", lambda pattern: "D" in (pattern or ""), "with `D`"),
        "DeepSeek's sparse attention (D) needs TransformerEngine and a GPU",
        "use * (softmax attention) or + (multi-latent attention)",
    ),
    *(
        (given(name), "it belongs to the grouped experts of TransformerEngine", _LEAVE_OUT)
        for name in ("moe_single_grouped_weight", "moe_single_grouped_bias")
    ),
    (given("defer_embedding_wgrad_compute"), "it needs Apex's gradient accumulation fusion", _LEAVE_OUT),
    (given("hybrid_context_parallel"), "packed sequences need TransformerEngine's attention", _LEAVE_OUT),
    (
        one_of("position_embedding_type", "relative"),
        "it needs TransformerEngine's attention",
        "use --position-embedding-type rope",
    ),
    (_NSIGHT, "that profile is Nsight's, of a GPU", "add --use-pytorch-profiler"),
    (given("delay_wgrad_compute"), "it needs TransformerEngine's linear layers", _LEAVE_OUT),
    (given("overlap_moe_expert_parallel_comm"), "it overlaps CUDA streams", _LEAVE_OUT),
    (
        one_of("moe_token_dispatcher_type", "flex"),
        "the flex dispatcher needs DeepEP and GPUs",
        "use --moe-token-dispatcher-type alltoall or allgather",
    ),
    (given("moe_enable_deepep"), "it belongs to the flex dispatcher", _LEAVE_OUT),
    (given("enable_autocast"), "torch.autocast('cuda') does nothing", "use --bf16 or fp32"),
    (given("use_kitchen"), "Kitchen needs a GPU", _LEAVE_OUT),
    (given("nccl_ub"), "NCCL user buffers need GPUs", _LEAVE_OUT),
    (given("use_sharp"), "SHARP needs NCCL", _LEAVE_OUT),
    (given("batch_invariant_mode"), "batch-invariant kernels need a GPU", _LEAVE_OUT),
    (given("init_model_with_meta_device"), "weights would start from unset memory without FSDP", _LEAVE_OUT),
    (one_of("pipeline_model_parallel_comm_backend", "ucc"), "UCC needs GPUs", _LEAVE_OUT),
    (given("yaml_cfg"), *YAML),
    (one_of("transformer_impl", "inference_optimized"), "its kernels need a GPU", "use --transformer-impl local"),
)

CPU: tuple[Refusal, ...] = tuple(
    Refusal((condition,), because, instead, _CPU) for condition, because, instead in _REFUSED
)
"""Each row is about one setting, so that a plan, which trains nothing, can leave it out."""

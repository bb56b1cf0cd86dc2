"""The table of refusals, as a function of settings: every row, by what it says and when it does not speak."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, MuonConfig, choices
from megatron_muon.config import UNREAD
from megatron_muon.refusals import MUON, QK_CLIP, Chosen, Refusal, Settings, refuse
from megatron_muon.refusals.cpu import CHANGES, CPU, IN_CONFIG
from megatron_muon.refusals.plan import PLAN, READ
from tools import docs

ALL: tuple[Refusal, ...] = (*UNREAD, *MUON, *QK_CLIP, *READ)


class OptimizerConfig(types.SimpleNamespace):
    """As far as rows look at fields of this class alone."""


class DistributedDataParallelConfig(types.SimpleNamespace):
    """As far as rows look at fields of this class alone."""


class TransformerConfig(types.SimpleNamespace):
    """As far as rows look at fields of this class alone."""


ARGUMENTS: dict[str, Any] = {
    **MuonConfig().as_settings(),
    "optimizer": "muon",
    "adaptive_muon_moment2_method": "adamuon",
    "adaptive_muon_beta2": 0.95,
    "adaptive_muon_eps": 1e-8,
    "check_for_nan_in_loss_and_grad": True,
    "ckpt_format": "torch_dist",
    "freeze_all_layers": False,
    "context_parallel_size": 1,
    "cuda_graph_impl": "none",
    "ddp_average_in_collective": False,
    "bf16": False,
    "ddp_pad_buckets_for_high_nccl_busbw": False,
    "ddp_reduce_scatter_with_fp32_accumulation": False,
    "exp_avg_dtype": "fp32",
    "exp_avg_sq_dtype": "fp32",
    "main_grads_dtype": "fp32",
    "main_params_dtype": "fp32",
    "overlap_cpu_optimizer_d2h_h2d": False,
    "use_torch_optimizer_for_cpu_offload": False,
    "decoupled_lr": None,
    "enable_msc": False,
    "fp16": False,
    "fp4_param_gather": False,
    "fp8_param_gather": False,
    "init_method_xavier_uniform": False,
    "load": None,
    "load_main_params_from_ckpt": False,
    "lr": 1e-3,
    "lr_warmup_init": 0.0,
    "moe_latent_size": None,
    "num_distributed_optimizer_instances": 1,
    "optimizer_cpu_offload": False,
    "optimizer_cuda_graph": False,
    "overlap_param_gather_with_optimizer_step": False,
    "pipeline_model_parallel_layout": None,
    "pipeline_model_parallel_size": 1,
    "pretrained_checkpoint": None,
    "qk_clip": False,
    "qk_clip_alpha": 0.5,
    "qk_clip_threshold": 100.0,
    "save": None,
    "untie_embeddings_and_output_weights": True,
    "use_checkpoint_args": False,
    "use_distributed_optimizer": False,
    "use_layer_wise_param_layout": True,
    "use_megatron_fsdp": False,
    "use_mup": False,
    "use_precision_aware_optimizer": False,
    "use_torch_fsdp2": False,
    "weight_decay_incr_style": "constant",
    "yaml_cfg": None,
}
"""Parsed arguments, as far as the table looks at them: Megatron's defaults, where nothing is refused."""

TRANSFER = {
    "muon_transfer": "128x2",
    "muon_scale_mode": "unit_rms_norm",
    "muon_weight_decay_method": "independent_scheduled",
}
SCALAR = {"muon_scalar_weight_decay_method": "independent_scheduled"}
HYPERBALL = {"muon_variant": "hyperball", "muon_scale_mode": "none"}
ADAPTIVE = {"optimizer": "adaptive_muon"}
LAYER_WISE = {"use_distributed_optimizer": True}
AWARE = {"bf16": True, "use_precision_aware_optimizer": True}
DECOUPLED = {"muon_layer_wise_param_layout": "decoupled"}
CLIP = {"qk_clip": True}
FP32_ACCUMULATION = {"ddp_reduce_scatter_with_fp32_accumulation": True}
FP32_BUFFERS, FP32_AVERAGES = (
    DistributedDataParallelConfig(
        reduce_scatter_with_fp32_accumulation=True, average_in_collective=scattered, use_distributed_optimizer=scattered
    )
    for scattered in (False, True)
)
FP32_GRADIENTS = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
PADDED_BUFFERS = DistributedDataParallelConfig(pad_buckets_for_high_nccl_busbw=True)

REFUSED: list[tuple[dict[str, Any], str]] = [
    # Options with each other
    ({"muon_split_qkv": False, "muon_qkv": "per_head"}, "--muon-qkv per_head with --muon-no-split-qkv: these contra"),
    (
        {"muon_coefficient_type": "custom"},
        "--muon-coefficient-type custom without --muon-custom-coefficients: nothing says what they are; give",
    ),
    (
        {"muon_custom_coefficients": ("2,-1.5,0.5",)},
        "--muon-custom-coefficients 2,-1.5,0.5 with --muon-coefficient-type quintic: .*; add --muon-coefficient-type",
    ),
    (
        {"muon_tp_mode": "gram"},
        "--muon-tp-mode gram with --muon-ns-dtype auto and --muon-fp32-matmul-prec medium: Gram Newton-Schulz needs "
        "more bits than bfloat16 has; add --muon-ns-dtype fp16",
    ),
    (
        {"muon_tp_mode": "gram", "muon_fp32_matmul_prec": "high", "muon_ns_dtype": "bf16"},
        "--muon-tp-mode gram with --muon-ns-dtype bf16: Gram",
    ),
    (
        {"muon_blockwise_period": 5, "muon_tp_mode": "blockwise"},
        "--muon-blockwise-period 5 with --muon-tp-mode blockwise: no step would take whole matrices; use --muon-",
    ),
    (
        {"muon_blockwise_period": 5, "muon_variant": "polargrad", "muon_scale_mode": "none"},
        "--muon-blockwise-period 5 with --muon-variant polargrad: .*leave one",
    ),
    (
        {"muon_blockwise_period": 5, "optimizer": "stiefel_muon"},
        "--muon-blockwise-period 5 with --optimizer stiefel_muon: what it keeps of a matrix is of the whole one",
    ),
    (
        {"muon_blockwise_lr_mult": 0.5},
        "--muon-blockwise-lr-mult 0.5 with --muon-blockwise-period 1: there are no .*add --muon-blockwise-period 5",
    ),
    (
        {"muon_alarm": "stop"},
        "--muon-alarm stop without --muon-log-interval without --muon-check-replicas-interval: nothing is measured "
        "that could raise one; add --muon-log-interval 10, or",
    ),
    (
        {"muon_check_replicas_interval": 10, "muon_alarm": "off"},
        "--muon-check-replicas-interval 10 with --muon-alarm off: nobody would be told",
    ),
    ({"muon_log_per_layer": True}, "--muon-log-per-layer without --muon-log-interval: nothing is .*add --muon-log-int"),
    ({"muon_log_console": True}, "--muon-log-console without --muon-log-interval: nothing is measured"),
    ({"muon_log_interval": 10, "optimizer": "adam"}, "--muon-log-interval 10 with --optimizer adam, which does not"),
    ({**HYPERBALL, "muon_scale_mode": "spectral"}, "--muon-variant hyperball with --muon-scale-mode spectral: the rad"),
    (
        {**HYPERBALL, "muon_extra_scale_factor": 0.2},
        "--muon-variant hyperball with --muon-extra-scale-factor 0.2: weights keep their norm",
    ),
    (
        {**HYPERBALL, "muon_weight_decay_method": "l2"},
        "--muon-variant hyperball with --muon-weight-decay-method l2: weights keep their norm",
    ),
    *(
        (
            {"muon_variant": "polargrad", "muon_scale_mode": mode},
            f"--muon-variant polargrad with --muon-scale-mode {mode}: .*add --muon-scale-mode none",
        )
        for mode in ("update_norm", "spectral_norm")
    ),
    ({**ADAPTIVE, "adaptive_muon_moment2_method": "adam"}, "--adaptive-muon-moment2-method adam: choose one of"),
    ({**ADAPTIVE, "adaptive_muon_beta2": 1.0}, "--adaptive-muon-beta2 1.0: give a num"),
    ({**ADAPTIVE, "adaptive_muon_beta2": "much"}, "--adaptive-muon-beta2 much: give a"),
    ({**ADAPTIVE, "adaptive_muon_eps": 0.0}, "--adaptive-muon-eps 0.0: give a positi"),
    ({**ADAPTIVE, "adaptive_muon_eps": float("inf")}, "--adaptive-muon-eps inf: give"),
    (
        {**ADAPTIVE, "adaptive_muon_moment2_method": "namo", "muon_scale_mode": "update_norm"},
        "--adaptive-muon-moment2-method namo with --muon-scale-mode update_norm: the "
        "mode divides out .*normuon or adamuon",
    ),
    (
        {"muon_param_rule": ("a=adam", "*.linear_qkv.weight=stiefel")},
        "--muon-param-rule '*.linear_qkv.weight=stiefel' with --optimizer muon: .*use --optimizer stiefel_muon",
    ),
    (
        {"muon_param_rule": ("a=coefficients:custom",), "muon_custom_coefficients": ()},
        "--muon-param-rule 'a=coefficients:custom' with --muon-coefficient-type quintic: .*; add --muon-coefficient-ty",
    ),
    (
        {"optimizer": "spectral_sphere", "muon_param_rule": ("a=steps:auto",)},
        "--muon-param-rule 'a=steps:auto' with --optimizer spectral_sphere: it iterates .*; give a number, such as",
    ),
    (
        {"optimizer": "spectral_sphere", "muon_param_rule": ("output_layer*=sign",)},
        "--muon-param-rule 'output_layer*=sign' with --optimizer spectral_sphere: .*no weight decay",
    ),
    (
        {**HYPERBALL, "muon_param_rule": ("output_layer*=col_norm",)},
        "--muon-param-rule 'output_layer*=col_norm' with --muon-variant hyperball: .*no weight decay",
    ),
    ({"muon_ball_radius": 9.0}, "--muon-ball-radius 9.0 without a weight that reads it: .*give them some weights"),
    # Options that set up param groups
    (
        {**TRANSFER, "muon_scale_mode": "moonlight"},
        "--muon-transfer 128x2 with --muon-scale-mode moonlight: .*add --muon-scale-mode unit_rms_norm",
    ),
    (
        {**TRANSFER, "muon_weight_decay_method": "decoupled"},
        "--muon-transfer 128x2 with --muon-weight-decay-method decoupled: .*add --muon-weight-decay-method independent",
    ),
    ({**TRANSFER, "muon_variant": "polargrad"}, "--muon-transfer 128x2 with --muon-variant polargrad: there is no"),
    (
        {**TRANSFER, **ADAPTIVE, "muon_scale_mode": "spectral_norm", "adaptive_muon_moment2_method": "namo"},
        "--adaptive-muon-moment2-method namo with .*\n"
        "--muon-transfer 128x2 with --adaptive-muon-moment2-method namo: .*normuon or",
    ),
    (
        {**TRANSFER, **ADAPTIVE},
        "--muon-transfer 128x2 with --optimizer adaptive_muon and --muon-scale-mode unit_rms_norm: second moments",
    ),
    ({**TRANSFER, "use_mup": True}, "--muon-transfer 128x2 with --use-mup: these are two rules"),
    ({**TRANSFER, "init_method_xavier_uniform": True}, "--muon-transfer 128x2 with --init-method-xavier-uniform: the"),
    ({**TRANSFER, "moe_latent_size": 64}, "--muon-transfer 128x2 with --moe-latent-size 64: .*both start from zeros"),
    (
        {**TRANSFER, "untie_embeddings_and_output_weights": False},
        "--muon-transfer 128x2 without --untie-embeddings-and-output-weights: the output layer is the embedding",
    ),
    ({**TRANSFER, "decoupled_lr": 0.0}, "--muon-transfer 128x2 with --decoupled-lr 0.0: the rule gives embeddings"),
    ({**TRANSFER, "lr": None}, "--muon-weight-decay-method independent_scheduled without --lr: give --lr"),
    ({"muon_scalar_lr": 0.1, "lr": None}, "--muon-scalar-lr 0.1 without --lr: give --lr"),
    ({**SCALAR, "lr": None}, "--muon-scalar-weight-decay-method independent_scheduled without --lr: give --lr"),
    (
        {**TRANSFER, "weight_decay_incr_style": "linear"},
        "--muon-transfer 128x2 with --weight-decay-incr-style linear: .*use constant",
    ),
    (
        {**SCALAR, "weight_decay_incr_style": "cosine"},
        "--muon-scalar-weight-decay-method independent_scheduled with --weight-decay-incr-style cosine: .*use constant",
    ),
    ({**TRANSFER, "lr_warmup_init": 1e-5}, "--muon-transfer 128x2 with --lr-warmup-init 1e-05: .*use 0"),
    (
        {"muon_scalar_lr": 1e-4, "lr_warmup_init": 1e-5},
        "--muon-scalar-lr 0.0001 with --lr-warmup-init 1e-05: .*use 0",
    ),
    # Megatron's settings
    ({"yaml_cfg": "a.yaml"}, "--yaml-cfg a.yaml with --optimizer muon: .*; give flags."),
    ({"fp16": True}, "--fp16 with --optimizer muon: Muon needs no loss scale; use --bf16 or float32."),
    ({"optimizer": "dist_muon", "fp16": True}, "--fp16 with --optimizer dist_muon: Muon needs no loss scale"),
    ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 with --optimizer muon: FSDP shards cannot be orthogonalized; use -"),
    ({"use_megatron_fsdp": True}, "--use-megatron-fsdp with --optimizer muon: FSDP shards cannot be orthogonalized"),
    ({"fp8_param_gather": True}, "--fp8-param-gather with --optimizer muon: Muon updates bfloat16 or float32 weights"),
    ({"fp4_param_gather": True}, "--fp4-param-gather with --optimizer muon: Muon updates bfloat16 or float32 weights"),
    ({"load_main_params_from_ckpt": True}, "--load-main-params-from-ckpt with --optimizer muon: no state .*; leave it"),
    (
        {"optimizer_cpu_offload": True},
        "--optimizer-cpu-offload with --optimizer muon: it has the host .*--muon-offload all",
    ),
    *(
        (
            {name: True},
            f"--{name.replace('_', '-')} with --optimizer muon: it belongs to --optimizer-cpu-offload; leave",
        )
        for name in ("overlap_cpu_optimizer_d2h_h2d", "use_torch_optimizer_for_cpu_offload")
    ),
    (
        {"muon_offload": "all", "bf16": True},
        "--muon-offload all with --bf16 and --muon-master fp32: the float32 copies are .*; add --muon-master remainder",
    ),
    (
        {"muon_offload": "momentum", "optimizer_cuda_graph": True},
        "--muon-offload momentum with --optimizer-cuda-graph: state comes from the host",
    ),
    ({"muon_master": "remainder"}, "--muon-master remainder without --bf16: it is what a bfloat16 weight lacks of its"),
    ({**AWARE, "main_params_dtype": "fp16"}, "--main-params-dtype fp16: updates are smaller .*--muon-master remainder"),
    (
        {**AWARE, "exp_avg_dtype": "fp16"},
        "--exp-avg-dtype fp16: momentum is kept in float32, bfloat16 or int8; use bf16",
    ),
    ({**AWARE, "exp_avg_dtype": torch.uint8}, "--exp-avg-dtype torch.uint8: .*add --muon-momentum-dtype int8."),
    (
        {**AWARE, "exp_avg_dtype": torch.bfloat16, "muon_momentum_dtype": "fp32"},
        "--exp-avg-dtype torch.bfloat16 with --muon-momentum-dtype fp32: these contradict each other; give one.",
    ),
    *(
        (
            {**AWARE, "exp_avg_sq_dtype": name},
            f"--exp-avg-sq-dtype {name}: second moments are kept in float32; leave it",
        )
        for name in ("bf16", "fp16", "fp8")
    ),
    (
        {"muon_blockwise_period": 5, "optimizer_cuda_graph": True},
        "--optimizer-cuda-graph with --muon-blockwise-period 5: one step of a period is not .*leave one of the two",
    ),
    (
        {"optimizer": "stiefel_muon", "muon_stiefel_solver": "fixed_point", "optimizer_cuda_graph": True},
        "--optimizer-cuda-graph with --muon-stiefel-solver fixed_point and --optimizer stiefel_muon: the solver",
    ),
    ({"ckpt_format": "fsdp_dtensor"}, "--ckpt-format fsdp_dtensor with --optimizer muon: .*use torch_dist (or torch)."),
    *(
        (
            {name: "msc://store/run"},
            f"--{flag} msc://store/run without --enable-msc with --optimizer muon: .*local folder",
        )
        for name, flag in (("save", "save"), ("load", "load"), ("pretrained_checkpoint", "pretrained-checkpoint"))
    ),
    ({"freeze_all_layers": True}, "--freeze-all-layers with --optimizer muon: .*use --optimizer adam for a run"),
    (
        {**LAYER_WISE, "num_distributed_optimizer_instances": 2},
        "--num-distributed-optimizer-instances 2 with layer-wise --optimizer muon: each weight has one owner",
    ),
    (
        {"optimizer": "dist_muon", "overlap_param_gather_with_optimizer_step": True},
        "--overlap-param-gather-with-optimizer-step with layer-wise --optimizer dist_muon: .*leave it off",
    ),
    *(
        (
            {"pipeline_model_parallel_layout": text, "pipeline_model_parallel_size": size},
            f"--pipeline-model-parallel-layout {text}: Megatron-Core keeps one copy of the embedding equal on each ra",
        )
        for text, size in (("Et|t|m|L", 2), ("Et*2|(t|)*4mm||L", 3))
    ),
    (
        {**LAYER_WISE, **FP32_ACCUMULATION, "ddp_average_in_collective": True},
        "--ddp-reduce-scatter-with-fp32-accumulation with --ddp-average-in-collective: it adds gradients up and does "
        "not average them, as Megatron-Core finds in the first step; leave one of the two off",
    ),
    (
        FP32_ACCUMULATION,
        "--ddp-reduce-scatter-with-fp32-accumulation with --optimizer muon, not layer-wise: gradients are all-reduced",
    ),
    (
        {**LAYER_WISE, **FP32_ACCUMULATION, "use_layer_wise_param_layout": False},
        "--ddp-reduce-scatter-with-fp32-accumulation with layer-wise --optimizer muon and "
        "--no-use-layer-wise-param-layout: gradients are all-reduced",
    ),
    (DECOUPLED, "--layer-wise-param-layout decoupled with --optimizer muon, not layer-wise: .*add --use-distributed"),
    (
        {**LAYER_WISE, **DECOUPLED, "use_layer_wise_param_layout": False},
        "--layer-wise-param-layout decoupled with --no-use-layer-wise-param-layout and layer-wise --optimizer muon: "
        "lists are another way",
    ),
    (
        {**LAYER_WISE, **DECOUPLED, "ddp_pad_buckets_for_high_nccl_busbw": True},
        "--layer-wise-param-layout decoupled with --ddp-pad-buckets-for-high-nccl-busbw and layer-wise .*: one leaves",
    ),
    (
        {**LAYER_WISE, "ckpt_format": "torch", "save": "checkpoints"},
        "--ckpt-format torch with layer-wise --optimizer muon and .*: Megatron-Core cannot save it",
    ),
    # QK-clip
    ({**CLIP, "qk_clip_alpha": 1.0}, "--qk-clip-alpha 1.0: give a number between 0 and 1"),
    ({**CLIP, "qk_clip_threshold": float("nan")}, "--qk-clip-threshold nan: give a positive number"),
    (
        {"optimizer": "adam", "muon_qk_logits": "lse", "context_parallel_size": 2},
        "--muon-qk-logits lse with --context-parallel-size 2: .*use --muon-qk-logits exact",
    ),
    ({"optimizer": "adam", **CLIP, "use_torch_fsdp2": True}, "--use-torch-fsdp2 with --qk-clip: FSDP's shards are not"),
    ({"optimizer": "adam", **CLIP, "use_megatron_fsdp": True}, "--use-megatron-fsdp with --qk-clip: FSDP's shards are"),
    (
        {"optimizer": "adam", **CLIP, "use_precision_aware_optimizer": True},
        "--use-precision-aware-optimizer with --qk-clip and --optimizer adam: its master weights are out of reach",
    ),
    ({"optimizer": "adam", **CLIP, "optimizer_cpu_offload": True}, "--optimizer-cpu-offload with --qk-clip and --op"),
    (
        {"optimizer": "adam", **CLIP, "optimizer_cuda_graph": True},
        "--optimizer-cuda-graph with --qk-clip and --optimizer adam: Megatron-Core captures the whole step",
    ),
    (
        {**CLIP, "cuda_graph_impl": "local", "muon_qk_logits_interval": 4},
        "--cuda-graph-impl local with --muon-qk-logits-interval 4: a captured forward pass measures in each step",
    ),
    *(
        (
            {**CLIP, name: True, "muon_qk_logits_interval": 4},
            f"{flag} with --muon-qk-logits-interval 4: a captured forward pass measures in each step",
        )
        for name, flag in (
            ("enable_cuda_graph", "--enable-cuda-graph"),
            ("external_cuda_graph", "--external-cuda-graph"),
        )
    ),
    # Plans
    ({"use_checkpoint_args": True}, "--use-checkpoint-args in a plan: it reads no checkpoint; give the flags"),
]


def messages(rows: tuple[Refusal, ...], *sources: object) -> list[str]:
    """What is said of all rows that hold."""
    settings = Settings(*sources)
    return [row.message(settings) for row in rows if row.holds(settings)]


def says(message: str, expected: str) -> bool:
    """Whether a message begins as expected; ``.*`` stands for anything."""
    return re.match(".*".join(map(re.escape, expected.split(".*"))), message) is not None


def test_defaults_are_not_refused() -> None:
    for name in choices.OPTIMIZERS:
        assert messages(ALL, {**ARGUMENTS, "optimizer": name}) == []


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_rows_speak_where_they_hold_and_no_others_do(changes: dict[str, Any], expected: str) -> None:
    found = messages(ALL, {**ARGUMENTS, **changes})
    assert len(found) == expected.count("\n") + 1 and says("\n".join(found), expected), found


@pytest.mark.parametrize(
    ("changes", "classes", "expected"),
    [
        (
            {},
            [OptimizerConfig(use_distributed_optimizer=True, use_layer_wise_distributed_optimizer=False)],
            "OptimizerConfig.use_distributed_optimizer True with --optimizer muon, not layer-wise: Megatron's "
            "distributed optimizer .*use_layer_wise_distributed_optimizer=True, .*use_distributed_optimizer=False",
        ),
        (
            {},
            [
                OptimizerConfig(use_distributed_optimizer=False, use_layer_wise_distributed_optimizer=False),
                DistributedDataParallelConfig(use_distributed_optimizer=True),
            ],
            "DistributedDataParallelConfig.use_distributed_optimizer True with --optimizer muon, not layer-wise: each",
        ),
        (
            {"main_grads_dtype": torch.bfloat16},
            [FP32_GRADIENTS],
            "--main-grads-dtype torch.bfloat16 with DistributedDataParallelConfig.grad_reduce_in_fp32 True: .*"
            "build DDP with grad_reduce_in_fp32=False",
        ),
        ({}, [FP32_BUFFERS], "DistributedDataParallelConfig.reduce_scatter_with_fp32_accumulation True without Dist"),
        (
            {},
            [FP32_AVERAGES],
            "DistributedDataParallelConfig.reduce_scatter_with_fp32_accumulation True with "
            "DistributedDataParallelConfig.average_in_collective True: it adds gradients up",
        ),
        (
            {**LAYER_WISE, **DECOUPLED},
            [PADDED_BUFFERS],
            "--layer-wise-param-layout decoupled with DistributedDataParallelConfig.pad_buckets_for_high_nccl_busbw",
        ),
        *(
            (changes, [OptimizerConfig(decoupled_weight_decay=False)], "OptimizerConfig.decoupled_weight_decay False")
            for changes in (TRANSFER, SCALAR)
        ),
    ],
)
def test_fields_of_one_class(changes: dict[str, Any], classes: list[object], expected: str) -> None:
    arguments = {name: value for name, value in ARGUMENTS.items() if name != "use_distributed_optimizer"}
    (message,) = messages(ALL, *classes, {**arguments, **changes})
    assert says(message, expected), message


def test_a_layer_wise_config_takes_reduced_slices() -> None:
    """What the config says of Megatron's distributed optimizer does not matter then."""
    for asked in (False, True):
        config = OptimizerConfig(
            optimizer="muon", use_distributed_optimizer=asked, use_layer_wise_distributed_optimizer=True
        )
        assert messages(MUON, config, DistributedDataParallelConfig(use_distributed_optimizer=True)) == []


def test_every_row_is_tested() -> None:
    """Beside those of knobs and of the CPU, which have tests of their own."""
    views = [Settings({**ARGUMENTS, **changes}) for changes, _ in REFUSED]
    fields = {"use_distributed_optimizer": True, "use_layer_wise_distributed_optimizer": False}
    for changes in (TRANSFER, SCALAR):
        config = OptimizerConfig(**fields, decoupled_weight_decay=False)
        views.append(Settings(config, DistributedDataParallelConfig(**fields), {**ARGUMENTS, **changes}))
    views += [Settings({**ARGUMENTS, "optimizer": "adam"})]
    views += [Settings(buffers, ARGUMENTS) for buffers in (FP32_BUFFERS, FP32_AVERAGES)]
    views += [Settings(FP32_GRADIENTS, {**ARGUMENTS, "main_grads_dtype": "bf16"})]
    views += [Settings(PADDED_BUFFERS, {**ARGUMENTS, **LAYER_WISE, **DECOUPLED})]
    silent = [row.words for row in (*MUON, *QK_CLIP, *PLAN, *READ) if not any(row.holds(view) for view in views)]
    assert silent == []


@pytest.mark.parametrize(
    ("text", "size"), [("Et|t|m|L", 4), ("Ett|m|L", 3), ("E|t|t|mL", 2), ("Ettm|L", 2), ("EtmL", 1), ("Et|tL", 2)]
)
def test_stages_of_prediction_on_other_ranks(text: str, size: int) -> None:
    layout = {"pipeline_model_parallel_layout": text, "pipeline_model_parallel_size": size}
    assert messages(MUON, {**ARGUMENTS, **layout}) == []


def test_what_is_not_known_is_not_refused() -> None:
    """It is looked at again where it is known."""
    assert messages(ALL, {}) == messages(ALL, types.SimpleNamespace(muon_tp_mode="gram", optimizer="muon")) == []
    assert messages(ALL, {"muon_transfer": "128x2"}, types.SimpleNamespace(use_mup=True)) == [
        "--muon-transfer 128x2 with --use-mup: these are two rules for one thing; give one."
    ]


def test_what_may_still_be_set_is_not_refused() -> None:
    """A config is looked at when it is built, and some set its fields afterwards: defaults are no choice then."""

    @dataclasses.dataclass
    class OptimizerConfig:
        optimizer: str = "adam"
        lr: float | None = None
        muon_coefficient_type: str = "quintic"
        muon_custom_coefficients: tuple[str, ...] = dataclasses.field(default_factory=tuple)
        muon_scalar_lr: float = 0.0
        muon_tp_mode: str = "auto"
        muon_ns_dtype: str = "auto"
        use_distributed_optimizer: bool = False
        use_layer_wise_distributed_optimizer: bool = False

    config = OptimizerConfig("muon", muon_coefficient_type="custom", muon_scalar_lr=0.1, muon_tp_mode="gram")
    assert messages(ALL, Chosen(config, "optimizer")) == []
    assert len(messages(ALL, config)) == 2
    config.muon_ns_dtype = "bf16"
    config.use_distributed_optimizer = True
    (gram,) = messages(ALL, Chosen(config, "optimizer"))  # whether it will be layer-wise is not known yet
    assert gram.startswith("--muon-tp-mode gram with --muon-ns-dtype bf16")
    assert messages(ALL, config)[-1].startswith("OptimizerConfig.use_distributed_optimizer True")


def test_all_that_is_wrong_is_said_at_once() -> None:
    args = argparse.Namespace(**{**ARGUMENTS, "fp16": True, "muon_sphere_radius": 4.0, "use_torch_fsdp2": True})
    with pytest.raises(ConfigError) as error:
        refuse(ALL, args)
    assert [line.split(" ")[0] for line in str(error.value).split("\n")] == [
        "--muon-sphere-radius",
        "--fp16",
        "--use-torch-fsdp2",
    ]


@pytest.mark.parametrize(("changes", "rows"), [(TRANSFER, 2), ({}, 1)])
def test_the_way_out_of_one_row_is_no_way_into_another(changes: dict[str, Any], rows: int) -> None:
    """NAMO is refused with transfer and with a measured scale, and what is proposed instead is taken by both."""
    refused = {**ARGUMENTS, **ADAPTIVE, **changes, "muon_scale_mode": "spectral_norm"}
    found = messages(ALL, {**refused, "adaptive_muon_moment2_method": "namo"})
    assert ["normuon or adamuon" in message for message in found] == [True] * rows
    for method in ("normuon", "adamuon"):
        assert messages(ALL, {**refused, "adaptive_muon_moment2_method": method}) == []


VALUES = {
    "attention_backend": types.SimpleNamespace(name="flash"),
    "cuda_graph_impl": "local",
    "moe_token_dispatcher_type": "flex",
    "transformer_impl": "inference_optimized",
    "recompute_modules": ["core_attn", "moe_act"],
    "experimental_attention_variant": "dsa",
    "hybrid_layer_pattern": "MDM-",
    "pipeline_model_parallel_comm_backend": "ucc",
    "position_embedding_type": "relative",
    "distributed_backend": "cpu:gloo,cuda:nccl",
}


@pytest.mark.parametrize("row", CPU, ids=lambda row: row.when[0].name)
def test_rows_of_the_cpu(row: Refusal) -> None:
    name = row.when[0].name
    assert messages((row,), {name: None}) == messages((row,), {name: "none"} if name == "cuda_graph_impl" else {}) == []
    (message,) = messages(CPU, argparse.Namespace(**{name: VALUES.get(name, True)}))
    flag = {"nccl_ub": "--use-nccl-ub", "fp8": "--fp8-format", "fp4": "--fp4-format"}.get(
        name, f"--{name.replace('_', '-')}"
    )
    value = VALUES.get(name)
    shown = "" if value is None else f" {getattr(value, 'name', ' '.join(value) if isinstance(value, list) else value)}"
    assert message == f"{flag}{shown} on the CPU: {row.because}; {row.instead}."


def test_what_is_changed_in_arguments_is_refused_in_a_config() -> None:
    for change in CHANGES:
        if change.name == "transformer_impl":  # there it only selects the layers
            continue
        values = {change.name: VALUES.get(change.name, True)}
        assert messages(IN_CONFIG, types.SimpleNamespace(**values)) == []
        (message,) = messages(IN_CONFIG, TransformerConfig(**values))
        assert (
            message.startswith(f"TransformerConfig.{change.name} ") and f"use {change.name}={change.value!r}" in message
        )
        assert messages(IN_CONFIG, TransformerConfig(**{change.name: change.value})) == []


def test_the_documentation_is_current() -> None:
    assert docs.FILE.read_text() == docs.render(), "run: python -m tools.docs"
    monitoring = docs.MONITORING.read_text()
    assert monitoring == docs.with_alarms(monitoring), "run: python -m tools.docs"
    assert "refusals.md" in (Path(__file__).parents[2] / "README.md").read_text()


def test_names_are_those_of_what_they_stand_for() -> None:
    """Names stand in ``choices``, which every room may import; what they mean is further up."""
    from megatron_muon.optimizers.registry import VARIANTS
    from megatron_muon.optimizers.stiefel_solvers import SOLVERS

    assert {*choices.VARIANTS, *choices.SECOND_MOMENTS} <= VARIANTS.keys()
    assert tuple(SOLVERS) == choices.STIEFEL_SOLVERS

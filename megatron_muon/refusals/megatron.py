"""This package's optimizers with Megatron's settings."""

from __future__ import annotations

from dataclasses import replace

from megatron_muon.choices import DECOUPLED, OPTIMIZERS
from megatron_muon.refusals.rule import (
    Refusal,
    Settings,
    given,
    layer_wise,
    missing,
    of_dtype,
    one_of,
    optimizer,
    other_than,
    ours,
    quietly,
    that,
    turned_off,
)

_OURS = optimizer(*OPTIMIZERS)

YAML = ("its settings pass by all checks, and flags beside it do not count", "give flags")
"""Reason and way out of ``--yaml-cfg``."""

_DDP = "DistributedDataParallelConfig."
_PRECISION_AWARE = quietly(given("use_precision_aware_optimizer"))
_ALL_REDUCED = "gradients are all-reduced, in their own precision, and nothing is scattered"
_DECOUPLED = one_of("muon_layer_wise_param_layout", DECOUPLED)
_FSDP = ("FSDP shards cannot be orthogonalized", "use --use-distributed-optimizer")


def _predicts_on_first_rank(settings: Settings) -> bool:
    """Whether multi-token prediction is in a later virtual stage of the pipeline's first rank."""
    before, found, after = str(settings["pipeline_model_parallel_layout"] or "").rpartition("m")
    return bool(found) and "|" in before and after.count("|") == settings["pipeline_model_parallel_size"] - 1


MEGATRON: tuple[Refusal, ...] = (
    *(
        Refusal((given(name), _OURS), because, instead)
        for name, because, instead in (
            ("yaml_cfg", *YAML),
            ("fp16", "Muon needs no loss scale", "use --bf16 or float32"),
            ("use_torch_fsdp2", *_FSDP),
            ("use_megatron_fsdp", *_FSDP),
            *(
                (f"fp{bits}_param_gather", "Muon updates bfloat16 or float32 weights", "leave it off")
                for bits in (8, 4)
            ),
            (
                "load_main_params_from_ckpt",
                "no state of a model has Muon's master weights",
                "leave it off; with the optimizer's state masters are loaded, too",
            ),
            (
                "optimizer_cpu_offload",
                "it has the host compute the step",
                "use --muon-master remainder --muon-offload all, or --muon-offload momentum: state is on the host then",
            ),
            *(
                (
                    name,
                    "it belongs to --optimizer-cpu-offload",
                    "leave it off (--muon-offload copies under products)",
                )
                for name in ("overlap_cpu_optimizer_d2h_h2d", "use_torch_optimizer_for_cpu_offload")
            ),
        )
    ),
    Refusal(
        (one_of("muon_master", "remainder"), missing("bf16"), ours()),
        "it is what a bfloat16 weight lacks of its float32 value",
        "add --bf16, or leave it out: float32 weights have no copies",
    ),
    Refusal(
        (one_of("muon_offload", "all"), given("bf16"), one_of("muon_master", "fp32"), ours()),
        "the float32 copies are Megatron-Core's, which keeps them on the GPU",
        "add --muon-master remainder (the same results bit for bit), or use --muon-offload momentum",
    ),
    Refusal(
        (other_than("muon_offload", "none"), given("optimizer_cuda_graph"), ours()),
        "state comes from the host and goes back in each step",
        "leave one of the two out",
    ),
    *(
        Refusal((*asked, _PRECISION_AWARE, ours()), because, instead)
        for asked, because, instead in (
            (
                (of_dtype("main_params_dtype", "fp16"),),
                "updates are smaller than what fp16 tells apart",
                "use fp32: with --bf16 its lower 16 bits alone are kept, as with --muon-master remainder",
            ),
            (
                (of_dtype("exp_avg_dtype", "fp16"),),
                "momentum is kept in float32, bfloat16 or int8",
                "use bf16",
            ),
            (
                (of_dtype("exp_avg_dtype", "fp8"),),
                "momentum is kept in float32, bfloat16 or int8",
                "leave it out, and add --muon-momentum-dtype int8",
            ),
            (
                (of_dtype("exp_avg_dtype", "bf16"), other_than("muon_momentum_dtype", "auto", "bf16")),
                "these contradict each other",
                "give one",
            ),
            (
                (of_dtype("exp_avg_sq_dtype", "bf16", "fp16", "fp8"),),
                "second moments are kept in float32",
                "leave it out",
            ),
        )
    ),
    Refusal(
        (of_dtype("main_grads_dtype", "bf16"), given(f"{_DDP}grad_reduce_in_fp32"), ours()),
        "gradients are of the type in which they are reduced",
        "build DDP with grad_reduce_in_fp32=False, or leave it out",
    ),
    Refusal(
        (other_than("ckpt_format", "torch_dist", "torch"), _OURS),
        "Muon's state is not saved in it",
        "use torch_dist (or torch)",
    ),
    *(
        Refusal(
            (
                that(name, lambda folder: "://" in str(folder), "of an object store (msc://...)"),
                missing("enable_msc"),
                _OURS,
            ),
            "Megatron-Core would take it for a local folder",
            "add --enable-msc, with multi-storage-client installed",
        )
        for name in ("save", "load", "pretrained_checkpoint")
    ),
    Refusal(
        (given("optimizer_cuda_graph"), one_of("muon_stiefel_solver", "fixed_point"), optimizer("stiefel_muon")),
        "the solver computes eigenvalues, for which the host waits",
        "use another solver, or leave --optimizer-cuda-graph off",
    ),
    Refusal(
        (given("optimizer_cuda_graph"), other_than("muon_blockwise_period", 1), ours()),
        "one step of a period is not like the others, and a graph is of one step",
        "leave one of the two out",
    ),
    Refusal(
        (given("freeze_all_layers"), _OURS),
        "Muon has nothing to train, and Megatron-Core reads the learning rate of an optimizer that is not there",
        "use --optimizer adam for a run that only measures",
    ),
    Refusal(
        (given("OptimizerConfig.use_distributed_optimizer"), layer_wise(False)),
        "Megatron's distributed optimizer cuts weights into flat slices, which cannot be orthogonalized",
        "set OptimizerConfig.use_layer_wise_distributed_optimizer=True, so that each weight has one owner, or "
        "use_distributed_optimizer=False (on the command line, --use-distributed-optimizer is layer-wise)",
    ),
    Refusal(
        (given("DistributedDataParallelConfig.use_distributed_optimizer"), layer_wise(False)),
        "each rank would update all weights with only its slice of the gradients reduced, and replicas would drift "
        "apart",
        "set OptimizerConfig.use_layer_wise_distributed_optimizer=True and wrap the model with "
        "wrap_model_chunks_with_ddp(use_layer_wise_distributed_optimizer=True), or build DDP with "
        "use_distributed_optimizer=False",
    ),
    Refusal(
        (that("num_distributed_optimizer_instances", lambda number: number > 1, "above 1"), layer_wise()),
        "each weight has one owner in the whole data-parallel group",
        "use 1",
    ),
    Refusal(
        (given("overlap_param_gather_with_optimizer_step"), layer_wise()),
        "Megatron-Core does not support it",
        "leave it off (--overlap-param-gather works)",
    ),
    Refusal(
        (
            replace(
                given("pipeline_model_parallel_layout"),
                holds=_predicts_on_first_rank,
                words="`--pipeline-model-parallel-layout` with `m` in a later virtual stage of the first rank",
            ),
            ours(),
        ),
        "Megatron-Core keeps one copy of the embedding equal on each rank of a pipeline, and the first would have two",
        "put multi-token prediction (m) on another rank",
    ),
    *(
        Refusal(
            (given(f"{prefix}reduce_scatter_with_fp32_accumulation"), given(f"{prefix}average_in_collective"), ours()),
            "it adds gradients up and does not average them, as Megatron-Core finds in the first step",
            "leave one of the two off",
        )
        for prefix in ("ddp_", _DDP)
    ),
    *(
        Refusal(
            (given("ddp_reduce_scatter_with_fp32_accumulation"), *without),
            _ALL_REDUCED,
            "use --use-distributed-optimizer, with the parameter layout, or leave it off",
        )
        for without in (
            (layer_wise(False),),
            (layer_wise(), turned_off("use_layer_wise_param_layout", "--no-use-layer-wise-param-layout")),
        )
    ),
    Refusal(
        (given(f"{_DDP}reduce_scatter_with_fp32_accumulation"), missing(f"{_DDP}use_distributed_optimizer"), ours()),
        _ALL_REDUCED,
        "wrap the model with wrap_model_chunks_with_ddp(use_layer_wise_distributed_optimizer=True), or leave it off",
    ),
    Refusal(
        (_DECOUPLED, layer_wise(False)),
        "each rank holds all weights, and there is no padding between owners",
        "add --use-distributed-optimizer, or leave it out",
    ),
    Refusal(
        (_DECOUPLED, turned_off("use_layer_wise_param_layout", "--no-use-layer-wise-param-layout"), layer_wise()),
        "lists are another way, in which gradients are all-reduced",
        "leave one of the two out",
    ),
    *(
        Refusal(
            (_DECOUPLED, given(name), layer_wise()),
            "one leaves padding out and the other adds it",
            "leave one of the two out",
        )
        for name in ("ddp_pad_buckets_for_high_nccl_busbw", f"{_DDP}pad_buckets_for_high_nccl_busbw")
    ),
    Refusal(
        (one_of("ckpt_format", "torch"), layer_wise(), given("use_layer_wise_param_layout"), given("save")),
        "Megatron-Core cannot save it and would fail at the first checkpoint",
        "use --ckpt-format torch_dist, or add --no-use-layer-wise-param-layout",
    ),
)

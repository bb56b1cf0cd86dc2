"""Which settings cannot work on the CPU: the ones that are changed (and reported) and the ones that are refused.

A setting is *changed* where the same training can be done another way (NCCL -> gloo, a fused kernel -> its plain form);
it is *refused* where nothing here can do what was asked. Both tables name attributes of Megatron-LM's arguments; those
that ``TransformerConfig`` has as well are refused there, because whoever builds a configuration in code can write the
right value at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_muon.errors import ConfigError

__all__ = ["CHANGES", "REFUSALS", "Change", "Refusal", "change_arguments", "refuse_in_config"]


@dataclass(frozen=True)
class Change:
    """A value that is replaced: ``name`` becomes ``value`` where ``applies(current)``, because of ``reason``."""

    name: str
    value: Any
    reason: str
    applies: Callable[[Any], bool] = bool


@dataclass(frozen=True)
class Refusal:
    """A value that nothing here can honour: where ``applies(current)``, the ``way_out`` is told.

    Attributes:
        name: of the setting.
        way_out: what to do.
        applies: whether a value is refused.
    """

    name: str
    way_out: str
    applies: Callable[[Any], bool] = bool

    @property
    def flag(self) -> str:
        """The command-line flag."""
        return "--" + self.name.replace("_", "-")

    def error(self, current: Any) -> ConfigError:
        """What to raise where the value ``current`` is refused."""
        return ConfigError(f"{self.flag} = {current} cannot be honoured on the CPU: {self.way_out}")


def _is_nccl(value: Any) -> bool:
    return isinstance(value, str) and "nccl" in value


def _is_te(value: Any) -> bool:
    return value == "transformer_engine"


def _is_gpu_attention(value: Any) -> bool:
    return getattr(value, "name", str(value)) in ("flash", "fused")


CHANGES: tuple[Change, ...] = (
    Change("distributed_backend", "gloo", "NCCL needs GPUs", _is_nccl),
    Change("transformer_impl", "local", "TransformerEngine's modules need a GPU", _is_te),
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

REFUSALS: tuple[Refusal, ...] = (
    Refusal("fp8", "FP8 needs TransformerEngine and a GPU: use --bf16 or fp32"),
    Refusal("fp8_format", "FP8 needs TransformerEngine and a GPU: use --bf16 or fp32"),
    Refusal("fp4", "FP4 needs TransformerEngine and a GPU: use --bf16 or fp32"),
    Refusal("fp4_format", "FP4 needs TransformerEngine and a GPU: use --bf16 or fp32"),
    Refusal("enable_cuda_graph", "CUDA graphs need a GPU: leave the flag out"),
    Refusal("external_cuda_graph", "CUDA graphs need a GPU: leave the flag out"),
    Refusal("cuda_graph_impl", "CUDA graphs need a GPU: use --cuda-graph-impl none", lambda v: v not in (None, "none")),
    Refusal("attention_backend", "use --attention-backend auto, unfused or local", _is_gpu_attention),
    Refusal("use_flash_attn", "flash attention needs a GPU: leave the flag out"),
    Refusal("use_megatron_fsdp", "Megatron-FSDP needs NCCL: use --use-distributed-optimizer"),
    Refusal("use_torch_fsdp2", "FSDP2 is not supported on the CPU: use --use-distributed-optimizer"),
    Refusal("use_precision_aware_optimizer", "it needs TransformerEngine's FusedAdam and a GPU: leave the flag out"),
    Refusal("optimizer_cpu_offload", "the optimizer is on the CPU already: leave the flag out"),
    Refusal("fine_grained_activation_offloading", "activations are on the CPU already: leave the flag out"),
    Refusal("cpu_offloading_num_layers", "activations are on the CPU already: leave the flag out"),
    Refusal("delay_wgrad_compute", "it needs TransformerEngine's linear layers: leave the flag out"),
    Refusal("overlap_moe_expert_parallel_comm", "it overlaps CUDA streams: leave the flag out"),
    Refusal(
        "moe_token_dispatcher_type",
        "the flex dispatcher needs DeepEP and GPUs: use --moe-token-dispatcher-type alltoall or allgather",
        lambda v: v == "flex",
    ),
    Refusal("enable_autocast", "torch.autocast('cuda') does nothing on the CPU: use --bf16 or fp32"),
    Refusal("use_kitchen", "Kitchen needs a GPU: leave the flag out"),
    Refusal("nccl_ub", "NCCL user buffers need GPUs: leave --use-nccl-ub out"),
    Refusal("use_sharp", "SHARP needs NCCL: leave the flag out"),
    Refusal("batch_invariant_mode", "batch-invariant kernels need a GPU: leave the flag out"),
)


def change_arguments(args: Any) -> list[str]:
    """Refuse what cannot be done, then change what can be done another way, in place.

    Args:
        args: Megatron-LM's parsed arguments, before they are validated.

    Returns:
        One line ``name: old -> new (reason)`` for each change.

    Raises:
        ConfigError: an argument is in :data:`REFUSALS`.
    """
    _refuse(args, REFUSALS)
    if args.transformer_impl == "inference_optimized":
        raise ConfigError("--transformer-impl inference_optimized needs a GPU: use --transformer-impl local")
    lines = []
    for change in CHANGES:
        current = getattr(args, change.name, None)
        if change.applies(current):
            setattr(args, change.name, change.value)
            lines.append(f"{change.name}: {current} -> {change.value} ({change.reason})")
    return lines


def refuse_in_config(config: Any) -> None:
    """Check a ``TransformerConfig`` that was made in code.

    Raises:
        ConfigError: a field is in :data:`REFUSALS`, or in :data:`CHANGES` with a value that
            must be changed.
    """
    _refuse(config, REFUSALS)
    for change in CHANGES:
        current = getattr(config, change.name, None)
        # transformer_impl only selects a layer specification, which whoever builds a config in code selects too.
        if change.name != "transformer_impl" and change.applies(current):
            raise ConfigError(
                f"{type(config).__name__}.{change.name}={current!r} cannot work on the CPU ({change.reason}): "
                f"use {change.name}={change.value!r}"
            )


def _refuse(settings: Any, refusals: Iterable[Refusal]) -> None:
    for refusal in refusals:
        current = getattr(settings, refusal.name, None)
        if refusal.applies(current):
            raise refusal.error(current)

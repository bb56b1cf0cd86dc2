"""How DDP wraps a layer-wise model: where weights lie in its buffers, which buckets travel together, who waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_muon._patching import Original, Patches
from megatron_muon.errors import ConfigError
from megatron_muon.plugin import options
from megatron_muon.plugin.groups import ranks_of
from megatron_muon.plugin.layer_wise import balanced_together
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.ownership import annotate_for_buffers

PATCHES = Patches()


@PATCHES.around(
    "megatron.training.training:wrap_model_chunks_with_ddp",
    "the chunks of virtual pipeline stages are balanced together, or each would burden the same ranks",
)
def _with_all_chunks(original: Original, model_chunks: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
    groups = kwargs.get("pg_collection")
    if kwargs.get("use_layer_wise_distributed_optimizer", False):
        # Megatron-Core asks for it again; here all ranks hear of it if one cannot.
        ranks_of(groups).together(lambda: annotate_for_buffers(model_chunks))
    with balanced_together(len(model_chunks), groups):
        return original(model_chunks, *args, **kwargs)


@PATCHES.around(
    "megatron.training.models.dist_utils:_ddp_wrap",
    "the models of Megatron-LM's own scripts come from builders, which give DDP no layer-wise layout: "
    "gradients would be all-reduced, and Adam's weights whole on one rank",
)
def _with_layer_wise_layout(
    original: Original, model: list[Any], random_init: bool, ddp_config: Any, *args: Any, **kwargs: Any
) -> list[Any]:
    run = options.training_arguments()
    is_layer_wise = is_ours(getattr(run, "optimizer", None)) and run.use_layer_wise_distributed_optimizer
    if not (is_layer_wise and getattr(run, "use_layer_wise_param_layout", True)):
        return original(model, random_init, ddp_config, *args, **kwargs)
    from megatron.core.optimizer.layer_wise_optimizer import tag_params_for_buffer_routing

    groups = kwargs.get("pg_collection")
    ranks_of(groups).together(lambda: tag_params_for_buffer_routing(model))
    ddp_config.use_distributed_optimizer = True  # as wrap_model_chunks_with_ddp has it
    with balanced_together(len(model), groups):
        return original(model, random_init, ddp_config, *args, **kwargs)


@PATCHES.around(
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.compute_full_param_layout",
    "what wraps models asks this class for the layout, whichever optimizer the weights were tagged for",
)
def _with_whole_weights(original: Original, params: list[Any], *args: Any, **kwargs: Any) -> Any:
    if not any(getattr(param, "is_managed_by_layer_wise_optimizer", False) for param in params):
        return original(params, *args, **kwargs)
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    return LayerWiseDistributedOptimizer.compute_full_param_layout(params, *args, **kwargs)


@PATCHES.around(
    "megatron.core.distributed.param_and_grad_buffer:partition_buckets",
    "the first bucket of a group decides whose step it is gathered after: with Muon's first, Adam's weights "
    "are gathered before Adam has stepped, and other replicas keep the old ones",
)
def _with_one_optimizer_each(original: Original, buffers: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
    return [part for group in original(buffers, *args, **kwargs) for part in _by_optimizer(group, buffers[0])]


def _by_optimizer(group: Any, buffer: Any) -> list[Any]:
    """A bucket group, or one for each optimizer that has buckets in it; ``buffer``: any of the group's ranks."""
    kinds = _kinds(group)
    if len(kinds) == 1:
        return [group]
    ranks = buffer.data_parallel_group, buffer.data_parallel_world_size
    return [type(group)(buckets, group.ddp_config, *ranks) for buckets in kinds.values()]


def _kinds(group: Any) -> dict[bool, list[Any]]:
    """The buckets of a group by whether the layer-wise optimizer has them, in their order."""
    from megatron.core.optimizer.layer_wise_optimizer import _bucket_is_managed_by_layer_wise_optimizer

    found: dict[bool, list[Any]] = {}
    for bucket in group.buckets:
        found.setdefault(_bucket_is_managed_by_layer_wise_optimizer(bucket, default_for_untagged=False), []).append(
            bucket
        )
    return found


@PATCHES.around(
    "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel._make_forward_pre_hook",
    "a module waits for the gather of its own weights alone, but GatedDeltaNet reads those of its convolution "
    "without calling it: with --overlap-param-gather and several buckets it computed with the old ones",
)
def _with_weights_of_layers(original: Original, self: Any) -> Callable[..., None]:
    """A layer waits for all that is in it, called or not: its weights lie in few buckets."""
    from megatron.core.ssm.mamba_layer import MambaLayer
    from megatron.core.transformer.transformer_layer import BaseTransformerLayer

    wait = original(self)

    def hook(module: Any, *inputs: Any) -> None:
        for each in module.modules() if isinstance(module, (BaseTransformerLayer, MambaLayer)) else (module,):
            wait(each)

    return hook


def check_bucket_groups(model_chunks: Sequence[Any]) -> None:
    """Refuse what would drift apart: groups of buckets of two optimizers, and gradients that nobody waits for.

    Mixed groups come of a copy of Megatron-Core's function; with ``overlap_param_gather`` they are gathered in the next
    forward pass, after both steps. DDP with float32 accumulation sets its reduce-scatter for the whole process.

    Raises:
        ConfigError: naming the chunk, and what to do.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers

    accumulates = buffers.dist_reduce_scatter_func is buffers.reduce_scatter_with_fp32_accumulation
    for number, chunk in enumerate(model_chunks):
        ddp_config = getattr(chunk, "ddp_config", None)
        if accumulates and not getattr(ddp_config, "reduce_scatter_with_fp32_accumulation", True):
            raise ConfigError(
                f"Model chunk {number}: DistributedDataParallel without reduce_scatter_with_fp32_accumulation in a "
                "process where another has it: Megatron-Core keeps that choice for all of them, and this one would not "
                "wait for its gradients. Give it to all models of the process, or to none."
            )
        if getattr(ddp_config, "overlap_param_gather", True):
            continue
        for group in (*getattr(chunk, "bucket_groups", ()), *getattr(chunk, "expert_parallel_bucket_groups", ())):
            if len(_kinds(group)) > 1:
                raise ConfigError(
                    f"Model chunk {number}: DistributedDataParallel has buckets of Muon and of the scalar optimizer in "
                    "one group, whose weights are gathered after the step of one of them: replicas would drift apart. "
                    "Call megatron_muon.install() before the model is wrapped, with Megatron-Core's own "
                    "partition_buckets; or use --overlap-param-gather, or DDP without the distributed optimizer's "
                    "buffers (--no-use-layer-wise-param-layout)."
                )

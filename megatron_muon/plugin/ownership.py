"""Who owns a weight: the one predicate in every place where Megatron-Core asks, and the tags that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon._patching import Original, Patches
from megatron_muon.errors import ConfigError
from megatron_muon.plugin import options
from megatron_muon.routing.annotate import annotate, tag
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding, is_expert_parallel

PATCHES = Patches()

_OPTIMIZER = "megatron.core.optimizer"


@PATCHES.around(
    f"{_OPTIMIZER}.emerging_optimizers:_is_nonlinear_or_embedding",
    "param groups honour skip_orthogonalization and use_muon, and leave vectors stored as matrices to Adam",
)
def _with_our_predicate(original: Original, param: torch.nn.Parameter) -> bool:
    return _is_nonlinear_or_embedding(param)


@PATCHES.around(
    f"{_OPTIMIZER}.layer_wise_optimizer:is_managed_by_layer_wise_optimizer",
    "DDP buffers go to the layer-wise optimizer by the same predicate as param groups, or a weight would sit "
    "in a buffer that its optimizer does not own",
)
def _with_its_opposite(original: Original, param: torch.nn.Parameter) -> bool:
    return not _is_nonlinear_or_embedding(param)


@PATCHES.around(
    f"{_OPTIMIZER}.layer_wise_optimizer:tag_params_for_buffer_routing",
    "tags must be on the weights before DDP assigns them to buffers",
)
def _with_annotation(original: Original, model_chunks: Sequence[torch.nn.Module]) -> None:
    annotate_for_buffers(model_chunks)
    original(model_chunks)
    for param in (param for chunk in model_chunks for param in chunk.parameters() if param.requires_grad):
        param.is_managed_by_layer_wise_optimizer = is_in_layer_wise_buffer(param)  # type: ignore[attr-defined]


def is_in_layer_wise_buffer(param: torch.Tensor) -> bool:
    """Whether a trainable weight lies whole in the shard of one rank: Muon's, and all of expert parallelism.

    The latter because of :mod:`megatron_muon.plugin.expert_scalars`.
    """
    return is_expert_parallel(param) or not _is_nonlinear_or_embedding(param)


def annotate_for_buffers(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Put the tags and layouts on the weights by which DDP's buffers are chosen; whatever is wrong is told later."""
    for chunk in model_chunks:
        annotate(chunk, options.without_refusal(), adapters=False)


def check_copies(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Copies of the embedding on several pipeline stages have one gradient, or would drift apart without a sign.

    Raises:
        ConfigError: for a copy whose gradient Megatron-Core does not add to those of the others, and for an output
            layer that has a weight beside the tied one.
    """
    modules: list[Any] = [each for chunk in model_chunks for each in chunk.modules() if hasattr(each, "embd_group")]
    for module in modules:
        copies = [name for name, param in module.named_parameters() if getattr(param, "shared_embedding", False)]
        group = module.embd_group
        if copies and (group is None or dist.get_rank() not in dist.get_process_group_ranks(group)):
            raise ConfigError(
                f"{copies[0]} is a copy of the embedding on a rank outside the embedding group: its gradient would not "
                "be added to those of the other copies. Give megatron.training.pretrain a get_embedding_ranks (or the "
                "model's ProcessGroupCollection an embd) with the ranks of the first stage, of multi-token prediction, "
                "and of the last stage if the output layer is tied."
            )
        apart = getattr(module, "mtp_process", False) and not module.pre_process
        if apart and module.post_process and module.share_embeddings_and_output_weights:
            raise ConfigError(
                "--mtp-num-layers on a last stage whose output layer is tied to the embedding: Megatron-Core gives "
                "that layer a weight of its own, too, which is not trained, which --overlap-grad-reduce waits for, and "
                "with which no checkpoint can be saved. Put multi-token prediction on the stage before the last (a "
                "--pipeline-model-parallel-layout that ends in '|m|L'), or add --untie-embeddings-and-output-weights."
            )


@PATCHES.around(
    f"{_OPTIMIZER}.optimizer:copy_optimizer_param_metadata",
    "the optimizer of a bfloat16 model sees fp32 copies of the weights: they need the layout too",
)
def _with_layout(original: Original, destination: torch.Tensor, source: torch.Tensor) -> None:
    original(destination, source)
    if hasattr(source, LAYOUT_ATTRIBUTE):
        setattr(destination, LAYOUT_ATTRIBUTE, getattr(source, LAYOUT_ATTRIBUTE))


@PATCHES.around(
    "megatron.core.ssm.gated_delta_net.common:_GDNBase.__init__",
    "GatedDeltaNet's fused in_proj carries skip_orthogonalization from its construction on",
)
def _with_tag(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    # A patched Megatron-LM tags in_proj itself, which would outweigh --muon-gdn-in-proj as a user's tag does.
    weight = getattr(self.in_proj, "weight", None)
    if weight is not None and hasattr(weight, "skip_orthogonalization"):
        del weight.skip_orthogonalization
    tag(self, options.current())

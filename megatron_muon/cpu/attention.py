"""Core attention in plain torch.

Megatron-Core's ``DotProductAttention`` lacks the arguments that multi-latent attention passes (``k_channels`` and
``v_channels``: keys and values of different widths) and reads the widths from ``config.kv_channels``. The redirects
keep its class, parameters and softmax, and replace the constructor's widths and the forward pass.

Under context parallelism, which upstream leaves to TransformerEngine, each rank gathers the keys and values of all
ranks and attends with its own queries: what a ring does in parts, at once.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon._patching import Original, Patches
from megatron_muon.context_parallel import balanced_positions, gathered
from megatron_muon.errors import ConfigError

_TARGET = "megatron.core.transformer.dot_product_attention:DotProductAttention"
PATCHES = Patches()


def attention_scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * query @ key^T`` for each head.

    Args:
        query: ``[sq, b, heads, k_channels]``.
        key: ``[sk, b, groups, k_channels]``; ``heads`` is a multiple of ``groups``, each group serves adjacent heads.
        scale: multiplies the products.

    Returns:
        ``[b, heads, sq, sk]``, in the dtype of ``query``.
    """
    sq, batch, heads, _ = query.shape
    key = _expand_groups(key, heads)
    flat_query = query.reshape(sq, batch * heads, -1).transpose(0, 1)
    flat_key = key.reshape(key.size(0), batch * heads, -1).permute(1, 2, 0)
    # beta=0 ignores the first argument; the scale is applied before rounding, as upstream does it.
    scores = torch.baddbmm(query.new_empty(1), flat_query, flat_key, beta=0.0, alpha=scale)
    return scores.view(batch, heads, sq, -1)


def weighted_values(probs: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``probs @ value`` for each head.

    Args:
        probs: ``[b, heads, sq, sk]``.
        value: ``[sk, b, groups, v_channels]``.

    Returns:
        ``[sq, b, heads * v_channels]``.
    """
    batch, heads, sq, sk = probs.shape
    value = _expand_groups(value, heads)
    flat_value = value.reshape(sk, batch * heads, -1).transpose(0, 1)
    context = torch.bmm(probs.view(batch * heads, sq, sk), flat_value)
    return context.view(batch, heads, sq, -1).permute(2, 0, 1, 3).reshape(sq, batch, -1)


def _expand_groups(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat keys or values of ``[s, b, groups, d]`` so that there is one for each head."""
    groups = tensor.size(2)
    return tensor if groups == heads else tensor.repeat_interleave(heads // groups, dim=2)


@PATCHES.around(
    f"{_TARGET}.__init__",
    "multi-latent attention passes k_channels and v_channels, upstream has none; context parallelism is upstream's "
    "TransformerEngine attention's only",
)
def _wrap_init(
    original: Original,
    self: Any,
    config: Any,
    *args: Any,
    k_channels: int | None = None,
    v_channels: int | None = None,
    softmax_scale: float | None = None,
    **kwargs: Any,
) -> None:
    if k_channels is not None and softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(k_channels)
    original(self, _without_context(config), *args, softmax_scale=softmax_scale, **kwargs)
    self.config = config
    if config.context_parallel_size > 1 and self.scale_mask_softmax.window_size is not None:
        raise ConfigError(
            f"--context-parallel-size = {config.context_parallel_size} with --window-size on the CPU: attention "
            "with a sliding window needs TransformerEngine and a GPU; leave one of the two out."
        )
    # What remains of the constructor's arithmetic with kv_channels; forward takes the widths from its arguments.
    self.hidden_size_per_attention_head = k_channels or self.hidden_size_per_attention_head
    if v_channels is not None:
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def _without_context(config: Any) -> Any:
    """The config without context parallelism, for upstream's constructor, which asserts that there is none."""
    if config.context_parallel_size == 1:
        return config
    config = copy.copy(config)
    config.context_parallel_size = 1
    return config


@PATCHES.around(
    f"{_TARGET}.forward",
    "widths of keys and values may differ; keys and values are gathered over context-parallel ranks",
)
def _forward(
    original: Original,
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attn_mask_type: Any = None,
    attention_bias: torch.Tensor | None = None,
    packed_seq_params: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of ``[s, b, heads, channels]`` tensors; the mask is that of the constructor, as upstream has it."""
    if packed_seq_params is not None:
        raise NotImplementedError(
            "packed sequences (packed_seq_params) need TransformerEngine's attention, which needs a GPU; on the CPU "
            "train without sequence packing"
        )
    if attention_bias is not None:
        raise NotImplementedError("attention_bias needs TransformerEngine's attention, which needs a GPU")
    if self.config.context_parallel_size > 1:
        group = _context_group(self)
        attention_mask = _mask_of_rank(self, attention_mask, query.size(0), group)
        key, value = _GatherSequence.apply(key, group), _GatherSequence.apply(value, group)
    scores = attention_scores(query, key, self.softmax_scale)
    probs = self.scale_mask_softmax(scores, attention_mask, self.softmax_offset)
    with _dropout_generator(self.config):
        probs = self.attention_dropout(probs)
    return weighted_values(probs, value)


def _context_group(attention: Any) -> dist.ProcessGroup:
    group = getattr(attention.pg_collection, "cp", None)
    return group or importlib.import_module("megatron.core.parallel_state").get_context_parallel_group()


def _mask_of_rank(
    attention: Any, mask: torch.Tensor | None, queries: int, group: dist.ProcessGroup
) -> torch.Tensor | None:
    """The mask with this rank's queries for rows: as given, or causal by their places in the sequence."""
    if mask is not None or attention.attn_mask_type.name != "causal":
        return mask
    mine = balanced_positions(queries, group.rank(), group.size())
    return torch.arange(queries * group.size()) > mine[:, None]


class _GatherSequence(torch.autograd.Function):
    """``[s / cp, ...]`` of each rank -> ``[s, ...]`` in the order of the sequence, on all; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.length = group, part.size(0)
        return gathered(part, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        total = grad.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[balanced_positions(ctx.length, ctx.group.rank(), ctx.group.size())], None


def _dropout_generator(config: Any) -> contextlib.AbstractContextManager[None]:
    """Heads are split over tensor-parallel ranks, so each rank drops by its own generator (as upstream does)."""
    if config.sequence_parallel:
        return contextlib.nullcontext()
    return importlib.import_module("megatron.core.tensor_parallel").get_cuda_rng_tracker().fork()

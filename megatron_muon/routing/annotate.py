"""Tags and layouts for the weights of Megatron-Core's modules.

One rule a module class. Rules read the module's own attributes and config, never parameter names, and only write
attributes on parameters, so that :func:`annotate` may run any number of times: when a module is built, before DDP
lays out its buffers, and in the optimizer factory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_muon.errors import ConfigError
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, MatrixLayout, Section

__all__ = ["annotate"]

Rule = Callable[[str, Any], None]
"""Annotates the parameters of one module; takes its name, for messages, and the module."""


def annotate(module: torch.nn.Module) -> None:
    """Put tags and layouts on the parameters of ``module`` and of all modules in it.

    Sets ``matrix_layout`` on fused weights, ``skip_orthogonalization`` (with ``skip_orthogonalization_reason``) on
    weights that Muon must not touch, and ``expert_tp`` on the weights of experts, which are cut over the expert
    tensor-parallel group.

    Raises:
        ConfigError: if a fused weight does not have the shape that its module's config implies.
    """
    for name, submodule in module.named_modules():
        for rule in _rules_of(submodule):
            rule(name, submodule)


def _rules_of(module: torch.nn.Module) -> Iterator[Rule]:
    if isinstance(module, torch.nn.Embedding):
        yield _embedding
    for cls in type(module).__mro__:
        # By name, and only in Megatron-Core: importing its classes here would import all of its optional modules.
        if cls.__module__.startswith("megatron.core."):
            if cls.__module__.startswith("megatron.core.transformer.moe.experts"):
                yield _experts
            rule = _RULES.get(cls.__name__)
            if rule is not None:
                yield rule


def _embedding(name: str, module: Any) -> None:
    """Learned tables (word, position, token-type, relative bias): a row is looked up, never multiplied."""
    _skip(module.weight, "embedding table")


def _gated_delta_net(name: str, module: Any) -> None:
    """``in_proj`` stacks q, k, v, output gate, beta and alpha rows: as one matrix its orthogonalization means nothing.

    ``out_proj`` is an ordinary matrix and stays with Muon. See NVIDIA/Megatron-LM#5400.
    """
    _skip(module.in_proj.weight, "fused GatedDeltaNet in_proj")


def _self_attention(name: str, module: Any) -> None:
    """``linear_qkv``: for each query group its q rows, (its gate rows,) one k head, one v head."""
    linear = getattr(module, "linear_qkv", None)
    weight = getattr(getattr(linear, "to_wrap", linear), "weight", None)  # adapters keep the linear layer as to_wrap
    if weight is None:
        return
    config = module.config
    query_rows = config.num_attention_heads // config.num_query_groups * config.kv_channels
    sections = [Section("q", query_rows), Section("k", config.kv_channels), Section("v", config.kv_channels)]
    if getattr(config, "attention_output_gate", False):
        sections.insert(1, Section("gate", query_rows))
    layout = MatrixLayout("qkv", tuple(sections))
    expected = layout.period * config.num_query_groups // module.world_size
    if weight.dim() != 2 or weight.size(0) != expected:
        raise ConfigError(
            f"{name}.linear_qkv.weight has shape {tuple(weight.shape)}, but its config (num_attention_heads "
            f"{config.num_attention_heads}, num_query_groups {config.num_query_groups}, kv_channels "
            f"{config.kv_channels}, tensor parallel {module.world_size}) implies {expected} rows. Set the weight's "
            f"attribute skip_orthogonalization = True to leave it to Adam."
        )
    setattr(weight, LAYOUT_ATTRIBUTE, layout)


def _experts(name: str, module: Any) -> None:
    """Weights inside a container of experts are cut over the expert tensor-parallel group."""
    for param in module.parameters():
        param.expert_tp = True


def _skip(param: Any, reason: str) -> None:
    param.skip_orthogonalization = True
    param.skip_orthogonalization_reason = reason


_RULES: dict[str, Rule] = {
    "SelfAttention": _self_attention,
    "VocabParallelEmbedding": _embedding,
    "_GDNBase": _gated_delta_net,
}

"""Self- and cross-attention: ``linear_qkv``, ``linear_q``, ``linear_kv``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.routing.layout import MatrixLayout, Section
from megatron_muon.routing.rules.linear import fused_layer, weight_of
from megatron_muon.routing.treatment import PER_HEAD, WHOLE_MATRIX, Treatment, WeightTreatment, fused, rule


@rule("SelfAttention")
def self_attention(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """``linear_qkv``: for each query group its q rows, (its gate rows,) one k head, one v head.

    The sizes are those of the module's own config, which heterogeneous layers and vision towers have for themselves.
    With more tensor-parallel ranks than query groups a shard holds a part of a group.
    """
    yield from fused_layer(getattr(module, "linear_qkv", None), lambda weight: _qkv(module, weight, options))


def _qkv(module: Any, weight: torch.Tensor, options: MuonConfig) -> Treatment:
    config, head = module.config, module.config.kv_channels
    query_rows = config.num_attention_heads // config.num_query_groups * head
    sections = [Section("q", query_rows), Section("k", head), Section("v", head)]
    if getattr(config, "attention_output_gate", False):
        sections.insert(1, Section("gate", query_rows))
    return fused(
        "qkv",
        weight,
        options.qkv_choice,
        sections,
        option="qkv",
        rows=sum(section.rows for section in sections) * config.num_query_groups // module.world_size,
        source=f"its config (num_attention_heads {config.num_attention_heads}, num_query_groups "
        f"{config.num_query_groups}, kv_channels {head}, tensor parallel {module.world_size})",
        heads={section.name: head for section in sections},
    )


@rule("CrossAttention")
def cross_attention(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """``linear_kv``: for each head its k rows, then its v rows. ``linear_q``: the heads' rows."""
    config, head = module.config, module.config.kv_channels
    yield from fused_layer(
        getattr(module, "linear_kv", None),
        lambda weight: fused(
            "kv",
            weight,
            options.qkv_choice,
            [Section("k", head), Section("v", head)],
            option="qkv",
            rows=2 * head * config.num_attention_heads // module.world_size,
            source=f"its config (num_attention_heads {config.num_attention_heads}, kv_channels {head})",
            heads={"k": head, "v": head},
        ),
    )
    weight = weight_of(getattr(module, "linear_q", None))
    if weight is not None:
        choice = PER_HEAD if options.qkv_choice == PER_HEAD else WHOLE_MATRIX
        yield weight, heads_of("q", choice, weight.size(0), head)


def heads_of(name: str, choice: str, rows: int, head: int) -> Treatment:
    """A projection of one kind: one matrix, or one for each head."""
    variants = {WHOLE_MATRIX: MatrixLayout("whole")}
    problem = ""
    if rows % head == 0:
        variants[PER_HEAD] = MatrixLayout(name, (Section(name, head, matrix_rows=head),))
    else:
        problem = f"has {rows} rows, which are not whole heads of {head}"
    return Treatment(name, choice, variants, problem=problem, option="qkv")


def multihead_attention(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """``torch.nn.MultiheadAttention``: ``in_proj_weight`` stacks q, k and v; or they are three bare weights."""
    names, weight, rows = ("q", "k", "v"), module.in_proj_weight, module.embed_dim
    if weight is None:
        choice = PER_HEAD if options.qkv_choice == PER_HEAD else WHOLE_MATRIX
        for name in names:
            weight = getattr(module, f"{name}_proj_weight")
            yield weight, heads_of(name, choice, weight.size(0), module.head_dim)
        return
    treatment = fused(
        "qkv",
        weight,
        options.qkv_choice,
        [Section(name, rows) for name in names],
        option="qkv",
        rows=3 * rows,
        source=f"embed_dim {rows}",
        heads=dict.fromkeys(names, module.head_dim),
    )
    yield weight, treatment

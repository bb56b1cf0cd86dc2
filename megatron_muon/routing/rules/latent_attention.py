"""Multi-latent attention (MLA): down projections to latents, up projections to heads; the DSA indexer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.routing.layout import Section
from megatron_muon.routing.rules.attention import heads_of
from megatron_muon.routing.rules.linear import fused_layer, weight_of
from megatron_muon.routing.treatment import ADAM, WHOLE_MATRIX, Treatment, WeightTreatment, fused, rule


@rule("MLASelfAttention", "AbsorbedMLASelfAttention")
def latent_attention(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """All projections of an MLA layer but ``linear_q_down_proj`` and ``linear_proj``, which are one matrix each."""
    yield from _up_projections(module, options)
    yield from fused_layer(
        getattr(module, "linear_kv_down_proj", None),
        lambda weight: _down_projection("mla_kv_down", module, options, weight, _latents(module)),
    )
    yield from fused_layer(
        getattr(module, "linear_qkv_down_proj", None),
        lambda weight: _down_projection("mla_qkv_down", module, options, weight, _fused_latents(module, weight)),
    )


def _up_projections(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """For each head: q [nope; rope], kv [k nope; v]."""
    config = module.config
    query = [("q_nope", config.qk_head_dim), ("q_rope", config.qk_pos_emb_head_dim)]
    key_value = [("k_nope", config.qk_head_dim), ("v", config.v_head_dim)]
    for attribute, kind, parts in (
        ("linear_q_proj", "mla_q", query),
        ("linear_q_up_proj", "mla_q_up", query),
        ("linear_kv_up_proj", "mla_kv_up", key_value),
    ):
        treat = functools.partial(_up_projection, kind, module, options, parts)
        yield from fused_layer(getattr(module, attribute, None), treat)


def _up_projection(
    kind: str, module: Any, options: MuonConfig, parts: list[tuple[str, int]], weight: torch.Tensor
) -> Treatment:
    sections = [Section(name, rows) for name, rows in parts if rows]
    heads = module.config.num_attention_heads
    return fused(
        kind,
        weight,
        options.mla_up,
        sections,
        option="mla_up",
        rows=sum(rows for _, rows in parts) * heads // module.world_size,
        source=f"its config (num_attention_heads {heads}, {', '.join(f'{name} {rows}' for name, rows in parts)}, "
        f"tensor parallel {module.world_size})",
        heads={section.name: section.rows for section in sections},
    )


def _latents(module: Any) -> list[Section]:
    return _latents_of(module.config.kv_lora_rank, module.config.qk_pos_emb_head_dim)


def _latents_of(latent: int, rope: int) -> list[Section]:
    return [Section(name, rows) for name, rows in (("kv_latent", latent), ("k_rope", rope)) if rows]


def _fused_latents(module: Any, weight: torch.Tensor) -> list[Section]:
    """[q latent; kv latent; k rope], in each replica or, divided by tensor parallelism, in two parts a rank.

    A rank then holds its part of the q latent and, after it, its part of [kv latent; k rope]: that is how the layer's
    forward pass cuts its output.
    """
    config, ranks = module.config, module.world_size
    latent, rope = config.kv_lora_rank, config.qk_pos_emb_head_dim
    whole = [Section("q_latent", config.q_lora_rank), *_latents(module)]
    if weight.size(0) == sum(section.rows for section in whole) or (latent + rope) % ranks:
        return whole
    share = (latent + rope) // ranks
    sections = []
    for rank in range(ranks):
        in_latent = max(0, min(latent, (rank + 1) * share) - rank * share)
        sections += [Section("q_latent", config.q_lora_rank // ranks), *_latents_of(in_latent, share - in_latent)]
    return sections


def _down_projection(
    kind: str, module: Any, options: MuonConfig, weight: torch.Tensor, sections: list[Section]
) -> Treatment:
    """The weight is whole on every rank (TransformerEngine) or divided along its rows (Megatron's own layers)."""
    rows, total = weight.size(0), sum(section.rows for section in sections)
    divided = rows == total // module.world_size and total % module.world_size == 0
    return fused(
        kind,
        weight,
        options.mla_down,
        sections,
        option="mla_down",
        rows=rows if divided else total,
        source=f"its config ({', '.join(f'{section.name} {section.rows}' for section in sections)}, tensor parallel "
        f"{module.world_size})",
    )


@rule("DSAIndexer")
def dsa_indexer(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """DeepSeek sparse attention: one weight a head (``linear_weights_proj``) is a gate, not a projection."""
    weight = weight_of(getattr(module, "linear_weights_proj", None))
    if weight is not None:
        yield weight, Treatment("dsa_weights", ADAM, reason="gates of the DSA indexer")
    weight = weight_of(getattr(module, "linear_wq_b", None))
    if weight is not None:
        yield weight, heads_of("index_q", WHOLE_MATRIX, weight.size(0), module.index_head_dim)

"""Layouts against Megatron-Core's own functions that split a layer's output: the same rows on real ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_muon.config import MuonConfig
from tests import row_orders
from tests.megatron.fused_modules import (
    HEAD,
    HEADS,
    HIDDEN,
    SIZES,
    gpt,
    t5_decoder_layer,
)
from tests.megatron.harness import Layout
from tests.pool import RankPool


def numbered_attention(layout: Layout, model: dict[str, Any], cross: bool, options: dict[str, Any]) -> Any:
    """Row numbers as Megatron's own attention splits them, on this rank: [q, (gate,) k, v], each (heads, rows).

    Column 0 of every weight holds the row's number in the whole weight, and the input is the unit vector of column 0:
    each projection gives the numbers of its rows.
    """
    from megatron.core import parallel_state

    from megatron_muon.routing.annotate import annotate

    layout.initialize()
    builder = t5_decoder_layer if cross else gpt
    # A norm in front of a projection would change its input.
    module = builder(dataclasses.replace(layout, local=True), **{**SIZES, **model})
    annotate(module, MuonConfig(**options))
    attention = module.cross_attention if cross else module.decoder.layers[0].self_attention
    rank = parallel_state.get_tensor_model_parallel_rank()
    for layer in (attention.linear_q, attention.linear_kv) if cross else (attention.linear_qkv,):
        with torch.no_grad():
            rows = layer.weight.size(0)
            layer.weight.zero_()
            layer.weight[:, 0] = torch.arange(rank * rows, (rank + 1) * rows)
    x = torch.zeros(1, 1, HIDDEN)
    x[..., 0] = 1.0
    with torch.no_grad():
        gated = bool(model.get("attention_output_gate"))
        parts = attention.get_query_key_value_tensors(x, x if cross else None, output_gate=gated)
    names = ("q", "k", "v", "gate") if gated else ("q", "k", "v")
    layouts = {
        name: param.matrix_layout
        for name, param in attention.named_parameters()
        if name in ("linear_qkv.weight", "linear_q.weight", "linear_kv.weight")
    }
    return {name: part.reshape(-1, HEAD) for name, part in zip(names, parts, strict=True)}, layouts


@pytest.mark.parametrize("choice", ["split", "per_head"])
@pytest.mark.parametrize(
    "tp,groups,gated",
    [
        (1, HEADS, False),
        pytest.param(1, 2, True, marks=pytest.mark.slow),
        (2, 2, True),
        pytest.param(2, 4, False, marks=pytest.mark.slow),
        (4, 2, False),
        pytest.param(4, 2, True, marks=pytest.mark.slow),
    ],
)
def test_megatron_splits_self_attention_in_the_same_rows(
    pool: RankPool, tp: int, groups: int, gated: bool, choice: str
) -> None:
    model = {"num_query_groups": groups, "attention_output_gate": gated}
    ranks = pool.run(numbered_attention, tp, Layout(tp=tp), model, False, {"qkv": choice})
    layout = ranks[0][1]["linear_qkv.weight"]
    rows = (HEADS * (2 if gated else 1) + 2 * groups) * HEAD
    found = row_orders.matrices_by_layout(layout, torch.arange(float(rows))[:, None])
    for name in ("q", "gate", "k", "v") if gated else ("q", "k", "v"):
        heads = torch.cat([parts[name] for parts, _ in ranks])
        if name in ("k", "v"):  # with more ranks than groups, some ranks see the same head
            heads = heads[:: max(1, tp // groups)]
        mine = [found[label] for label in sorted(found) if label[0] == name]
        assert torch.equal(torch.cat(mine).flatten(), heads.flatten()), name
        assert len(mine) == (len(heads) if choice == "per_head" else 1)


@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_splits_cross_attention_in_the_same_rows(pool: RankPool, tp: int) -> None:
    ranks = pool.run(numbered_attention, tp, Layout(tp=tp), {}, True, {"qkv": "per_head"})
    parts = {name: torch.cat([parts[name] for parts, _ in ranks]) for name in ("q", "k", "v")}
    for weight, rows in (("linear_q.weight", HEADS * HEAD), ("linear_kv.weight", 2 * HEADS * HEAD)):
        found = row_orders.matrices_by_layout(ranks[0][1][weight], torch.arange(float(rows))[:, None])
        for (name, head), matrix in found.items():
            assert torch.equal(matrix.flatten(), parts[name][head]), (name, head)

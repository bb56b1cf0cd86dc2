"""What each rule says about the weights of real Megatron-Core modules, row by row, at every tensor-parallel size.

The order of the rows is written out from the sizes of the model (:mod:`tests.row_orders`); in
:mod:`tests.megatron.test_row_splits` it is read off Megatron-Core's own functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from megatron_muon.routing.layout import SCALAR
from tests import row_orders
from tests.megatron.fused_modules import (
    EXPERTS,
    FFN,
    GDN,
    GROUPS,
    HEAD,
    HEADS,
    HIDDEN,
    KEY_HEAD,
    KEY_HEADS,
    KV_LORA,
    MAMBA,
    MAMBA_HEAD,
    MAMBA_HEADS,
    MLA,
    MOE,
    MOE_FFN,
    NOPE,
    Q_LORA,
    ROPE,
    SHARED_FFN,
    STATE,
    VALUE,
    VALUE_HEAD,
    VALUE_HEADS,
    Weight,
    bert,
    fused_latent_attention,
    gpt,
    multi_token_prediction,
    t5_decoder_layer,
    vision_tower,
    weights,
)
from tests.pool import RankPool
from tests.row_orders import Label
from tools.splitting import merge, split


class Case(NamedTuple):
    """One row of the table of fused weights.

    Attributes:
        builder: makes the module.
        model: changes to the config.
        weight: its name ends so.
        options: of :class:`MuonConfig`.
        order: tensor-parallel size -> label of each row of the whole weight.
        columns: of the weight.
        scalar: blocks that follow the scalar optimizer's rule.
        sizes: the tensor-parallel sizes at which the module can be built.
    """

    builder: Callable[..., torch.nn.Module]
    model: dict[str, Any]
    weight: str
    options: dict[str, Any]
    order: Callable[[int], list[Label]]
    columns: int = HIDDEN
    scalar: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2, 4, 8)

    @property
    def module(self) -> str:
        """The same for cases that are rows of one module."""
        return f"{self.builder} {self.model}"


def attention(groups: int, choice: str, *, gated: bool = False, sizes: tuple[int, ...] = (1, 2, 4, 8)) -> Case:
    """``linear_qkv`` of a GPT."""
    model = {"num_query_groups": groups, "attention_output_gate": gated}
    order = row_orders.query_groups(HEADS, groups, HEAD, gated=gated, per_head=choice == "per_head")
    return Case(gpt, model, "self_attention.linear_qkv.weight", {"qkv": choice}, lambda tp: order, sizes=sizes)


def cross_attention(choice: str) -> Case:
    order = row_orders.heads_of_parts(HEADS, {"k": HEAD, "v": HEAD}, per_head=choice == "per_head")
    return Case(t5_decoder_layer, {}, "cross_attention.linear_kv.weight", {"qkv": choice}, lambda tp: order)


def latent_up(weight: str, parts: dict[str, int], columns: int, choice: str, **model: Any) -> Case:
    order = row_orders.heads_of_parts(HEADS, parts, per_head=choice == "per_head")
    return Case(gpt, {**MLA, **model}, f"{weight}.weight", {"mla_up": choice}, lambda tp: order, columns)


def whole(
    builder: Callable[..., Any], model: dict[str, Any], weight: str, rows: int, columns: int, **options: Any
) -> Case:
    return Case(builder, model, weight, options, lambda tp: [("whole", 0)] * rows, columns)


def glu(weight: str, ffn: int, model: dict[str, Any]) -> Case:
    sizes = {"gate": ffn, "up": ffn}
    return Case(gpt, model, weight, {}, lambda tp: row_orders.sections_of_ranks(tp, sizes))


QUERY, KEY_VALUE = {"q_nope": NOPE, "q_rope": ROPE}, {"k_nope": NOPE, "v": VALUE}
GDN_SIZES = {
    "q": KEY_HEADS * KEY_HEAD,
    "k": KEY_HEADS * KEY_HEAD,
    "v": VALUE_HEADS * VALUE_HEAD,
    "z": VALUE_HEADS * VALUE_HEAD,
    "beta": VALUE_HEADS,
    "alpha": VALUE_HEADS,
}
GDN_HEADS = {"q": KEY_HEAD, "k": KEY_HEAD, "v": VALUE_HEAD, "z": VALUE_HEAD}
MAMBA_SIZES = {
    "z": MAMBA_HEADS * MAMBA_HEAD,
    "x": MAMBA_HEADS * MAMBA_HEAD,
    "B": GROUPS * STATE,
    "C": GROUPS * STATE,
    "dt": MAMBA_HEADS,
}
GDN_ROWS, MAMBA_ROWS = sum(GDN_SIZES.values()), sum(MAMBA_SIZES.values())
IN_PROJ = "in_proj.weight"

CASES: dict[str, Case] = {
    **{f"qkv_mha_{choice}": attention(HEADS, choice) for choice in ("split", "per_head")},
    **{f"qkv_gqa_{choice}": attention(2, choice) for choice in ("split", "per_head")},
    **{f"qkv_mqa_{choice}": attention(1, choice) for choice in ("split", "per_head")},
    **{f"qkv_gated_{choice}": attention(2, choice, gated=True) for choice in ("split", "per_head")},
    "qkv_whole": whole(gpt, {}, "linear_qkv.weight", (HEADS + 4) * HEAD, HIDDEN, qkv="whole"),
    "qkv_no_split": whole(gpt, {}, "linear_qkv.weight", (HEADS + 4) * HEAD, HIDDEN, split_qkv=False),
    "linear_proj": whole(gpt, {}, "self_attention.linear_proj.weight", HIDDEN, HEADS * HEAD),
    **{f"cross_kv_{choice}": cross_attention(choice) for choice in ("split", "per_head")},
    "cross_kv_whole": whole(
        t5_decoder_layer, {}, "cross_attention.linear_kv.weight", 2 * HEADS * HEAD, HIDDEN, qkv="whole"
    ),
    "cross_q": whole(t5_decoder_layer, {}, "cross_attention.linear_q.weight", HEADS * HEAD, HIDDEN),
    "cross_q_per_head": Case(
        t5_decoder_layer,
        {},
        "cross_attention.linear_q.weight",
        {"qkv": "per_head"},
        lambda tp: row_orders.heads_of_parts(HEADS, {"q": HEAD}, per_head=True),
    ),
    **{
        f"mla_q_{choice}": latent_up("linear_q_proj", QUERY, HIDDEN, choice, q_lora_rank=None, qk_layernorm=False)
        for choice in ("split", "per_head")
    },
    **{f"mla_q_up_{choice}": latent_up("linear_q_up_proj", QUERY, Q_LORA, choice) for choice in ("split", "per_head")},
    **{
        f"mla_kv_up_{choice}": latent_up("linear_kv_up_proj", KEY_VALUE, KV_LORA, choice)
        for choice in ("split", "per_head")
    },
    "mla_kv_up_whole": whole(gpt, MLA, "linear_kv_up_proj.weight", HEADS * (NOPE + VALUE), KV_LORA, mla_up="whole"),
    "mla_q_down": whole(gpt, MLA, "linear_q_down_proj.weight", Q_LORA, HIDDEN),
    "mla_kv_down": Case(
        gpt,
        MLA,
        "linear_kv_down_proj.weight",
        {},
        lambda tp: row_orders.consecutive({"kv_latent": KV_LORA, "k_rope": ROPE}),
    ),
    "mla_kv_down_whole": whole(gpt, MLA, "linear_kv_down_proj.weight", KV_LORA + ROPE, HIDDEN, mla_down="whole"),
    "mla_fused_down": Case(
        fused_latent_attention,
        MLA,
        "linear_qkv_down_proj.weight",
        {},
        lambda tp: row_orders.fused_latents(tp, Q_LORA, KV_LORA, ROPE),
    ),
    "mla_fused_q_up": latent_up("linear_q_up_proj", QUERY, Q_LORA, "per_head")._replace(builder=fused_latent_attention),
    "gdn_split": Case(
        gpt,
        GDN,
        IN_PROJ,
        {"gdn_in_proj": "split"},
        lambda tp: row_orders.sections_of_ranks(tp, GDN_SIZES),
        scalar=("beta", "alpha"),
    ),
    "gdn_per_head": Case(
        gpt,
        GDN,
        IN_PROJ,
        {"gdn_in_proj": "per_head"},
        lambda tp: row_orders.sections_of_ranks(tp, GDN_SIZES, GDN_HEADS),
        scalar=("beta", "alpha"),
    ),
    "gdn_whole": whole(gpt, GDN, IN_PROJ, GDN_ROWS, HIDDEN, gdn_in_proj="whole"),
    "gdn_out": whole(gpt, GDN, "out_proj.weight", HIDDEN, VALUE_HEADS * VALUE_HEAD),
    "mamba_split": Case(
        gpt,
        MAMBA,
        "mixer.in_proj.weight",
        {"mamba_in_proj": "split"},
        lambda tp: row_orders.sections_of_ranks(tp, MAMBA_SIZES),
        scalar=("dt",),
    ),
    "mamba_whole": whole(gpt, MAMBA, "mixer.in_proj.weight", MAMBA_ROWS, HIDDEN, mamba_in_proj="whole"),
    "mamba_out": whole(gpt, MAMBA, "mixer.out_proj.weight", HIDDEN, MAMBA_HEADS * MAMBA_HEAD),
    "glu": glu("mlp.linear_fc1.weight", FFN, {}),
    "glu_whole": whole(gpt, {}, "mlp.linear_fc1.weight", 2 * FFN, HIDDEN, glu="whole"),
    "not_gated": whole(gpt, {"gated_linear_unit": False}, "mlp.linear_fc1.weight", FFN, HIDDEN),
    "fc2": whole(gpt, {}, "mlp.linear_fc2.weight", HIDDEN, FFN),
    "shared_expert": glu("shared_experts.linear_fc1.weight", SHARED_FFN, MOE),
    "expert": glu("local_experts.0.linear_fc1.weight", MOE_FFN, MOE),
    "expert_fc2": whole(gpt, MOE, "local_experts.3.linear_fc2.weight", HIDDEN, MOE_FFN),
    "router": whole(gpt, MOE, "router.weight", EXPERTS, HIDDEN),
    "mtp": whole(multi_token_prediction, {}, "eh_proj.weight", HIDDEN, 2 * HIDDEN),
    "clip": Case(
        functools.partial(vision_tower, kind="clip"),
        {},
        "linear_qkv.weight",
        {},
        lambda tp: row_orders.query_groups(4, 4, 8),
        sizes=(1, 2, 4),
    ),
    "radio": Case(
        functools.partial(vision_tower, kind="radio"),
        {},
        "linear_qkv.weight",
        {},
        lambda tp: row_orders.query_groups(4, 4, 8),
        sizes=(1, 2, 4),
    ),
}


Found = Callable[[str, int], dict[str, Weight]]


@pytest.fixture(scope="module")
def found_in(pool: RankPool) -> Found:
    """The weights of a case's module at a tensor-parallel size; cases that share a module build it once."""

    @functools.cache
    def of_module(module: str) -> dict[str, dict[int, dict[str, Weight]]]:
        names = [name for name, case in CASES.items() if case.module == module]
        case, choices = CASES[names[0]], [CASES[name].options for name in names]
        found = pool.run(weights, 1, case.builder, case.model, choices, case.sizes)[0]
        return {name: {tp: each[number] for tp, each in found.items()} for number, name in enumerate(names)}

    return lambda name, tp: of_module(CASES[name].module)[name][tp]


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_weight(found_in: Found, name: str) -> None:
    case = CASES[name]
    for tp in case.sizes:
        found = found_in(name, tp)
        mine = {key: weight for key, weight in found.items() if key.endswith(case.weight)}
        assert mine, f"no weight ends with {case.weight}: {list(found)}"
        for key, weight in mine.items():
            check_weight(case, tp, weight, f"{key} at tensor parallel {tp}")


def check_weight(case: Case, tp: int, weight: Weight, what: str) -> None:
    """The layout has the rows of ``case.order``; shapes, rules and round trip agree."""
    order = case.order(tp)
    assert weight.reason is None and weight.layout is not None, f"{what}: {weight.reason}"
    shape = list(weight.shape)
    if weight.divided is not None:
        shape[weight.divided] *= tp
    assert shape == [len(order), case.columns], what
    whole = torch.arange(float(len(order)))[:, None].expand(shape).contiguous()
    expected = row_orders.matrices(order, whole)
    found = row_orders.matrices_by_layout(weight.layout, whole)
    assert set(found) == set(expected), what
    for label, matrix in expected.items():
        assert torch.equal(found[label], matrix), f"{what}: {label}"
    blocks = weight.layout.blocks(tuple(shape))
    for block in blocks:
        if block.name != "whole" and weight.layout.sections:
            assert (block.rows, block.columns) == tuple(expected[(block.name, 0)].shape), what
            assert block.count == len([label for label in expected if label[0] == block.name]), what
    assert {block.name for block in blocks if block.rule == SCALAR} == set(case.scalar), what
    assert torch.equal(merge(weight.layout, split(weight.layout, whole)), whole), what


def test_shards_that_cut_through_sections(found_in: Found) -> None:
    """The sizes above are such that shards of these weights hold broken periods, which is where errors would hide."""
    for name, tp in (("qkv_gqa_split", 4), ("qkv_mqa_split", 2), ("mla_kv_down", 2), ("mla_fused_down", 4)):
        found, suffix = found_in(name, tp), CASES[name].weight
        (weight,) = [weight for key, weight in found.items() if key.endswith(suffix) and ".1." not in key]
        assert weight.layout is not None and not weight.layout.fits(weight.shape[0]), name


SCALAR_WEIGHTS: dict[str, tuple[Callable[..., torch.nn.Module], dict[str, Any], dict[str, str]]] = {
    "gpt": (
        gpt,
        {"position": "learned_absolute"},
        {
            "word_embeddings.weight": "embedding",
            "position_embeddings.weight": "embedding table",
            "output_layer.weight": "embedding or output layer",
        },
    ),
    "gdn": (gpt, GDN, {IN_PROJ: "fused GatedDeltaNet in_proj", "conv1d.weight": "3-D", "A_log": "1-D"}),
    "mamba": (gpt, MAMBA, {IN_PROJ: "fused Mamba in_proj", "conv1d_weight": "3-D", "A_log": "1-D"}),
    "moe": (gpt, MOE, {"shared_experts.gate_weight": "a single row or column"}),
    "bert": (
        bert,
        {},
        {
            "position_embeddings.weight": "embedding table",
            "tokentype_embeddings.weight": "embedding table",
            "binary_head.weight": "output layer",
        },
    ),
    "clip": (
        functools.partial(vision_tower, kind="clip"),
        {},
        {"position_embeddings.weight": "embedding table", "class_token": "embedding table"},
    ),
    "radio": (
        functools.partial(vision_tower, kind="radio"),
        {},
        {"position_embeddings": "embedding table", "class_token": "embedding table", "mask_token": "embedding table"},
    ),
}


@pytest.mark.parametrize("name", SCALAR_WEIGHTS)
def test_weights_of_the_scalar_optimizer(pool: RankPool, name: str) -> None:
    builder, model, expected = SCALAR_WEIGHTS[name]
    for (found,) in pool.run(weights, 1, builder, model, [{}], (1, 2))[0].values():
        for suffix, reason in expected.items():
            reasons = {weight.reason for key, weight in found.items() if key.endswith(suffix)}
            assert len(reasons) == 1 and (reasons.pop() or "").startswith(reason), suffix


def test_router_by_choice(pool: RankPool) -> None:
    ((found,),) = pool.run(weights, 1, gpt, MOE, [{"router": "adam"}], (1,))[0].values()
    reasons = {weight.reason for key, weight in found.items() if key.endswith("router.weight")}
    assert reasons == {"--muon-router adam"}


def test_only_experts_are_divided_over_the_expert_group(pool: RankPool) -> None:
    ((found,),) = pool.run(weights, 1, gpt, MOE, [{}], (2,))[0].values()
    assert {key for key, weight in found.items() if weight.expert} == {key for key in found if ".mlp.experts." in key}

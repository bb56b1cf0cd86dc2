"""Who updates what, as which matrices, on models of TransformerEngine's modules."""

from __future__ import annotations

import contextlib
import io

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.te import models, needs_transformer_engine

pytestmark = needs_transformer_engine

ADAM = ("GroupStepAdamW", None)
"""The CPU runtime's AdamW; not TransformerEngine's FusedAdam, which needs a GPU."""


def muon(*sections: str) -> tuple[str, tuple[str, ...]]:
    return "Muon", sections


QKV, WHOLE, GLU = muon("q", "k", "v"), muon(), muon("gate", "up")

ATTENTION = {"linear_qkv.weight": QKV, "linear_proj.weight": WHOLE}
DENSE = {"mlp.linear_fc1.weight": GLU, "mlp.linear_fc2.weight": WHOLE}
ENDS = {
    "word_embeddings.weight": ADAM,
    "output_layer.weight": ADAM,
    "final_layernorm.weight": ADAM,
}
EXPERTS = {
    "router.weight": WHOLE,
    "experts.linear_fc1.weight0": GLU,
    "experts.linear_fc1.weight3": GLU,
    "experts.linear_fc2.weight3": WHOLE,
    "shared_experts.linear_fc1.weight": GLU,
    "shared_experts.linear_fc2.weight": WHOLE,
    "shared_experts.gate_weight": ADAM,
}
LATENT = {
    "linear_kv_down_proj.weight": muon("kv_latent", "k_rope"),
    "linear_kv_up_proj.weight": muon("k_nope", "v"),
    "linear_proj.weight": WHOLE,
}
LOW_RANK_QUERY = {"linear_q_down_proj.weight": WHOLE, "linear_q_up_proj.weight": muon("q_nope", "q_rope")}

EXPECTED = {
    "dense": {**ENDS, **ATTENTION, **DENSE, "linear_qkv.layer_norm_weight": ADAM},
    "moe": {**ENDS, **ATTENTION, **EXPERTS},
    "moe_single_weight": {**ATTENTION, "experts.linear_fc1.weight": GLU, "experts.linear_fc2.weight": WHOLE},
    "moe_sequential": {"local_experts.3.linear_fc1.weight": GLU, "local_experts.3.linear_fc2.weight": WHOLE},
    "moe_latent": {**EXPERTS, "fc1_latent_proj.weight": WHOLE, "fc2_latent_proj.weight": WHOLE},
    "mla": {**ENDS, **LATENT, **LOW_RANK_QUERY, **DENSE},
    "mla_without_q_lora": {**LATENT, "linear_q_proj.weight": muon("q_nope", "q_rope")},
    "mla_fused_down": {
        "linear_qkv_down_proj.weight": muon("q_latent", "kv_latent", "k_rope"),
        "linear_kv_up_proj.weight": muon("k_nope", "v"),
    },
    "hybrid": {
        "self_attention.in_proj.weight": ADAM,
        "self_attention.conv1d.weight": ADAM,
        "self_attention.out_proj.weight": WHOLE,
        "linear_qkv.weight": muon("q", "gate", "k", "v"),
        **DENSE,
    },
    "hybrid_moe": {"self_attention.in_proj.weight": ADAM, **EXPERTS},
    "mtp": {**ENDS, "eh_proj.weight": WHOLE, "mtp_model_layer.self_attention.linear_qkv.weight": QKV, **DENSE},
    "dsa": {
        **LATENT,
        **LOW_RANK_QUERY,
        "indexer.linear_wq_b.weight": WHOLE,
        "indexer.linear_wk.weight": WHOLE,
        "indexer.linear_weights_proj.weight": ADAM,
    },
}
"""Model -> end of a name, of one weight or several -> (class of the optimizer, names of the matrices if fused)."""

LAYOUTS = {
    model: Layout(tp=2, sp="moe" in model or model == "dsa", etp=1 if model == "moe_single_weight" else None)
    for model in models.MODELS
}

Routes = dict[str, tuple[str, tuple[str, ...] | None]]


def routes(layout: Layout, model: str) -> tuple[Routes, str]:
    """Name -> (optimizer, sections), read from the built optimizers, and what was printed."""
    import megatron_muon
    from megatron_muon.routing import layout_of

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    layout.initialize()
    chunks = harness.wrap([models.build_model(layout, model)], layout)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        optimizer = get_megatron_optimizer(harness.optimizer_config(layout), chunks)
    names = {param: name.removeprefix("module.") for name, param in chunks[0].named_parameters() if param.requires_grad}
    found: Routes = {}
    for part in optimizer.chained_optimizers:
        holder = type(part.optimizer).__name__
        for param in [param for group in part.optimizer.param_groups for param in group["params"]]:
            assert names[param] not in found, f"{names[param]} is held twice"
            sections = tuple(dict.fromkeys(section.name for section in layout_of(param).sections))
            found[names[param]] = (holder, sections if holder == "Muon" else None)
    assert set(found) == set(names.values()), "every weight has an optimizer"
    return found, printed.getvalue()


def test_every_model_has_expectations() -> None:
    assert EXPECTED.keys() == models.MODELS.keys()


@pytest.mark.parametrize("model", models.MODELS)
def test_routes(pool: RankPool, model: str) -> None:
    results = pool.run(routes, 2, LAYOUTS[model], model)
    for found, _ in results:
        for end, expected in EXPECTED[model].items():
            matching = {name: route for name, route in found.items() if name.endswith(end)}
            assert matching, f"no weight of {sorted(found)} ends with {end}"
            assert set(matching.values()) == {expected}, matching
    table = results[0][1]
    assert "megatron_muon" in table and "word_embeddings.weight" in table and not results[1][1]

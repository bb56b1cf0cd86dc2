"""Who updates what, on real Megatron-Core models."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_grouped_gemm": False}
MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "num_query_groups": 4,
    "qk_layernorm": True,
    "rope_type": "rope",
}
GDN = {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "attention_output_gate": True,
}


def routes(layout: Layout, build: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> (optimizer class that holds it, its layout), read from the built optimizers."""
    run = harness.start(layout, optimizer=optimizer, **build)
    names = {param: name for chunk in run.chunks for name, param in chunk.named_parameters()}
    result = {}
    for part in run.optimizer.chained_optimizers:
        optimizer_name = "AdamW" if isinstance(part.optimizer, torch.optim.AdamW) else type(part.optimizer).__name__
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                kind = getattr(param, "matrix_layout", None)
                name = harness_name(names[param])
                assert name not in result, f"{name} is held twice"
                result[name] = (optimizer_name, kind.kind if kind else "")
    assert set(result) == {harness_name(name) for name in names.values()}, "every weight has an optimizer"
    return result


def harness_name(name: str) -> str:
    return name.removeprefix("module.")


def _optimizer_of(result: dict[str, tuple[str, str]], suffix: str) -> set[str]:
    found = {optimizer for name, (optimizer, _) in result.items() if name.endswith(suffix)}
    assert found, f"no weight ends with {suffix}"
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_gpt(pool: RankPool, tp: int) -> None:
    for result in pool.run(routes, tp, Layout(tp=tp), {}, {}):
        for suffix in ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"):
            assert _optimizer_of(result, suffix) == {"Muon"}
        for suffix in ("word_embeddings.weight", "output_layer.weight", "layernorm.weight"):
            assert _optimizer_of(result, suffix) == {"AdamW"}
        assert result["decoder.layers.0.self_attention.linear_qkv.weight"] == ("Muon", "qkv")


def test_learned_position_embeddings_go_to_adam(pool: RankPool) -> None:
    result = pool.run(routes, 1, Layout(), {"position": "learned_absolute", "tied": True}, {})[0]
    assert _optimizer_of(result, "position_embeddings.weight") == {"AdamW"}


def test_moe(pool: RankPool) -> None:
    build = {**MOE, "moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}
    result = pool.run(routes, 1, Layout(), build, {})[0]
    assert _optimizer_of(result, "experts.local_experts.0.linear_fc1.weight") == {"Muon"}
    assert _optimizer_of(result, "router.weight") == {"Muon"}
    assert _optimizer_of(result, "shared_experts.linear_fc1.weight") == {"Muon"}
    assert _optimizer_of(result, "shared_experts.gate_weight") == {"AdamW"}, "a 1 x h weight is a vector"


def expert_tags(layout: Layout) -> dict[str, bool]:
    run = harness.start(layout, **MOE, moe_shared_expert_intermediate_size=16)
    return {name: getattr(param, "expert_tp", False) for name, param in run.chunks[0].named_parameters()}


def test_only_experts_are_cut_over_the_expert_group(pool: RankPool) -> None:
    tags = pool.run(expert_tags, 2, Layout(ep=2))[0]
    for name, tag in tags.items():
        assert tag is (".mlp.experts." in name), name


def test_mla(pool: RankPool) -> None:
    result = pool.run(routes, 2, Layout(tp=2), MLA, {})[0]
    for suffix in ("linear_q_up_proj.weight", "linear_kv_up_proj.weight", "linear_proj.weight"):
        assert _optimizer_of(result, suffix) == {"Muon"}


@pytest.mark.parametrize("tp", [1, 2])
def test_gated_delta_net_hybrid(pool: RankPool, tp: int) -> None:
    result = pool.run(routes, tp, Layout(tp=tp), GDN, {})[0]
    assert _optimizer_of(result, "self_attention.in_proj.weight") == {"AdamW"}
    assert _optimizer_of(result, "self_attention.out_proj.weight") == {"Muon"}
    assert _optimizer_of(result, "linear_qkv.weight") == {"Muon"}
    for suffix in ("conv1d.weight", "A_log", "dt_bias"):
        assert _optimizer_of(result, suffix) == {"AdamW"}


def printed(layout: Layout, build: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        harness.start(layout, **build)
    return text.getvalue()


def test_the_table_counts_every_stage_expert_and_shard_once(pool: RankPool) -> None:
    """Of four ranks the first prints what one rank that has the whole model prints, but for how weights are divided."""
    build = {**MOE, "num_layers": 2}
    divided = pool.run(printed, 4, Layout(tp=2, pp=2, ep=2, etp=1, sp=True), build)
    whole = pool.run(printed, 1, Layout(), build)[0]
    assert divided[1:] == [""] * 3

    def rows(text: str) -> list[list[str]]:
        """Weight, count and parameters of each, and the totals."""
        lines = text.splitlines()[1:]
        end = next(number for number, line in enumerate(lines) if line.startswith("adam: "))
        return sorted(line.split() if ": " in line else line.split()[:3] for line in lines[: end + 1])

    assert rows(divided[0]) == rows(whole)
    assert ["output_layer.weight", "1", "2,048"] in rows(whole)


def tags_of_a_bare_model() -> list[tuple[bool, bool]]:
    import megatron_muon

    megatron_muon.install()
    layout = Layout()
    layout.initialize()
    model = harness.build_model(layout, **GDN)[0]
    modules = [layer.self_attention for layer in model.decoder.layers if hasattr(layer.self_attention, "in_proj")]
    return [
        (
            getattr(module.in_proj.weight, "skip_orthogonalization", False),
            getattr(module.out_proj.weight, "skip_orthogonalization", False),
        )
        for module in modules
    ]


def test_in_proj_carries_the_tag_from_construction_on(pool: RankPool) -> None:
    tags = pool.run(tags_of_a_bare_model, 1)[0]
    assert tags and all(tag == (True, False) for tag in tags)


def gated_sections() -> list[list[tuple[str, int]]]:
    run = harness.start(Layout(), **GDN)
    layouts = [
        param.matrix_layout for name, param in run.chunks[0].named_parameters() if name.endswith("linear_qkv.weight")
    ]
    return [[(section.name, section.rows) for section in layout.sections] for layout in layouts]


def test_output_gate_is_a_block_of_its_own(pool: RankPool) -> None:
    """Four heads of 8 in two groups: 16 query rows and 16 gate rows a group."""
    for sections in pool.run(gated_sections, 1)[0]:
        assert sections == [("q", 16), ("gate", 16), ("k", 8), ("v", 8)]


def test_lion_takes_the_rest_when_asked(pool: RankPool) -> None:
    result = pool.run(routes, 1, Layout(), {}, {"muon_scalar_optimizer": "lion"})[0]
    assert _optimizer_of(result, "word_embeddings.weight") == {"Lion"}


def error_of_wrong_shape() -> str:
    import megatron_muon

    megatron_muon.install()
    layout = Layout()
    layout.initialize()
    chunks = harness.build_model(layout)
    linear = chunks[0].decoder.layers[0].self_attention.linear_qkv
    linear.weight = torch.nn.Parameter(torch.zeros(60, 32))
    try:
        harness.wrap(chunks, Layout(layer_wise=True))
    except megatron_muon.ConfigError as error:
        return str(error)
    return ""


def test_fused_weight_of_unexpected_shape_is_an_error(pool: RankPool) -> None:
    message = pool.run(error_of_wrong_shape, 1)[0]
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert message.startswith(f"{name} has 60 rows, but its config (num_attention_heads 4, num_query_groups 2, ")
    assert "implies 64; its shape is 60 x 32, --muon-qkv split" in message and "there is: whole, adam" in message
    assert message.endswith(f"Decide with --muon-param-rule '{name}=whole' or '{name}=adam'.")

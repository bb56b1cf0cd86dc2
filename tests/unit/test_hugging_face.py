"""Models of Hugging Face's transformers, built from small configs: which rows of which weight are one matrix.

The expected matrices are cut by hand, from what the classes' forward passes do with the outputs of their layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, Muon, MuonConfig, ParamGroups, param_groups
from megatron_muon.routing import global_names
from megatron_muon.routing.layout import layout_of
from megatron_muon.routing.predicate import exclusion_reason

transformers = pytest.importorskip("transformers", reason="needs Hugging Face's transformers")

Tensors = Sequence[torch.Tensor]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def build(kind: str, **sizes: Any) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).double()


def groups_of(model: torch.nn.Module, **options: Any) -> ParamGroups:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that looks fused is unknown
        return param_groups(model, **options)


def halves(weight: torch.Tensor) -> Tensors:
    half = weight.size(-2) // 2
    return [part for each in weight.reshape(-1, *weight.shape[-2:]) for part in (each[:half], each[half:])]


def each(weight: torch.Tensor) -> Tensors:
    return list(weight)


def cut(*rows: int) -> Callable[[torch.Tensor], Tensors]:
    return lambda weight: weight.split(rows, 0)


def by_period(*rows: int) -> Callable[[torch.Tensor], Tensors]:
    """Rows that repeat: the first section of all periods is the first matrix, and so on."""

    def parts(weight: torch.Tensor) -> Tensors:
        periods = [period.split(rows, 0) for period in weight.split(sum(rows), 0)]
        return [torch.cat(sections) for sections in zip(*periods, strict=True)]

    return parts


def of_each_head(*rows: int) -> Callable[[torch.Tensor], Tensors]:
    return lambda weight: [part for head in weight.split(sum(rows), 0) for part in head.split(rows, 0)]


def turned(parts: Callable[[torch.Tensor], Tensors]) -> Callable[[torch.Tensor], Tensors]:
    return lambda weight: parts(weight.transpose(-1, -2))


def in_turns(weight: torch.Tensor) -> Tensors:
    """gpt-oss: columns 0, 2, ... are gate, columns 1, 3, ... are up."""
    return [part.T for each in weight for part in (each[:, 0::2], each[:, 1::2])]


def rows_in_turns(weight: torch.Tensor) -> Tensors:
    """Zamba: rows 0, 2, ... are x, rows 1, 3, ... are z."""
    return [weight[0::2], weight[1::2]]


def same(weight: torch.Tensor) -> Tensors:
    return [weight]


CASES: list[tuple[str, dict[str, Any], dict[str, Callable[[torch.Tensor], Tensors]]]] = [
    (
        "qwen3_moe",
        {**SIZES, **EXPERTS, "head_dim": 8},
        {"layers.0.mlp.experts.gate_up_proj": halves, "layers.0.mlp.experts.down_proj": each},
    ),
    (
        "mixtral",
        {**SIZES, "num_local_experts": 4},
        {"layers.1.mlp.experts.gate_up_proj": halves, "layers.0.mlp.experts.down_proj": each},
    ),
    (
        "llama4_text",
        {**SIZES, "num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8},
        {
            "layers.0.feed_forward.experts.gate_up_proj": turned(halves),
            "layers.0.feed_forward.experts.down_proj": turned(each),
        },
    ),
    (
        "gpt_oss",
        {**SIZES, "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2},
        {"layers.0.mlp.experts.gate_up_proj": in_turns, "layers.0.mlp.experts.down_proj": turned(each)},
    ),
    ("granitemoe", {**SIZES, "num_local_experts": 4}, {"layers.0.block_sparse_moe.input_linear.weight": halves}),
    (
        "phi3",
        SIZES,
        {"layers.0.self_attn.qkv_proj.weight": cut(32, 16, 16), "layers.0.mlp.gate_up_proj.weight": cut(48, 48)},
    ),
    ("gpt_neox", SIZES, {"layers.0.attention.query_key_value.weight": by_period(8, 8, 8)}),
    (
        "falcon",
        {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
        {"h.0.self_attention.query_key_value.weight": by_period(16, 8, 8)},
    ),
    (
        "qwen3_next",
        {**SIZES, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 24},
        {"layers.0.linear_attn.in_proj_qkvz.weight": by_period(8, 8, 16, 16)},
    ),
    (
        "deepseek_v3",
        {**SIZES, **LATENT, "q_lora_rank": 16},
        {
            "layers.0.self_attn.kv_a_proj_with_mqa.weight": cut(12, 4),
            "layers.0.self_attn.q_b_proj.weight": of_each_head(6, 4),
            "layers.0.self_attn.kv_b_proj.weight": of_each_head(6, 8),
            "layers.1.mlp.experts.gate_up_proj": halves,
        },
    ),
    ("deepseek_v2", {**SIZES, **LATENT, "q_lora_rank": None}, {"layers.0.self_attn.q_proj.weight": of_each_head(6, 4)}),
    (
        "gpt2",
        GPT2,
        {"h.0.attn.c_attn.weight": turned(cut(32, 32, 32)), "h.0.mlp.c_fc.weight": turned(same)},
    ),
    (
        "zamba",
        {
            **SIZES,
            "num_hidden_layers": 6,
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "mamba_dt_rank": 2,
            "n_mamba_heads": 2,
            "mamba_d_state": 8,
        },
        {
            "layers.0.mamba.in_proj.weight": rows_in_turns,
            "layers.0.mamba.x_proj_weight": lambda weight: [part for head in weight for part in head.split((2, 8, 8))],
            "layers.0.mamba.dt_proj_weight": each,
        },
    ),
]


def updated(weights: list[torch.nn.Parameter], grads: Tensors) -> list[torch.Tensor]:
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad.contiguous()
    Muon(weights, lr=0.1, fp32_matmul_prec="highest", scale_mode="shape_scaling", weight_decay=0.0).step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize(("kind", "sizes", "expected"), CASES, ids=[case[0] for case in CASES])
def test_matrices_are_those_of_the_forward_pass(
    kind: str, sizes: dict[str, Any], expected: dict[str, Callable[[torch.Tensor], Tensors]]
) -> None:
    model = build(kind, **sizes)
    groups_of(model)
    named = {name.partition(".")[2]: param for name, param in model.named_parameters()}
    for name, parts in expected.items():
        param = named[name]
        grad = torch.randn(param.shape, dtype=param.dtype, generator=torch.Generator().manual_seed(1))
        alone = [torch.nn.Parameter(part.detach().clone().contiguous()) for part in parts(param)]
        (found,) = updated([param], [grad])
        for own, other in zip(parts(found), updated(alone, parts(grad)), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-9, msg=name)


def test_layers_whose_names_do_not_tell() -> None:
    """Each was one matrix, and nothing was said."""
    models = transformers.models
    attention = models.bark.modeling_bark.BarkSelfAttention(
        transformers.BarkSemanticConfig(hidden_size=32, num_heads=4, block_size=8)
    )
    gated = models.moonshine.modeling_moonshine.MoonshineDecoderMLP(
        transformers.MoonshineConfig(hidden_size=32, intermediate_size=48), "silu"
    )
    vision = models.dinov2.modeling_dinov2.Dinov2SwiGLUFFN(transformers.Dinov2Config(hidden_size=32))
    config = transformers.DbrxConfig(d_model=32, n_heads=4, attn_config={"kv_n_heads": 2, "rope_theta": 1e4})
    sections = {
        attention.att_proj: [("q", 32), ("k", 32), ("v", 32)],
        gated.fc1: [("gate", 48), ("up", 48)],
        vision.weights_in: [(name, vision.weights_in.weight.size(0) // 2) for name in ("gate", "up")],
        (dbrx := models.dbrx.modeling_dbrx.DbrxAttention(config)).Wqkv: [("q", 32), ("k", 16), ("v", 16)],
    }
    model = torch.nn.ModuleList([attention, gated, vision, dbrx])
    groups_of(model)
    for layer, expected in sections.items():
        assert [(section.name, section.rows) for section in layout_of(layer.weight).sections] == expected


def test_gemma_3_multiplies_by_its_projection_from_the_right() -> None:
    projector = transformers.models.gemma3.modeling_gemma3.Gemma3MultiModalProjector(
        transformers.Gemma3Config(
            text_config={"hidden_size": 32},
            vision_config={"hidden_size": 24, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        )
    )
    groups_of(projector)
    assert layout_of(projector.mm_input_projection_weight).transposed


def test_most_of_a_mixture_of_experts_is_muons() -> None:
    """7,168 parameters of 60,608 were Muon's, and nothing was said."""
    model = build("qwen3_moe", **SIZES, **EXPERTS, head_dim=8)
    groups = groups_of(model)
    rest = sum(
        param.numel()
        for name, param in model.named_parameters()
        if "norm" in name or name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    total = sum(param.numel() for param in model.parameters())
    assert sum(param.numel() for group in groups.muon for param in group["params"]) == total - rest
    share = f"muon updates {total - rest:,} of {total:,} parameters ({(total - rest) / total:.1%}), adam the others"
    assert groups.table.splitlines()[0] == share


def test_rows_of_mamba_that_are_no_projection_are_adams() -> None:
    """With gradients 100 times smaller, dt rows had an update of 0.0116 (root mean square) within one matrix."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "head_dim": 8}
    model = build("mamba2", **sizes, num_heads=8, n_groups=2, expand=2)
    groups_of(model)
    weight = model.get_parameter("backbone.layers.0.mixer.in_proj.weight")
    grad = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(1))
    grad[-8:] *= 0.01
    before = weight.detach().clone()
    alone = [torch.nn.Parameter(part.clone()) for part in before[:-8].split((64, 64, 16, 16))]
    (found,) = updated([weight], [grad])
    expected = updated(alone, grad[:-8].split((64, 64, 16, 16)))
    torch.testing.assert_close(found[:-8], torch.cat(expected), rtol=0, atol=1e-9)
    adam = grad[-8:] / (grad[-8:].abs() + 1e-8)  # of the first step
    torch.testing.assert_close(found[-8:], before[-8:] - 0.1 * adam, rtol=0, atol=1e-9)


def test_gates_biases_and_tables_are_adams() -> None:
    model = build("qwen3_next", **{**SIZES, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 24})
    groups_of(model)
    gates = model.get_parameter("model.layers.0.linear_attn.in_proj_ba.weight")
    assert exclusion_reason(gates) == "write strengths and decays of heads"
    model = build("gpt_oss", **SIZES, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2)
    groups = groups_of(model)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    undecayed = {name for group in groups.scalar if not group["weight_decay"] for name in group["param_names"]}
    assert biases <= undecayed
    model = build("qwen3_moe", **SIZES, **EXPERTS, head_dim=8)
    groups_of(model, options=MuonConfig(router="adam", glu="whole"))
    assert exclusion_reason(model.get_parameter("model.layers.0.mlp.gate.weight")) == "--muon-router adam"
    assert layout_of(model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")).sections == ()


def test_classes_that_wrappers_derive_are_known() -> None:
    """FSDP2 gives modules a class of its own, in its own package."""
    model = build("phi3", **SIZES)
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.__class__ = type("FSDPPhi3Attention", (type(attention),), {"__module__": "torch.distributed.fsdp"})
    groups_of(model)
    assert layout_of(attention.qkv_proj.weight).kind == "qkv"


def test_a_class_that_no_longer_fits_stops() -> None:
    model = build("phi3", **SIZES)
    model.get_submodule("model.layers.0.self_attn").head_dim = 4
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.qkv_proj\.weight has 64 rows, but its Phi3Attention"):
        param_groups(model)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_lora_on_stacked_experts(kind: str) -> None:
    """peft's ``target_parameters``: an A and a B for every expert; B as the rows of its experts are."""
    peft = pytest.importorskip("peft", reason="needs Hugging Face's peft")
    sizes = {"qwen3_moe": EXPERTS, "gpt_oss": {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}}[kind]
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    model = peft.get_peft_model(build(kind, **{**SIZES, **sizes, "head_dim": 8}), config).double()
    groups_of(model)
    named = [name for name, param in global_names(model) if param.requires_grad]
    assert len(set(named)) == len(named) and "model.layers.0.mlp.experts.lora_A.default.weight" in named
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert len(trained) == 8
    for name, param in trained.items():
        grad = torch.randn(param.shape, dtype=param.dtype, generator=torch.Generator().manual_seed(1))

        def parts(weight: torch.Tensor, name: str = name) -> Tensors:
            if "lora_A" in name:
                return weight.split(2, 0)
            matrices = [weight[:, expert::4] for expert in range(4)]
            if weight.size(0) == 32:  # down_proj's
                return matrices
            if kind == "gpt_oss":
                return [part for each in matrices for part in (each[0::2], each[1::2])]
            return [part for each in matrices for part in each.chunk(2, 0)]

        alone = [torch.nn.Parameter(part.detach().clone().contiguous()) for part in parts(param)]
        (found,) = updated([param], [grad])
        for own, other in zip(parts(found), updated(alone, parts(grad)), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-9, msg=name)

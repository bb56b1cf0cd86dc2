"""Adapters and wrappers around the layers that rules know."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError
from megatron_muon.routing import _is_nonlinear_or_embedding, annotate, global_names
from megatron_muon.routing.rules.linear import LORA_FACTOR
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.unit.small_modules import (
    Adapter,
    ParallelLora,
    Wrapper,
    base,
    frozen,
    gated_delta_net,
    megatron_class,
    options,
    peft_layer,
    sections,
    self_attention,
)


class TestAdapters:
    def test_factors_of_nemo_and_megatron_bridge(self) -> None:
        wrapper = Wrapper(to_wrap=frozen(base()), adapter=Adapter())
        annotate(self_attention(wrapper))
        a, b = wrapper.adapter.linear_in.weight, wrapper.adapter.linear_out.weight
        assert (getattr(a, LORA_FACTOR), getattr(b, LORA_FACTOR)) == ("A", "B")
        assert sections(a) == [] and sections(b) == ["q", "k", "v"], "B has the rows of linear_qkv"
        assert not _is_nonlinear_or_embedding(a) and not _is_nonlinear_or_embedding(b)

    def test_factors_of_peft(self) -> None:
        wrapper = peft_layer(frozen(base()))
        annotate(self_attention(wrapper))
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        assert (getattr(a, LORA_FACTOR), getattr(b, LORA_FACTOR)) == ("A", "B")
        assert sections(a) == [] and sections(b) == ["q", "k", "v"]

    def test_the_option_of_the_base_is_that_of_its_adapter(self) -> None:
        wrapper = Wrapper(to_wrap=frozen(base()), adapter=Adapter())
        annotate(self_attention(wrapper), options(qkv="per_head"))
        blocks = wrapper.adapter.linear_out.weight.matrix_layout.blocks((64, 4))
        assert [(block.name, block.count, block.rows) for block in blocks] == [("q", 4, 8), ("k", 2, 8), ("v", 2, 8)]

    def test_adapter_of_a_plain_layer_is_whole(self) -> None:
        wrapper = Wrapper(to_wrap=frozen(torch.nn.Linear(32, 10)), adapter=Adapter(rows=10))
        annotate(wrapper)
        assert getattr(wrapper.adapter.linear_out.weight, LORA_FACTOR) == "B"
        assert sections(wrapper.adapter.linear_out.weight) == []

    @pytest.mark.parametrize(
        "wrapper",
        [
            Wrapper(to_wrap=base(), adapter=Adapter()),
            Wrapper(to_wrap=Wrapper(base_layer=base())),
            Wrapper(inner=base()),
            Wrapper(inner=base(), adapter=Adapter()),
            Wrapper(outer=Wrapper(inner=base()), norm=torch.nn.LayerNorm(32)),
            Wrapper(inner=base(), linear_in=torch.nn.Linear(32, 4), linear_out=torch.nn.Linear(4, 64)),
        ],
    )
    def test_the_weight_in_a_wrapper_is_found(self, wrapper: Wrapper) -> None:
        annotate(self_attention(wrapper))
        weight = next(param for name, param in wrapper.named_parameters() if tuple(param.shape) == (64, 32))
        assert sections(weight) == ["q", "k", "v"]

    def test_a_weight_of_other_rows_in_a_wrapper_is_refused(self) -> None:
        """One weight, but not that of the config: it may not be taken for one matrix."""
        with pytest.raises(ConfigError, match=r"linear_qkv\.inner\.weight has 48 rows, but .* implies 64"):
            annotate(self_attention(Wrapper(inner=torch.nn.Linear(32, 48))))

    def test_weights_that_cannot_be_told_apart_are_unknown(self) -> None:
        """Say, a projection in two factors: known linear layers, but nobody knows which rows they have."""
        wrapper = Wrapper(down=torch.nn.Linear(32, 8, bias=False), up=torch.nn.Linear(8, 64, bias=False))
        attention = self_attention(wrapper)
        with pytest.raises(ConfigError) as error:
            annotate(attention)
        assert "linear_qkv.down.weight (8 x 32), linear_qkv.up.weight (64 x 8)" in str(error.value)
        annotate(attention, options("linear_qkv.down.weight=muon", "linear_qkv.up.weight=adam"))
        assert not _is_nonlinear_or_embedding(wrapper.down.weight) and _is_nonlinear_or_embedding(wrapper.up.weight)
        annotate(attention, options(unknown_2d="adam"))
        assert _is_nonlinear_or_embedding(wrapper.down.weight)

    def test_bare_factors_in_a_wrapper_are_unknown(self) -> None:
        wrapper = Wrapper(inner=base())
        wrapper.delta = torch.nn.Parameter(torch.zeros(64, 32))
        with pytest.raises(ConfigError, match=r"linear_qkv\.delta|No rule knows"):
            annotate(self_attention(wrapper))

    @pytest.mark.parametrize("layer", ["linear_fc1", "in_proj", "linear_kv_up_proj"])
    def test_every_fused_layer_is_guarded(self, layer: str) -> None:
        two = Wrapper(down=torch.nn.Linear(32, 8, bias=False), up=torch.nn.Linear(8, 64, bias=False))
        module: Any
        if layer == "linear_fc1":
            module = megatron_class("MLP", "transformer.mlp")()
            module.config = types.SimpleNamespace(gated_linear_unit=True)
        elif layer == "in_proj":
            module = gated_delta_net()
        else:
            module = megatron_class("MLASelfAttention", "transformer.multi_latent_attention")()
            module.config = types.SimpleNamespace(
                qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8, num_attention_heads=4
            )
            module.world_size = 1
        setattr(module, layer, two)
        with pytest.raises(ConfigError, match=rf"{layer}\.down\.weight \(8 x 32\), {layer}\.up\.weight \(64 x 8\)"):
            annotate(module)


def train_lora(layout: Layout) -> tuple[list[tuple[str, str, list[str], int]], list[float]]:
    """A GPT with LoRA on every ``linear_qkv``: (name, factor, sections, rows) of its factors, and losses."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    layout.initialize()
    chunks = harness.build_model(layout)
    for layer in chunks[0].decoder.layers:
        layer.self_attention.linear_qkv = ParallelLora(layer.self_attention.linear_qkv)
    wrapped = harness.wrap(chunks, layout)
    run = harness.Run(layout, wrapped, get_megatron_optimizer(harness.optimizer_config(layout), wrapped))
    found = [
        (name, getattr(param, LORA_FACTOR), sections(param), param.size(0))
        for name, param in global_names(wrapped[0])
        if ".adapter." in name
    ]
    return found, run.losses(3)


@pytest.mark.parametrize("tp", [1, 2])
def test_lora_on_self_attention_of_megatron(pool: RankPool, tp: int) -> None:
    """B is split as the rows of its base are, on every rank (64 of them in two query groups)."""
    for factors, losses in pool.run(train_lora, tp, Layout(tp=tp)):
        assert [factor[1] for factor in factors] == ["A", "B"] * 4
        assert factors[2][0] == "decoder.layers.1.self_attention.linear_qkv.adapter.linear_in.weight"
        for _, factor, names, rows in factors:
            assert (names, rows) == ((["q", "k", "v"], 64 // tp) if factor == "B" else ([], 4 // tp))
        assert losses[-1] < losses[0]

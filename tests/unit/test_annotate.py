"""From modules, options and overrides to attributes on the weights: small models, and stand-ins of later modules."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, MuonConfig
from megatron_muon.routing import _is_nonlinear_or_embedding, annotate, global_names
from megatron_muon.routing.annotate import OVERRIDE_ATTRIBUTE
from megatron_muon.routing.layout import SCALAR
from megatron_muon.routing.predicate import exclusion_reason
from megatron_muon.routing.rules.linear import LORA_FACTOR
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool


class Gate(torch.nn.Module):
    """A module that no rule knows, with a bare weight."""

    def __init__(self, rows: int = 6) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(rows, 8))
        self.gain = torch.nn.Parameter(torch.zeros(8))


class Model(torch.nn.Module):
    """An embedding, a linear layer, and a bare weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 8)
        self.linear = torch.nn.Linear(8, 12)
        self.gate = Gate()


class Plain(torch.nn.Module):
    """Only what rules know."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 8)
        self.linear = torch.nn.Linear(8, 12)
        self.attention = torch.nn.MultiheadAttention(8, 2)


def options(*rules: str, **values: Any) -> MuonConfig:
    return MuonConfig(param_rule=rules, **values).validate()


def attributes(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Everything written on the parameters."""
    return {name: dict(vars(param)) for name, param in module.named_parameters()}


def megatron_class(name: str, module: str, base: type = torch.nn.Module) -> Any:
    """A class that looks like one of Megatron-Core, by name and module."""
    return type(name, (base,), {"__module__": f"megatron.core.{module}"})


class TestClosure:
    def test_linear_layers_are_whole(self) -> None:
        model = Plain()
        annotate(model)
        assert model.linear.weight.matrix_layout.kind == "whole"
        assert not _is_nonlinear_or_embedding(model.linear.weight)
        assert _is_nonlinear_or_embedding(model.linear.bias)
        assert exclusion_reason(model.embedding.weight) == "embedding table"
        assert [section.name for section in model.attention.in_proj_weight.matrix_layout.sections] == ["q", "k", "v"]

    def test_unknown_weights_stop_the_run(self) -> None:
        with pytest.raises(ConfigError) as error:
            annotate(torch.nn.Sequential(Model(), Gate(4)))
        message = str(error.value)
        assert "0.gate.table (6, 8), 1.table (4, 8)" in message, "each unknown weight, with its shape"
        assert "--muon-param-rule '0.gate.table=muon' or '0.gate.table=adam'" in message
        assert "--muon-unknown-2d muon or adam" in message

    def test_many_unknown_weights_are_counted(self) -> None:
        with pytest.raises(ConfigError, match=r"7\.table \(6, 8\) and 2 more"):
            annotate(torch.nn.Sequential(*(Gate() for _ in range(10))))

    @pytest.mark.parametrize("module", [torch.nn.LSTM(8, 8), torch.nn.RNNCell(8, 8)])
    def test_modules_of_torch_with_bare_weights_are_unknown(self, module: torch.nn.Module) -> None:
        with pytest.raises(ConfigError, match="weight_ih"):
            annotate(module)

    def test_a_linear_layer_of_unknown_make_is_unknown(self) -> None:
        class Linear(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(4, 8))

        with pytest.raises(ConfigError, match=r"weight \(4, 8\)"):
            annotate(Linear())

    def test_a_subclass_of_a_known_linear_layer_is_known(self) -> None:
        layer = type("Projection", (torch.nn.Linear,), {})(8, 12)
        annotate(layer)
        assert layer.weight.matrix_layout.kind == "whole"

    @pytest.mark.parametrize("choice,scalar", [("adam", True), ("muon", False)])
    def test_unknown_2d(self, choice: str, scalar: bool) -> None:
        model = Model()
        annotate(model, options(unknown_2d=choice))
        assert _is_nonlinear_or_embedding(model.gate.table) is scalar
        assert not _is_nonlinear_or_embedding(model.linear.weight), "only unknown weights"
        if scalar:
            assert exclusion_reason(model.gate.table) == "unknown 2-D weight (--muon-unknown-2d adam)"

    @pytest.mark.parametrize("choice,scalar", [("adam", True), ("muon", False), ("whole", False)])
    def test_param_rule(self, choice: str, scalar: bool) -> None:
        model = Model()
        rule = f"*.table={choice}"
        assert annotate(model, options(rule)) == {rule}
        assert _is_nonlinear_or_embedding(model.gate.table) is scalar
        assert getattr(model.gate.table, OVERRIDE_ATTRIBUTE) == rule
        assert not hasattr(model.linear.weight, OVERRIDE_ATTRIBUTE)

    def test_frozen_vectors_and_tagged_weights_raise_no_question(self) -> None:
        model = torch.nn.Sequential(Gate(), Gate(), Gate(1), Gate())
        model[0].table.requires_grad_(False)
        model[1].table.skip_orthogonalization = True
        model[3].table.is_embedding_or_output_parameter = True
        annotate(model)
        assert vars(model[0].table).keys() <= {"requires_grad"}
        assert exclusion_reason(model[2].table) == "a single row or column"
        assert exclusion_reason(model[3].table) == "embedding or output layer"


class TestParamRule:
    def test_the_last_match_counts_and_every_match_is_told(self) -> None:
        model = Plain()
        rules = ("*weight=adam", "linear.w*=muon", "no.such.*=adam")
        assert annotate(model, options(*rules)) == {"*weight=adam", "linear.w*=muon"}
        assert not _is_nonlinear_or_embedding(model.linear.weight)
        assert _is_nonlinear_or_embedding(model.attention.in_proj_weight)
        assert exclusion_reason(model.attention.in_proj_weight) == "--muon-param-rule *weight=adam"

    def test_order_is_that_of_the_command_line(self) -> None:
        model = Plain()
        annotate(model, options("linear.weight=muon", "linear.*=adam"))
        assert _is_nonlinear_or_embedding(model.linear.weight)

    @pytest.mark.parametrize("choice,matrices", [("muon", 3), ("split", 3), ("whole", 1), ("per_head", 6)])
    def test_ways_of_a_fused_weight(self, choice: str, matrices: int) -> None:
        model = Plain()
        annotate(model, options(f"attention.in_proj_weight={choice}"))
        blocks = model.attention.in_proj_weight.matrix_layout.blocks((24, 8))
        assert sum(block.count for block in blocks) == matrices

    def test_a_rule_outweighs_the_option(self) -> None:
        model = torch.nn.ModuleList([torch.nn.MultiheadAttention(8, 2) for _ in range(2)])
        annotate(model, options("0.*in_proj_weight=per_head", qkv="whole"))
        assert model[0].in_proj_weight.matrix_layout.sections[0].matrix_rows == 4
        assert model[1].in_proj_weight.matrix_layout.kind == "whole"

    @pytest.mark.parametrize("choice", ["per_head", "split"])
    def test_a_way_that_a_weight_does_not_have(self, choice: str) -> None:
        with pytest.raises(ConfigError) as error:
            annotate(Plain(), options(f"linear.weight={choice}"))
        message = str(error.value)
        assert "linear.weight (linear) cannot be split that way; its shape is (12, 8)" in message
        assert f"--muon-param-rule linear.weight={choice} is asked for, and there is: whole, adam" in message

    def test_a_split_that_does_not_fit_the_shape(self) -> None:
        attention = self_attention(rows=60)
        with pytest.raises(ConfigError) as error:
            annotate(torch.nn.ModuleDict({"block": attention}))
        message = str(error.value)
        assert "block.linear_qkv.weight has 60 rows" in message and "implies 64" in message
        assert "'block.linear_qkv.weight=whole' or 'block.linear_qkv.weight=adam'" in message
        annotate(attention, options("linear_qkv.weight=whole"))
        assert attention.linear_qkv.weight.matrix_layout.kind == "whole"
        annotate(attention, options("linear_qkv.weight=adam"))
        assert _is_nonlinear_or_embedding(attention.linear_qkv.weight)

    def test_muon_for_a_vector(self) -> None:
        with pytest.raises(
            ConfigError, match=r"linear\.bias=muon: linear\.bias has shape \(12,\); Muon updates matric"
        ):
            annotate(Plain(), options("linear.bias=muon"))
        annotate(Plain(), options("linear.bias=adam"))

    @pytest.mark.parametrize("choice", ["muon", "whole"])
    def test_muon_for_an_embedding(self, choice: str) -> None:
        """What Megatron tags as embedding or output layer, too."""
        model = Plain()
        model.embedding.weight.is_embedding_or_output_parameter = True
        annotate(model)
        assert _is_nonlinear_or_embedding(model.embedding.weight)
        annotate(model, options(f"embedding.weight={choice}"))
        assert not _is_nonlinear_or_embedding(model.embedding.weight)
        assert model.embedding.weight.matrix_layout.kind == "whole"
        annotate(model)
        assert _is_nonlinear_or_embedding(model.embedding.weight)

    def test_muon_for_a_single_row(self) -> None:
        gate = Gate(1)
        annotate(gate, options("table=muon"))
        assert not _is_nonlinear_or_embedding(gate.table)


class Table(torch.nn.Module):
    """Megatron-Core's ``LanguageModelEmbedding``."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(10, 8)


class LastStage(torch.nn.Module):
    """Of a GPT: its output layer, and with multi-token prediction another copy of the embedding."""

    def __init__(self, shared: bool, predicts: bool = False) -> None:
        super().__init__()
        self.share_embeddings_and_output_weights = shared
        if predicts:
            self.embedding = Table()
        self.output_layer = torch.nn.Linear(8, 10, bias=False)


class TestSharedWeights:
    """Copies of one weight are decided about by one name."""

    RULES = ("*word_embeddings*=row_norm", "*output_layer*=sign")

    @pytest.mark.parametrize("predicts", [False, True])
    def test_tied(self, predicts: bool) -> None:
        """In a larger model, too, such as one with a vision tower."""
        model = torch.nn.ModuleDict({"language_model": LastStage(shared=True, predicts=predicts)})
        assert annotate(model, options(*self.RULES)) == {self.RULES[0]}
        found = [param.matrix_layout for param in model.parameters()]
        assert [(layout.direction, layout.kind) for layout in found] == [("row_norm", "output")] * (1 + predicts)
        assert annotate(model, options("language_model.embedding.*=adam")) == {"language_model.embedding.*=adam"}

    def test_untied(self) -> None:
        model = LastStage(shared=False, predicts=True)
        assert annotate(model, options(*self.RULES)) == set(self.RULES)
        assert model.output_layer.weight.matrix_layout.direction == "sign"
        assert model.embedding.word_embeddings.weight.matrix_layout.direction == "row_norm"


class TestTagsSetByHand:
    @pytest.mark.parametrize("tag", [{"skip_orthogonalization": True}, {"use_muon": False}])
    def test_stay(self, tag: dict[str, bool]) -> None:
        model = Model()
        for weight in (model.linear.weight, model.gate.table):
            vars(weight).update(tag)
        annotate(model)
        annotate(model)
        for weight in (model.linear.weight, model.gate.table):
            assert _is_nonlinear_or_embedding(weight)
            assert exclusion_reason(weight) in ("tagged skip_orthogonalization", "tagged use_muon = False")

    @pytest.mark.parametrize("tag", [{"skip_orthogonalization": True}, {"use_muon": False}])
    @pytest.mark.parametrize("choice", ["muon", "adam"])
    def test_come_back_when_the_rule_goes(self, tag: dict[str, bool], choice: str) -> None:
        model = Plain()
        vars(model.linear.weight).update(tag)
        annotate(model)
        before = attributes(model)
        annotate(model, options(f"linear.weight={choice}"))
        assert _is_nonlinear_or_embedding(model.linear.weight) is (choice == "adam")
        annotate(model, options(f"linear.weight={choice}"))
        annotate(model)
        assert attributes(model) == before

    def test_outweigh_an_option(self) -> None:
        layer = gated_delta_net()
        layer.in_proj.weight.skip_orthogonalization = True
        annotate(layer, options(gdn_in_proj="split"))
        assert _is_nonlinear_or_embedding(layer.in_proj.weight)


def test_no_trace_of_earlier_options() -> None:
    """Weights are annotated when DDP is built, by the options of then, and again in the optimizer factory."""
    model = torch.nn.ModuleDict(
        {"plain": Plain(), "gdn": gated_delta_net(), "attention": self_attention(), "gate": Gate()}
    )
    others = [
        options("*=adam"),
        options("*.weight=muon", "gate.table=adam", qkv="per_head", gdn_in_proj="split"),
        options("plain.linear.weight=adam", unknown_2d="muon", qkv="whole", gdn_in_proj="per_head"),
    ]
    annotate(model, options(unknown_2d="adam"))
    first = attributes(model)
    for other in others:
        annotate(model, other)
        assert attributes(model) != first
        annotate(model, options(unknown_2d="adam"))
        assert attributes(model) == first


class Layer(torch.nn.Module):
    """A transformer layer of a pipeline stage: it counts itself over the whole model, from 1."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.linear = torch.nn.Linear(4, 4, bias=False)


def test_names_count_layers_over_the_whole_model() -> None:
    decoder = torch.nn.Module()
    decoder.layers = torch.nn.ModuleList([Layer(5), Layer(6)])
    chunk = torch.nn.Module()
    chunk.decoder = decoder
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module.module = chunk
    for module in (wrapped, chunk):
        names = [name for name, _ in global_names(module)]
        assert names == ["decoder.layers.4.linear.weight", "decoder.layers.5.linear.weight"]
    annotate(wrapped, options("decoder.layers.5.*=adam"))
    assert [_is_nonlinear_or_embedding(layer.linear.weight) for layer in decoder.layers] == [False, True]


# --- adapters and wrappers ---


def self_attention(layer: torch.nn.Module | None = None, rows: int = 64) -> Any:
    """A module that Megatron's rule for self-attention reads: two groups of 2 x 8 q rows, 8 k rows and 8 v rows."""
    attention = megatron_class("SelfAttention", "transformer.attention")()
    attention.config = types.SimpleNamespace(num_attention_heads=4, num_query_groups=2, kv_channels=8)
    attention.world_size = 1
    attention.linear_qkv = layer or torch.nn.Linear(32, rows, bias=False)
    attention.linear_proj = torch.nn.Linear(32, 32, bias=False)
    return attention


class Adapter(torch.nn.Module):
    """LoRA as NeMo and Megatron-Bridge name its parts."""

    def __init__(self, rows: int = 64, rank: int = 4) -> None:
        super().__init__()
        self.linear_in = torch.nn.Linear(32, rank, bias=False)
        self.linear_out = torch.nn.Linear(rank, rows, bias=False)


class Wrapper(torch.nn.Module):
    """Holds modules under the given names."""

    def __init__(self, **modules: torch.nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def frozen(layer: torch.nn.Module) -> torch.nn.Module:
    return layer.requires_grad_(False)


def base() -> torch.nn.Linear:
    return torch.nn.Linear(32, 64, bias=False)


def peft_layer(inner: torch.nn.Module) -> Wrapper:
    """LoRA as Hugging Face's peft names its parts."""
    return Wrapper(
        base_layer=inner,
        lora_A=torch.nn.ModuleDict({"default": torch.nn.Linear(32, 4, bias=False)}),
        lora_B=torch.nn.ModuleDict({"default": torch.nn.Linear(4, 64, bias=False)}),
    )


def sections(weight: Any) -> list[str]:
    return [section.name for section in weight.matrix_layout.sections]


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
        assert "linear_qkv.down.weight (8, 32), linear_qkv.up.weight (64, 8)" in str(error.value)
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
        with pytest.raises(ConfigError, match=rf"{layer}\.down\.weight \(8, 32\), {layer}\.up\.weight \(64, 8\)"):
            annotate(module)


class ParallelLora(torch.nn.Module):
    """LoRA on a column-parallel layer of Megatron-Core: A gathers its output, B is divided as the base is."""

    def __init__(self, to_wrap: Any, rank: int = 4) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear

        def column_parallel(inputs: int, outputs: int, gather: bool) -> Any:
            return ColumnParallelLinear(
                inputs,
                outputs,
                config=to_wrap.config,
                init_method=to_wrap.config.init_method,
                bias=False,
                gather_output=gather,
            )

        self.to_wrap = to_wrap.requires_grad_(False)
        self.adapter = Wrapper(
            linear_in=column_parallel(to_wrap.input_size, rank, True),
            linear_out=column_parallel(rank, to_wrap.output_size, False),
        )

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = self.to_wrap(hidden)
        low_rank, _ = self.adapter.linear_in(hidden)
        return output + self.adapter.linear_out(low_rank)[0], bias


def train_lora(layout: Layout) -> tuple[list[tuple[str, str, list[str], int]], list[float]]:
    """A GPT with LoRA on every ``linear_qkv``: (name, factor, sections, rows) of its factors, and losses."""
    from megatron.core.optimizer import get_megatron_optimizer

    import megatron_muon

    megatron_muon.install()
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


# --- modules of later versions of Megatron-Core, by their attributes ---


def gated_delta_net(
    names: tuple[str, ...] = ("query", "key", "value", "z", "beta", "alpha"),
    rows: tuple[int, ...] = (16, 16, 32, 32, 4, 4),
    name: str = "GatedDeltaNet",
    upstream_tag: bool = False,
) -> Any:
    """A GatedDeltaNet layer of two key heads of 8 and four value heads of 8."""
    shared = megatron_class("_GDNBase", "ssm.gated_delta_net.common")
    module = megatron_class(name, "ssm.gated_delta_net.later", shared)()
    module.in_proj_split_names, module.in_proj_split_sections = list(names), rows
    module.key_head_dim = module.value_head_dim = 8
    module.in_proj = torch.nn.Linear(12, sum(rows), bias=False)
    module.out_proj = torch.nn.Linear(32, 12, bias=False)
    if upstream_tag:
        module.in_proj.weight.use_muon = False
    return module


def by_rule(weight: Any) -> tuple[list[str], list[str]]:
    """Names of the sections that are matrices, and of those of the scalar optimizer."""
    scalar = [section.name for section in weight.matrix_layout.sections if section.rule == SCALAR]
    return [section.name for section in weight.matrix_layout.sections if section.name not in scalar], scalar


GDN_2 = (("query", "key", "value", "z", "f", "b", "w"), (16, 16, 32, 32, 16, 16, 32), "GatedDeltaNet2")
KDA = (("query", "key", "value", "g", "gate"), (16, 16, 16, 16, 16), "KimiDeltaAttention")
KDA_LOW_RANK = (("query", "key", "value"), (16, 16, 16), "KimiDeltaAttention")


class TestLaterModules:
    @pytest.mark.parametrize("upstream_tag", [False, True])
    @pytest.mark.parametrize(
        "table,matrices,scalar",
        [
            (GDN_2, ["q", "k", "v", "z"], ["f", "b", "w"]),
            (KDA, ["q", "k", "v", "z"], ["g"]),
            (KDA_LOW_RANK, ["q", "k", "v"], []),
        ],
    )
    def test_gated_delta_nets(
        self, table: tuple[Any, ...], matrices: list[str], scalar: list[str], upstream_tag: bool
    ) -> None:
        module = gated_delta_net(*table, upstream_tag=upstream_tag)
        weight = module.in_proj.weight
        annotate(module)
        assert _is_nonlinear_or_embedding(weight), "the default"
        assert not _is_nonlinear_or_embedding(module.out_proj.weight)
        annotate(module, options(gdn_in_proj="split"))
        assert not _is_nonlinear_or_embedding(weight), "asked for, so it outweighs use_muon = False"
        assert by_rule(weight) == (matrices, scalar)
        annotate(module, options(gdn_in_proj="per_head"))
        heads = {section.name: section.matrix_rows for section in weight.matrix_layout.sections}
        assert heads == {**dict.fromkeys(matrices, 8), **dict.fromkeys(scalar, 0)}

    def test_projections_beside_in_proj_of_kimi_delta_attention(self) -> None:
        module = gated_delta_net(*KDA_LOW_RANK)
        module.beta_proj = torch.nn.Linear(12, 2, bias=False)
        module.f_a_proj = torch.nn.Linear(12, 4, bias=False)
        module.f_b_proj = torch.nn.Linear(4, 16, bias=False)
        annotate(module)
        assert exclusion_reason(module.beta_proj.weight) == "write strengths of heads", "one row a head"
        for layer in (module.f_a_proj, module.f_b_proj):
            assert layer.weight.matrix_layout.kind == "whole" and not _is_nonlinear_or_embedding(layer.weight)

    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_gated_delta_product(self, steps: int) -> None:
        """Upstream gives partition_sizes one entry a Householder step for v, k and b, and says use_muon = False."""
        sizes = [16, *[16] * steps, *[8] * steps, 8, *[2] * steps, 2]
        module = megatron_class("GatedDeltaProductMixer", "ssm.gated_delta_product")()
        module.num_householder = steps
        module.in_proj = torch.nn.Linear(12, sum(sizes), bias=False)
        weight: Any = module.in_proj.weight
        weight.partition_sizes, weight.use_muon = sizes, False
        annotate(module)
        assert exclusion_reason(weight) == "fused gated delta product in_proj"
        annotate(module, options(gdn_in_proj="split"))
        assert not _is_nonlinear_or_embedding(weight)
        each = range(1, steps + 1)
        matrices = ["z", *(f"v{i}" for i in each), *(f"k{i}" for i in each), "q"]
        assert by_rule(weight) == (matrices, [*(f"b{i}" for i in each), "a"])
        assert [section.rows for section in weight.matrix_layout.sections] == sizes
        with pytest.raises(ConfigError, match=r"in_proj\.weight \(gdp_in_proj\) cannot be split that way"):
            annotate(module, options(gdn_in_proj="per_head"))

    @pytest.mark.parametrize("sizes", [None, [16, 16, 8, 8]])
    def test_in_proj_without_the_table_that_its_kind_has(self, sizes: list[int] | None) -> None:
        module = megatron_class("MambaMixer", "ssm.mamba_mixer")()
        module.in_proj = torch.nn.Linear(12, 48, bias=False)
        if sizes:
            module.in_proj.weight.partition_sizes = sizes
        annotate(module)
        assert _is_nonlinear_or_embedding(module.in_proj.weight)
        with pytest.raises(ConfigError, match=rf"in_proj\.weight has {len(sizes or [])} partition_sizes"):
            annotate(module, options(mamba_in_proj="split"))

    def test_hyper_connections(self) -> None:
        n, hidden = 4, 8
        module = megatron_class("HyperConnectionModule", "transformer.hyper_connection")()
        module.n = n
        module.mapping_proj = torch.nn.Linear(n * hidden, n * n + 2 * n, bias=False)
        module.alpha = torch.nn.Parameter(torch.zeros(1))
        annotate(module)
        weight = module.mapping_proj.weight
        assert weight.matrix_layout.kind == "whole" and not _is_nonlinear_or_embedding(weight)
        annotate(module, options("mapping_proj.weight=split"))
        assert [(s.name, s.rows) for s in weight.matrix_layout.sections] == [("pre", 4), ("post", 4), ("res", 16)]

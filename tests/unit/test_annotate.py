"""From options, overrides and tags to attributes on the weights of small models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_muon import ConfigError
from megatron_muon.routing import _is_nonlinear_or_embedding, annotate, global_names
from megatron_muon.routing.annotate import OVERRIDE_ATTRIBUTE, _variant
from megatron_muon.routing.layout import Section
from megatron_muon.routing.predicate import exclusion_reason
from megatron_muon.routing.treatment import fused
from tests.unit.small_modules import (
    Gate,
    Model,
    Plain,
    gated_delta_net,
    options,
    self_attention,
)


def attributes(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Everything written on the parameters."""
    return {name: dict(vars(param)) for name, param in module.named_parameters()}


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
        assert "0.gate.table (6 x 8), 1.table (4 x 8)" in message, "each unknown weight, with its shape"
        assert "--muon-param-rule '0.gate.table=muon' or '0.gate.table=adam'" in message
        assert "--muon-unknown-2d muon or adam" in message

    def test_many_unknown_weights_are_counted(self) -> None:
        with pytest.raises(ConfigError, match=r"7\.table \(6 x 8\) and 2 more"):
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

        with pytest.raises(ConfigError, match=r"weight \(4 x 8\)"):
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
        assert "linear.weight (linear) cannot be split that way; its shape is 12 x 8" in message
        assert f"--muon-param-rule linear.weight={choice} is asked for, and there is: whole, adam" in message

    def test_a_split_that_no_option_has_chosen(self) -> None:
        treatment = fused("mine", torch.empty(6, 2), "split", [Section("a", 4)], rows=8, source="its table")
        with pytest.raises(ConfigError, match=r"its shape is 6 x 8, split \(by the rule of its module\) is asked for"):
            _variant("linear.weight", torch.zeros(6, 8), treatment, "split", None)

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
        with pytest.raises(ConfigError, match=r"linear\.bias=muon: linear\.bias has shape 12; Muon updates matric"):
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

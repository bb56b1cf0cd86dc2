"""Wrappers of torch and of frameworks around parts of a model: the same names, routes and divisions as without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN
from tests.pool import RankPool

RULES = ("*.layers.1.mlp.linear_fc1.weight=whole", "decoder.layers.3.mlp.linear_fc2.weight=adam")
ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "allreduce", "is_embedding_or_output_parameter", "expert_tp")

Routes = dict[str, tuple[Any, ...]]


class Copies(torch.nn.Module):
    """The shape of peft's ``ModulesToSaveWrapper``: the frozen original, and a copy of it that is trained."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.modules_to_save = torch.nn.ModuleDict({"default": shallow_copy(module)})
        self.original_module = module.requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.modules_to_save["default"], name)


class Layer(torch.nn.Module):
    """The shape of adapters around a layer, ``to_wrap`` in Megatron-Bridge and ``base_layer`` in peft."""

    def __init__(self, name: str, layer: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)


def shallow_copy(module: torch.nn.Module) -> Any:
    """As ``copy.deepcopy`` where process groups are shared: they cannot be copied."""
    groups = {
        id(value): value
        for each in module.modules()
        for value in vars(each).values()
        if isinstance(value, torch.distributed.ProcessGroup) or type(value).__name__ == "ProcessGroupCollection"
    }
    return copy.deepcopy(module, groups)


def compiled(model: Any) -> Any:
    layers = model.decoder.layers
    layers[0] = torch.compile(layers[0])
    layers[1].mlp = torch.compile(layers[1].mlp)
    layers[3].self_attention.linear_proj = torch.compile(layers[3].self_attention.linear_proj)
    model.output_layer = torch.compile(model.output_layer)
    return torch.compile(model)


def checkpointed(model: Any) -> Any:
    for number in range(len(model.decoder.layers)):
        model.decoder.layers[number] = checkpoint_wrapper(model.decoder.layers[number])
    return model


def with_copies(model: Any) -> Any:
    model.output_layer = Copies(model.output_layer)
    model.embedding.word_embeddings = Copies(model.embedding.word_embeddings)
    for layer in model.decoder.layers:
        layer.mlp.linear_fc2 = Copies(layer.mlp.linear_fc2)
        if hasattr(layer.self_attention, "linear_qkv"):
            layer.self_attention.linear_qkv = Copies(layer.self_attention.linear_qkv)
    holder = torch.nn.Module()
    holder.base_model = torch.nn.Module()
    holder.base_model.model = model
    return holder


def adapted(model: Any) -> Any:
    for layer in model.decoder.layers:
        layer.mlp.linear_fc1 = Layer("to_wrap", layer.mlp.linear_fc1)
        if hasattr(layer.self_attention, "linear_qkv"):
            layer.self_attention.linear_qkv = Layer("base_layer", layer.self_attention.linear_qkv)
    return model


def routes(model: Any) -> Routes:
    from megatron_muon import MuonConfig
    from megatron_muon.routing import annotate, global_names, layout_of
    from megatron_muon.routing.predicate import exclusion_reason

    matched = annotate(model, MuonConfig(param_rule=RULES, gdn_in_proj="split"))
    assert matched == set(RULES)
    found = {}
    for name, param in global_names(model):
        if param.requires_grad:
            tags = tuple(bool(getattr(param, key, key == "allreduce")) for key in ATTRIBUTES if key != "partition_dim")
            found[name] = (exclusion_reason(param), layout_of(param), getattr(param, "partition_dim", None), *tags)
    return found


WRAPPERS: list[Callable[[Any], Any]] = [compiled, checkpointed, with_copies, adapted, shallow_copy]


def scene(layout: Layout) -> list[Routes]:
    import megatron_muon

    megatron_muon.install()
    layout.initialize()
    found = []
    for wrap in [lambda model: model, *WRAPPERS]:
        (model,) = harness.build_model(layout, **GDN)
        found.append(routes(wrap(model)))
    return found


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=["tp1", "tp2"])
def test_routes_are_those_of_the_bare_model(pool: RankPool, layout: Layout) -> None:
    for bare, *wrapped in pool.run(scene, layout.tp, layout):
        assert bare["output_layer.weight"][0] == "embedding or output layer"
        assert bare["decoder.layers.3.mlp.linear_fc2.weight"][0] == f"--muon-param-rule {RULES[1]}"
        *around, whole_copy = wrapped
        for wrap, found in zip(WRAPPERS[:-1], around, strict=True):
            assert found == bare, wrap.__name__
        # Of a model that was copied as a whole, those of vectors stay lost: no update of Muon's asks for them.
        matrices = {name for name, route in bare.items() if route[0] not in ("1-D", "3-D")}
        assert {name: whole_copy[name] for name in matrices} == {name: bare[name] for name in matrices}

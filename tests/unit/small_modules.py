"""Small modules to annotate: known and unknown ones, and stand-ins of Megatron-Core's layers and of adapters."""

from __future__ import annotations

import types
from typing import Any

import torch

from megatron_muon import MuonConfig


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


def megatron_class(name: str, module: str, base: type = torch.nn.Module) -> Any:
    """A class that looks like one of Megatron-Core, by name and module."""
    return type(name, (base,), {"__module__": f"megatron.core.{module}"})


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

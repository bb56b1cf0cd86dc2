"""Which rows of which weights are whose queries and keys.

The rows come from the layouts of :mod:`megatron_muon.routing`, the same that split weights for Newton-Schulz, so that
the output gate, values, latents and the rotary key keep the factor 1 wherever they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError
from megatron_muon.qk_clip.factors import Heads
from megatron_muon.routing.layout import MatrixLayout
from megatron_muon.routing.rules import rules_of
from megatron_muon.routing.rules.linear import layer_of
from megatron_muon.routing.treatment import PER_HEAD

_QUERY = ("q", "q_nope")
_KEY = ("k", "k_nope")
_ROPE = ("q_rope",)


@dataclass(frozen=True)
class Attention:
    """One attention layer of the model on this rank."""

    name: str  # in the whole model, without wrappers
    module: Any  # of Megatron-Core, with ``core_attention``
    heads: int  # query heads of the whole layer
    groups: int  # key heads of the whole layer
    rank: int  # of this process in the tensor-parallel group
    ranks: int  # size of that group

    @property
    def mine(self) -> slice:
        """The heads whose logits this rank computes."""
        count = self.heads // self.ranks
        return slice(self.rank * count, (self.rank + 1) * count)


@dataclass(frozen=True)
class Rows:
    """The factors of a weight's rows.

    Attributes:
        param: weight, bias or norm gain on this rank.
        index: (rows of ``param``,) int64, the place of each row's factor in the table.
        offset: what the parameter lacks to be the factor of what it scales: 1 for zero-centred norm gains, else 0.
    """

    param: torch.nn.Parameter
    index: torch.Tensor
    offset: float = 0.0


def projection_rows(layer: Attention, first_head: int, heads: Heads) -> Iterator[Rows]:
    """The rows of the query and key projections of a layer, weights and biases, frozen ones too.

    Raises:
        ConfigError: if a weight has not the rows that the layer's config implies, or is part of an adapter.
    """
    claims = [claim for rule in rules_of(layer.module) for claim in rule(layer.module, MuonConfig())]
    treatments = {id(param): treatment for param, treatment in reversed(claims)}
    for name, child in layer.module.named_children():
        linear = layer_of(child)
        weight = getattr(linear, "weight", None)
        treatment = treatments.get(id(weight))
        if weight is None or treatment is None:
            continue
        layout = treatment.variants.get(PER_HEAD)
        if layout is None and treatment.problem:
            raise ConfigError(f"--qk-clip: {layer.name}.{name}.weight {treatment.problem}. Leave --qk-clip off.")
        if layout is None or not {section.name for section in layout.sections} & {*_QUERY, *_KEY, *_ROPE}:
            continue
        _refuse_adapters(f"{layer.name}.{name}", child, weight)
        index = _places(layout, layer, first_head, heads)
        share = index.numel() // layer.ranks
        mine = index[layer.rank * share : (layer.rank + 1) * share].to(heads.group.device)
        for param in (weight, getattr(linear, "bias", None)):
            if isinstance(param, torch.nn.Parameter) and param.numel():
                yield Rows(param, mine)


def _refuse_adapters(name: str, child: torch.nn.Module, weight: torch.Tensor) -> None:
    """A low-rank adapter adds to the projection: rows of the weight alone do not decide about the logit."""
    if any(param.requires_grad and param.dim() == 2 and param is not weight for param in child.parameters()):
        raise ConfigError(f"--qk-clip: {name} has a trainable adapter, which cannot be clipped. Leave --qk-clip off.")


def _places(layout: MatrixLayout, layer: Attention, first_head: int, heads: Heads) -> torch.Tensor:
    """The place of each row of the whole weight: its periods are the key heads, or the heads where none are shared."""
    groups = layer.groups if any(section.name == "k" for section in layout.sections) else layer.heads
    share = layer.heads // groups
    places: list[int] = []
    for group in range(groups):
        head = first_head + group * share
        for section in layout.sections:
            if section.name in _QUERY or section.name in _ROPE:
                place = heads.query if section.name in _QUERY else heads.rope
                each = section.rows // share
                places += [place(head + row // each) for row in range(section.rows)]
            else:
                places += [heads.key(head) if section.name in _KEY else heads.ONE] * section.rows
    return torch.tensor(places, dtype=torch.int64)


def has_norm(module: Any) -> bool:
    """Whether queries or keys are normalised after their projection, so that the projections' size does not matter.

    MLA's norms stand before the projections to heads, and do not count.
    """
    is_latent = any(cls.__name__ == "MultiLatentAttention" for cls in type(module).__mro__)
    if is_latent or hasattr(module, "linear_kv_up_proj"):
        return False
    return any(_is_norm(getattr(module, name, None)) for name in ("q_layernorm", "k_layernorm"))


def norm_rows(layer: Attention, number: int, heads: Heads) -> list[Rows]:
    """The gains (and biases) of the norms on queries and keys; empty for norms without a gain, such as L2."""
    found = []
    for name, place in (("q_layernorm", heads.query_gain(number)), ("k_layernorm", heads.key_gain(number))):
        norm = getattr(layer.module, name, None)
        centred = bool(getattr(layer.module.config, "layernorm_zero_centered_gamma", False))
        for attribute in ("weight", "bias"):
            param = getattr(norm, attribute, None)
            if isinstance(param, torch.nn.Parameter):
                index = torch.full((param.size(0),), place, dtype=torch.int64, device=heads.group.device)
                found.append(Rows(param, index, 1.0 if centred and attribute == "weight" else 0.0))
    return found


def _is_norm(module: Any) -> bool:
    return isinstance(module, torch.nn.Module) and type(module).__name__ != "IdentityOp"

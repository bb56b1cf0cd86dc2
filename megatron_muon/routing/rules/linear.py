"""Layers that are one matrix: linear layers of Megatron-Core, TransformerEngine and torch; and adapters on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_muon.config import MuonConfig, flag
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from megatron_muon.routing.treatment import ADAM, UNKNOWN, WHOLE_MATRIX, Treatment, WeightTreatment

LORA_FACTOR = "lora_factor"
"""Attribute on the two factors of a low-rank adapter: ``"A"`` (rank x inputs) or ``"B"`` (outputs x rank)."""

UNKNOWN_PART = Treatment("part of a fused layer", UNKNOWN)
"""Of a matrix in a fused layer whose weight cannot be told."""

# Whose classes named ...Linear keep a weight of (outputs, inputs).
_KNOWN_PACKAGES = ("torch.", "megatron.core.", "transformer_engine.", "nvidia_kitchen.", "nvfp4_kitchen.")


_WRAPPED = ("to_wrap", "base_layer")
"""Where an adapter's wrapper keeps the layer that it adapts: NeMo and Megatron-Bridge; Hugging Face's peft."""


def layer_of(layer: Any) -> torch.nn.Module | None:
    """The module that holds the weights of ``layer``: itself, or the one in a wrapper.

    Among peft's copies of a module it is the one that is trained. In a wrapper of unknown make it is the only module
    with matrices, those of low-rank adapters aside.

    Returns:
        None if there is no such module, or if several could be it.
    """
    if not isinstance(layer, torch.nn.Module):
        return None
    for name in _WRAPPED:
        if isinstance(getattr(layer, name, None), torch.nn.Module):
            return layer_of(getattr(layer, name))
    copies = dict(layer.named_children()).get("modules_to_save")
    if isinstance(copies, torch.nn.ModuleDict):  # peft's: beside the frozen original, one is trained
        trained = [each for each in copies.values() if any(param.requires_grad for param in each.parameters())]
        return layer_of(trained[0]) if len(trained) == 1 else None
    factors = _factors_in(layer)
    holders = [module for module in layer.modules() if any(param not in factors for param in matrices_of(module))]
    return layer if layer in holders else holders[0] if len(holders) == 1 else None


def matrices_of(layer: torch.nn.Module | None) -> list[torch.nn.Parameter]:
    """The 2-D parameters of ``layer`` itself, and its 3-D stacks."""
    params = [] if layer is None else layer.parameters(recurse=False)
    return [param for param in params if param.dim() in (2, 3)]


def weight_of(layer: Any) -> torch.Tensor | None:
    """The weight of a linear layer, also of one inside a wrapper; None if there is none or it cannot be told."""
    weight = getattr(layer_of(layer), "weight", None)
    return weight if isinstance(weight, torch.nn.Parameter) and weight.dim() >= 2 else None


def fused_layer(layer: Any, treat: Callable[[torch.Tensor], Treatment]) -> Iterator[WeightTreatment]:
    """Treatments the weight of a layer, with what ``treat`` makes of it.

    If the weight cannot be told, the matrices in the layer are claimed as unknown, so that the error names them: the
    linear layers in a wrapper would else be taken for one matrix each.
    """
    weight = weight_of(layer)
    if weight is not None:
        yield weight, treat(weight)
        return
    for param in matrices_in(layer):
        yield param, UNKNOWN_PART


def matrices_in(layer: Any) -> list[torch.nn.Parameter]:
    """The 2-D parameters of ``layer`` and of the modules in it, those of low-rank adapters aside."""
    if not isinstance(layer, torch.nn.Module):
        return []
    factors = _factors_in(layer)
    return [param for param in layer.parameters() if param.dim() == 2 and param not in factors]


def _factors_in(layer: torch.nn.Module) -> set[torch.Tensor]:
    adapters = [module for module in layer.modules() if is_adapter(module)]
    return {weight for adapter in adapters for weight, _ in factors_of(adapter)}


def is_linear(module: torch.nn.Module) -> bool:
    """Whether ``module`` is a linear layer of a library that we know, or derives from one."""
    return any(
        cls.__name__.endswith("Linear") and f"{cls.__module__}.".startswith(_KNOWN_PACKAGES)
        for cls in type(module).__mro__
    )


def is_convolution(module: Any) -> bool:
    """Whether ``module`` is a convolution of torch, whose weights of three dimensions are no stacks of matrices."""
    return any(cls.__module__ == "torch.nn.modules.conv" for cls in type(module).__mro__)


def linear(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """The weight of a linear layer (or the weights of a grouped one) that no fused rule has claimed."""
    for param in module.parameters(recurse=False):
        if param.dim() == 2:
            yield param, Treatment("linear", WHOLE_MATRIX)


def low_rank_adapter(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """LoRA: tags its factors, whatever layers they are.

    A is rank x inputs, so wide and ill-conditioned that orthogonalizing it may not pay: ``--muon-lora-a adam``.
    """
    for weight, factor in factors_of(module):
        choice = ADAM if factor == "A" and options.lora_a == "adam" else WHOLE_MATRIX
        reason = f"LoRA {factor}, rank x inputs ({flag('lora_a')} {options.lora_a})"
        layout, experts = WHOLE, stacked_experts(module)
        if experts > 1:
            rank = weight.size(0 if factor == "A" else 1) // experts
            if rank == 1:
                choice, reason = ADAM, "a single row or column for each expert"
            if factor == "A":
                layout = MatrixLayout("LoRA A", (Section("A", rank, matrix_rows=rank),))
            else:
                layout = MatrixLayout("LoRA B", stacked=True, turns=experts)
        yield weight, Treatment(f"LoRA {factor}", choice, {WHOLE_MATRIX: layout}, reason, tags={LORA_FACTOR: factor})


def stacked_experts(adapter: Any) -> int:
    """Number of experts in whose stack an adapter's factors lie: peft's ``target_parameters``; 1 for any other.

    A is (experts rank) x inputs, one expert after the other; B is outputs x (rank experts), whose columns the experts
    have in turns.
    """
    experts = getattr(adapter, "num_experts", 1)
    return experts if isinstance(getattr(adapter, "parameter_name", None), str) and isinstance(experts, int) else 1


_FACTORS = {"linear_in": "A", "lora_A": "A", "lora_a": "A", "linear_out": "B", "lora_B": "B", "lora_b": "B"}
"""``linear_in`` and ``linear_out`` are the names in NeMo and Megatron-Bridge, the others those of Hugging Face's peft
(there dictionaries of layers) and of torchtune."""


def factors_of(adapter: Any) -> Iterator[tuple[torch.nn.Parameter, str]]:
    """The factors of a low-rank adapter, each with ``"A"`` or ``"B"``."""
    for _, weight, factor in parts_of(adapter):
        yield weight, factor


def parts_of(adapter: Any) -> Iterator[tuple[str, torch.nn.Parameter, str]]:
    """The factors of an adapter: the name of each in a dictionary of adapters (or nothing), the weight, A or B."""
    for name, factor in _FACTORS.items():
        layer = getattr(adapter, name, None)
        layers = layer.items() if isinstance(layer, torch.nn.ModuleDict) else [("", layer)]
        for key, each in layers:
            weight = getattr(each, "weight", None)
            if isinstance(weight, torch.nn.Parameter) and weight.dim() == 2:
                yield key, weight, factor


def adapter_name(factor: str) -> str:
    """The name of the adapter, from that of one of its factors."""
    parts = factor.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part in _FACTORS), len(parts))])


def is_adapter(module: torch.nn.Module) -> bool:
    """Whether ``module`` holds the two factors of a low-rank adapter."""
    pairs = (("linear_in", "linear_out"), ("lora_A", "lora_B"), ("lora_a", "lora_b"))
    return any(hasattr(module, a) and hasattr(module, b) for a, b in pairs)


def _innermost(wrapper: Any) -> Any:
    while isinstance(getattr(wrapper, "base_layer", None), torch.nn.Module):
        wrapper = wrapper.base_layer
    return wrapper


def adapted(wrapper: torch.nn.Module) -> tuple[torch.Tensor | None, list[torch.nn.Parameter]]:
    """What an adapter's wrapper adapts: the weight of the wrapped layer, and the B factors that add to it."""
    if not any(isinstance(getattr(wrapper, name, None), torch.nn.Module) for name in _WRAPPED):
        return None, []
    if isinstance(name := getattr(wrapper, "parameter_name", None), str):  # peft's, of a bare parameter
        base = _innermost(wrapper)
        weight = getattr(base, name, None)
        factors = [weight for weight, factor in factors_of(wrapper) if factor == "B"]
        return (weight if isinstance(weight, torch.Tensor) else None), factors
    holders = [wrapper, getattr(wrapper, "adapter", None)]
    return weight_of(wrapper), [weight for holder in holders for weight, factor in factors_of(holder) if factor == "B"]

"""What wrappers around modules do to the names and attributes of the weights in them."""

from __future__ import annotations

import re
from typing import Any

import torch

_WRAPPERS = {
    "_orig_mod",  # torch.compile
    "_checkpoint_wrapped_module",  # activation checkpointing of torch
    "_fsdp_wrapped_module",
    "base_layer",  # adapters: Hugging Face's peft
    "to_wrap",  # NeMo and Megatron-Bridge
}

_FACTORS = {"lora_A", "lora_B"}

_ATTRIBUTES = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "partition_sizes",
    "allreduce",
    "sequence_parallel",
    "is_embedding_or_output_parameter",
    "is_embedding_parameter",
    "shared",
    "shared_embedding",
    "skip_orthogonalization",
    "use_muon",
)
"""Attributes of Megatron-Core's weights, from their modules and from users, that routes, buffers and rates go by."""

_DIVIDED = {"ColumnParallelLinear": 0, "RowParallelLinear": 1, "VocabParallelEmbedding": 0}
"""Classes of Megatron-Core, and the dimension in which tensor parallelism divides their weight."""


def unwrapped(module: Any) -> Any:
    """A model chunk without DDP and other wrappers, as callers may or may not have it."""
    while hasattr(module, "module"):
        module = module.module
    return module


def strip_wrappers(name: str) -> str:
    """A parameter's name without its wrappers: as it is in the model, and in upstream's checkpoints.

    They are DDP and Float16Module (``module``, at the front), torch.compile, activation checkpointing, FSDP, adapters
    around a layer (of one around another adapter, as peft's of two bare parameters of one module, ``base_layer`` tells
    them apart, and stays); and peft's model (``base_model.model``, at the front) with its copies of whole modules
    (``modules_to_save.NAME``), which stand for what they were copied from.
    """
    kept: list[str] = []
    parts = iter(name.split("."))
    is_factor = not _FACTORS.isdisjoint(name.split("."))
    for part in parts:
        if part == "modules_to_save":
            next(parts, None)
        elif (part not in _WRAPPERS or (is_factor and part == "base_layer")) and (kept or part != "module"):
            kept.append(part)
            if kept == ["base_model", "model"]:
                kept.clear()
    return ".".join(kept)


def pattern(name: str) -> str:
    """``module.decoder.layers.3.mlp.weight`` -> ``decoder.layers.*.mlp.weight``; ``weight12`` -> ``weight*``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|(?<=weight)\d+$", "*", strip_wrappers(name))


def restore_attributes(module: torch.nn.Module) -> None:
    """Give copied weights the attributes of Megatron-Core back that ``copy.deepcopy`` loses.

    A copy of peft's gets those of the weight beside it that it was copied from; a weight of a divided layer without
    any (a model that was copied as a whole) those that follow from the layer.
    """
    for submodule in module.modules():
        children = dict(submodule.named_children())
        original, copies = children.get("original_module"), children.get("modules_to_save")
        if original is not None and isinstance(copies, torch.nn.ModuleDict):
            sources = dict(original.named_parameters())
            for copied in copies.values():
                for name, param in copied.named_parameters():
                    _copy(sources.get(name), param)
        for cls in type(submodule).__mro__:
            if cls.__name__ in _DIVIDED and cls.__module__.startswith("megatron.core."):
                _divide(getattr(submodule, "weight", None), _DIVIDED[cls.__name__])


def _copy(source: torch.Tensor | None, param: torch.Tensor) -> None:
    for name in _ATTRIBUTES:
        if hasattr(source, name) and not hasattr(param, name):
            setattr(param, name, getattr(source, name))


def _divide(weight: Any, dim: int) -> None:
    if isinstance(weight, torch.nn.Parameter) and not hasattr(weight, "tensor_model_parallel"):
        for name, value in (("tensor_model_parallel", True), ("partition_dim", dim), ("partition_stride", 1)):
            setattr(weight, name, value)

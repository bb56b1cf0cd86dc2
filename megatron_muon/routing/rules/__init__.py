"""One rule a module: which weights it fuses, and how. Importing the files below registers their rules.

Rules read the module's own attributes and config, never parameter names. Modules of Megatron-Core are known by the
names of their classes (and of those they derive from): importing the classes would import all optional modules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_muon.routing.rules import (  # noqa: F401
    attention,
    embedding,
    feed_forward,
    hugging_face,
    latent_attention,
    linear,
    state_space,
)
from megatron_muon.routing.treatment import OF_MEGATRON, Rule

__all__ = ["is_expert_container", "rules_of"]


def rules_of(module: torch.nn.Module) -> Iterator[Rule]:
    """The special rules for the weights of ``module``, the most special first; the first claim on a weight counts.

    Linear layers that no special rule claims are left to :func:`megatron_muon.routing.rules.linear.linear`.
    """
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("megatron.core.")]
    of_megatron = [OF_MEGATRON[name] for name in names if name in OF_MEGATRON]
    yield from of_megatron
    if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
        yield embedding.embedding
    if isinstance(module, torch.nn.MultiheadAttention):
        yield attention.multihead_attention
    if hugging_face.class_name(module):
        yield hugging_face.hugging_face
    if linear.is_adapter(module) and not of_megatron:  # a layer with a rule may have a linear_in and a linear_out, too
        yield linear.low_rank_adapter


def is_expert_container(module: torch.nn.Module) -> bool:
    """Whether the weights of ``module`` are experts', which the expert tensor-parallel group divides."""
    return any(cls.__module__.startswith("megatron.core.transformer.moe.experts") for cls in type(module).__mro__)

"""Where TransformerEngine can be imported: its modules can be built on the CPU, and are used only where asked for.

Its modules refuse construction where ``torch.cuda.is_available()`` answers False, though nothing in a constructor needs
a GPU. Which weights a model has, how they are fused and how they are cut over ranks depends on these modules, so they
are let through: routing can be looked at and tested where there is no GPU. Their forward pass runs CUDA kernels and is
out of reach; so Megatron-Core must not put one of them into a model of its own modules.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_muon._patching import Original, Patches
from megatron_muon.cpu.norms import local_norm

PATCHES = Patches()
PATCHES.making(
    "megatron.core.transformer.transformer_block:LayerNormImpl",
    "the norm after the last layer is TransformerEngine's wherever it can be imported, also after local layers",
    copies_in=(),
)(local_norm)


@PATCHES.around(
    "transformer_engine.pytorch.module.base:TransformerEngineBaseModule.__init__",
    "TransformerEngine's modules refuse construction where there is no GPU",
)
def _wrap_init(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    """Answer True to ``torch.cuda.is_available()`` while the base constructor runs."""
    answer = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        original(self, *args, **kwargs)
    finally:
        torch.cuda.is_available = answer

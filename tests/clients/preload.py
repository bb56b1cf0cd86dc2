"""What every rank imports, once, before ``install()``: the frameworks hold copies of Megatron-Core's functions."""

from __future__ import annotations

import gc
import importlib

import tests.preload  # noqa: F401

for name in (
    "megatron.bridge.recipes.gpt.vanilla_gpt",
    "megatron.bridge.training.pretrain",
    "swift.megatron.trainers.base",
    "verl.utils.checkpoint.megatron_checkpoint_manager",
    "verl.utils.megatron.optimizer",
    "verl.utils.megatron_utils",
):
    importlib.import_module(name)

gc.freeze()

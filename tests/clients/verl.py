"""verl's own functions, called as its Megatron engine calls them (``workers/engine/megatron/transformer_impl.py``).

No Ray and no model from a hub: they take plain objects.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.megatron import harness
from tests.megatron.harness import Layout, Run


def optimizer_config(layout: Layout, options: dict[str, Any] | None = None) -> Any:
    """``actor.optim`` of verl; ``options``: further keys, those under ``override_optimizer_config`` included."""
    from verl.workers.config.optimizer import McoreOptimizerConfig

    values: dict[str, Any] = {
        "optimizer": "muon",
        "lr": 0.01,
        "min_lr": 0.001,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "lr_decay_steps": 20,
        "lr_warmup_steps": 0,
        "total_training_steps": 20,
        "lr_decay_style": "cosine",
        "use_layer_wise_distributed_optimizer": layout.layer_wise,
        "muon_fp32_matmul_prec": "highest",
        "use_checkpoint_opt_param_scheduler": True,
    }
    return McoreOptimizerConfig(**{**values, **(options or {})})


def start(
    layout: Layout,
    weights: str,
    *,
    bf16: bool = False,
    distributed: bool = True,
    options: dict[str, Any] | None = None,
    **model: Any,
) -> tuple[Run, Any]:
    """A run whose DDP, optimizer and scheduler verl has made; ``distributed``: its ``use_distributed_optimizer``."""
    from verl.utils.megatron.optimizer import (
        get_megatron_optimizer,
        get_megatron_optimizer_param_scheduler,
        init_megatron_optim_config,
        is_muon_layer_wise_config,
    )
    from verl.utils.megatron_utils import register_megatron_training_hooks, wrap_model_chunks_with_layerwise_aware_ddp

    import megatron_muon

    megatron_muon.install()
    layout.initialize()
    chunks = harness.build_model(layout, bf16=bf16, **model)
    harness.load_weights(chunks, weights)
    optim = optimizer_config(layout, options)
    chunks = wrap_model_chunks_with_layerwise_aware_ddp(
        chunks,
        harness.unwrap(chunks[0]).config,
        use_distributed_optimizer=distributed,
        use_layer_wise_distributed_optimizer=is_muon_layer_wise_config(optim),
    )
    config = init_megatron_optim_config(optim, use_distributed_optimizer=distributed, fp16=False, bf16=bf16)
    optimizer = get_megatron_optimizer(chunks, config)
    register_megatron_training_hooks(chunks, optimizer)
    return Run(layout, chunks, optimizer), get_megatron_optimizer_param_scheduler(optimizer, optim)


def checkpoints(run: Run, scheduler: Any, *, distributed: bool = True, fully_reshardable: bool = False) -> Any:
    """Its checkpoint manager: model, optimizer and the rest each in a folder of its own."""
    from verl.trainer.config import CheckpointConfig
    from verl.utils.checkpoint.megatron_checkpoint_manager import MegatronCheckpointManager

    config = harness.unwrap(run.chunks[0]).config
    megatron = SimpleNamespace(
        dist_ckpt_optim_fully_reshardable=fully_reshardable, distrib_optim_fully_reshardable_mem_efficient=False
    )
    return MegatronCheckpointManager(
        config=SimpleNamespace(model=SimpleNamespace(path=""), megatron=megatron),
        checkpoint_config=CheckpointConfig(async_save=False, load_contents=["model", "optimizer"]),
        model_config=None,
        transformer_config=config,
        role="actor",
        model=run.chunks,
        arch="GPTModel",
        hf_config=None,
        param_dtype=config.params_dtype or torch.float32,
        share_embeddings_and_output_weights=False,
        processing_class=None,
        optimizer=run.optimizer,
        optimizer_scheduler=scheduler,
        use_distributed_optimizer=distributed,
        use_checkpoint_opt_param_scheduler=True,
        use_dist_checkpointing=True,
    )


def train(run: Run, scheduler: Any, steps: int, *, offload: bool = False) -> list[float]:
    """Losses; ``offload``: state and weights go to the host and back after every step, by verl's functions."""
    from verl.utils import megatron_utils

    losses = []
    for _ in range(steps):
        losses += run.losses(1)
        scheduler.step(1)
        if offload:
            megatron_utils.offload_megatron_optimizer(run.optimizer)
            megatron_utils.load_megatron_optimizer(run.optimizer)
    return losses

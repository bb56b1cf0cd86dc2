"""Megatron-Bridge's own functions on CPU ranks: a recipe made small, ``pretrain`` and its checkpoints."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.megatron.harness import Layout

SAMPLES, SEQUENCE = 4, 16


def recipe(layout: Layout, *, steps: int, save: str = "", load: str = "", weights: bool = False) -> Any:
    """Its smallest GPT recipe with the model, the data and the fusions of a CPU; the optimizer is the caller's.

    ``weights``: of the checkpoint ``load`` take these alone.
    """
    from megatron.bridge.recipes.gpt.vanilla_gpt import vanilla_gpt_pretrain_config
    from megatron.bridge.training.config import MockGPTDatasetConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = vanilla_gpt_pretrain_config()
    model = config.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = 2, 32, 48
    model.num_attention_heads, model.num_query_groups = 4, 2
    model.seq_length, model.vocab_size = SEQUENCE, 64
    model.activation_func, model.gated_linear_unit, model.add_bias_linear = torch.nn.functional.silu, True, False
    model.position_embedding_type, model.normalization = "rope", "RMSNorm"
    model.share_embeddings_and_output_weights = False
    model.attention_dropout = model.hidden_dropout = 0.0
    model.tensor_model_parallel_size = layout.tp
    model.transformer_impl = "local"
    model.transformer_layer_spec = lambda provider: get_gpt_layer_local_spec(normalization="RMSNorm")
    model.bias_activation_fusion = model.bias_dropout_fusion = model.masked_softmax_fusion = False
    model.gradient_accumulation_fusion = model.cross_entropy_loss_fusion = False
    model.use_cpu_initialization = True
    config.dist.distributed_backend = "gloo"
    config.mixed_precision = None
    config.tokenizer.vocab_size = 64
    config.dataset = MockGPTDatasetConfig(
        random_seed=1234,
        seq_length=SEQUENCE,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        num_workers=0,
        split="9999,8,2",
        dataloader_type="single",
    )
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = steps, SAMPLES, 1
    config.validation.eval_iters = 0
    config.logger.log_interval, config.logger.tensorboard_dir = 1, None
    config.checkpoint.save, config.checkpoint.load = save or None, load or None
    config.checkpoint.finetune, config.checkpoint.load_optim = weights, not weights
    config.checkpoint.load_rng = False
    config.ddp.overlap_grad_reduce = False
    return config


def muon(config: Any, *, steps: int, **changes: Any) -> None:
    """Its recipes' Muon, with the settings that ``changes`` name."""
    from megatron.bridge.recipes.utils.optimizer_utils import distributed_muon_with_cosine_annealing

    values = {"max_lr": 0.01, "min_lr": 0.001, "muon_tp_mode": "duplicated", "muon_fp32_matmul_prec": "highest"}
    config.optimizer, config.scheduler = distributed_muon_with_cosine_annealing(
        precision="fp32", lr_warmup_iters=0, lr_decay_iters=steps, **{**values, **changes}
    )
    config.ddp.use_distributed_optimizer = False


def adam(config: Any, *, steps: int, **changes: Any) -> None:
    """Its recipes' Adam, with the distributed optimizer; ``changes``: fields of the optimizer's config."""
    from megatron.bridge.recipes.utils.optimizer_utils import distributed_fused_adam_with_cosine_annealing

    config.optimizer, config.scheduler = distributed_fused_adam_with_cosine_annealing(
        precision="fp32", lr_warmup_iters=0, lr_decay_iters=steps, max_lr=0.01, min_lr=0.001
    )
    for name, value in changes.items():
        setattr(config.optimizer, name, value)
    config.ddp.use_distributed_optimizer = True


def of_recipe(config: Any, name: str) -> None:
    """The optimizer that Megatron-Bridge's recipe ``name`` sets, in float32; their models come from a hub."""
    from megatron.bridge.recipes.kimi.h100.kimi_k2 import _apply_kimi_k2_optimizer
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

    config.mixed_precision = MixedPrecisionConfig(fp32=True)
    _apply_kimi_k2_optimizer(config, "muon")
    if name == "deepseek_v4_flash":  # deepseek_v4_flash_pretrain_32gpu_h100_bf16_muon_config
        muon(
            config,
            steps=config.train.train_iters,
            muon_scale_mode="unit_rms_norm",
            muon_extra_scale_factor=0.2,
            max_lr=2.7e-4,
            min_lr=2.7e-5,
            muon_tp_mode="blockwise",
        )
        config.optimizer.optimizer = "muon"
        config.optimizer.adam_beta1, config.optimizer.adam_beta2, config.optimizer.adam_eps = 0.9, 0.95, 1e-20
    config.optimizer.lr, config.optimizer.min_lr = 0.02, 0.002  # three steps are to show a difference
    config.scheduler.lr_warmup_iters, config.scheduler.lr_decay_iters = 0, 8


def optimizer(chunks: list[Any], **changes: Any) -> tuple[Any, Any]:
    """``finalize()`` and ``setup_optimizer`` on model chunks that are there."""
    from megatron.bridge.recipes.utils.optimizer_utils import distributed_muon_with_cosine_annealing
    from megatron.bridge.training.optim import setup_optimizer

    config, scheduler = distributed_muon_with_cosine_annealing(
        precision="fp32", max_lr=0.01, min_lr=0.001, lr_warmup_iters=0, lr_decay_iters=8, **changes
    )
    config.optimizer = "muon"
    config.finalize()
    scheduler.lr_warmup_steps, scheduler.lr_decay_steps, scheduler.wd_incr_steps = 0, 8, 8
    return setup_optimizer(config, scheduler, chunks)


def pretrain(config: Any) -> list[float]:
    """``pretrain(config, forward_step)``: the losses that its callbacks are given; the process is left as found."""
    from megatron.bridge.training import setup
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.initialize import destroy_global_state
    from megatron.bridge.training.pretrain import pretrain as run
    from megatron.bridge.training.utils import checkpoint_utils
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

    losses: list[float] = []

    class Losses(Callback):
        def on_train_step_end(self, context: Any) -> None:
            losses.append(float(context.loss_dict["lm loss"]))

    destroy_rerun_state_machine()  # which other tests may have left
    # `setup` asserts CUDA, and does not pass on the argument that lets it go.
    without_cuda = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup, "initialize_megatron", without_cuda)
            run(config, forward_step, callbacks=[Losses()])
    finally:
        destroy_global_state()
        for cached in (checkpoint_utils.read_train_state, checkpoint_utils.read_run_config):
            cached.cache_clear()  # rank 0 alone has them from a run of one rank
    dist.barrier()
    return losses

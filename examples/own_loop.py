"""A training loop of one's own with Megatron-Core: no ``megatron.training``, no flags of Megatron's.

    torchrun --nproc-per-node 2 -m megatron_muon run examples/own_loop.py --tp 2

``install()`` comes before the config and the model. What Muon takes are fields of ``OptimizerConfig``; everything else
is as with any optimizer. The launcher is for the CPU, where it stands in for NCCL and CUDA; on GPUs plain ``torchrun``
does.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

import megatron_muon

megatron_muon.install()

VOCABULARY, LENGTH, BATCH = 64, 32, 8


def batches(rank: int) -> Iterator[dict[str, torch.Tensor]]:
    """Sequences that count up, (BATCH, LENGTH) tokens and the next ones; of a data-parallel rank."""
    generator = torch.Generator().manual_seed(rank)
    while True:
        start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        tokens = ((start + 3 * torch.arange(LENGTH + 1)) % VOCABULARY).cuda()
        yield {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean of the tokens' losses, in nats."""
    return losses.mean(), {"loss": losses.detach().mean()}


def forward(data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    """A micro-batch through the model, and what makes a loss of its output."""
    batch = next(data)
    places = torch.arange(LENGTH, device=batch["tokens"].device).expand(BATCH, -1)
    return model(batch["tokens"], places, None, labels=batch["labels"]), loss_of


def train(tp: int, steps: int) -> list[float]:
    """Train a small GPT; the losses of all steps on this rank."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=160,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        tensor_model_parallel_size=tp,
        pipeline_dtype=torch.float32,
    )
    gpt = GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"), VOCABULARY, LENGTH).cuda()
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt)
    config.finalize_model_grads_func = finalize_model_grads
    settings = OptimizerConfig(
        optimizer="muon",
        lr=3e-3,
        min_lr=3e-4,
        weight_decay=0.1,
        clip_grad=1.0,
        muon_nesterov=True,
        muon_extra_scale_factor=0.2,  # updates of Adam's size: Adam's learning rate and decay serve
    )
    optimizer = get_megatron_optimizer(settings, [ddp])  # prints who updates what
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=steps // 5,
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    step, data, losses = get_forward_backward_func(), batches(parallel_state.get_data_parallel_rank()), []
    for _ in range(steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        reports = step(
            forward_step_func=forward,
            data_iterator=data,
            model=[ddp],
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        optimizer.step()
        schedule.step(1)
        losses.append(float(reports[0]["loss"]))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks; the others are data-parallel")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl")
    found = train(options.tp, options.steps)
    if torch.distributed.get_rank() == 0:
        print(f"loss of the first step {found[0]:.3f}, of the last {found[-1]:.3f}")
    torch.distributed.destroy_process_group()

"""Zeros in gradients of experts that are whole on each tensor-parallel rank."""

from types import SimpleNamespace

import torch

from megatron.core.optimizer import clip_grads, layer_wise_optimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer


def test_experts_are_filtered_by_their_own_tensor_parallel_group(monkeypatch):
    """TP 2, expert TP 1, seen on the second tensor-parallel rank, which owns other experts."""

    def parameter(allreduce, zeros):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        param.grad[:zeros] = 0
        param.allreduce = allreduce
        return param

    real_zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **kwargs: real_zeros(*size, **kwargs))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(clip_grads, "param_is_not_gtp_duplicate", lambda param: True)
    monkeypatch.setattr(layer_wise_optimizer, "count_zeros_fp32", clip_grads.count_zeros_fp32)
    optimizer = LayerWiseDistributedOptimizer.__new__(LayerWiseDistributedOptimizer)
    optimizer.config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
    params = [parameter(True, 1), parameter(False, 2)]
    optimizer.chained_optimizers = [SimpleNamespace(get_parameters=lambda: params)]
    optimizer.pg_collection = SimpleNamespace(
        tp=SimpleNamespace(rank=lambda: 1), expt_tp=SimpleNamespace(rank=lambda: 0)
    )
    assert optimizer.count_zeros() == 2  # the dense weight is counted on the first rank

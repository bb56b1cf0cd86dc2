"""Muon: momentum, orthogonalized by Newton-Schulz (Jordan et al., https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from megatron_muon.config import MuonConfig
from megatron_muon.engine.tensor_parallel import check_mode, shard_of, update_direction
from megatron_muon.optimizers.scale import scale_factor
from megatron_muon.orthogonalize.coefficients import coefficients
from megatron_muon.orthogonalize.newton_schulz import Reduce, newton_schulz
from megatron_muon.routing.layout import MatrixLayout, layout_of

__all__ = ["Muon"]


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights, whole or divided by tensor parallelism.

    For each logical matrix W of m rows and n columns, with gradient G::

        M <- momentum * M + (1 - momentum) * G
        U  = momentum * M + (1 - momentum) * G   if nesterov else   M
        W <- (1 - lr * weight_decay) * W - lr * extra_scale_factor * scale(m, n) * NewtonSchulz(U)

    A parameter may hold several logical matrices (attribute ``matrix_layout``, see :mod:`megatron_muon.routing`) and
    may be one rank's shard (Megatron's ``tensor_model_parallel``, ``partition_dim``, ``expert_tp``). The update is that
    of the whole logical matrices except in ``tp_mode="blockwise"``, where each shard counts as a matrix of its own.

    State: ``momentum_buffer``, of the parameter's shape and dtype.

    Args:
        params: 2-D parameters or param groups.
        lr: learning rate.
        momentum: decay of the momentum, 0 <= momentum < 1.
        nesterov: whether to use Nesterov momentum.
        weight_decay: decoupled weight decay; multiplied by ``lr`` alone.
        split_qkv: whether the q, k, v (and gate) rows of a ``linear_qkv`` weight are matrices of their own.
        scale_mode: see :func:`megatron_muon.optimizers.scale.scale_factor`.
        extra_scale_factor: a further factor on the update.
        coefficient_type: see :func:`megatron_muon.orthogonalize.coefficients.coefficients`.
        num_ns_steps: Newton-Schulz steps.
        eps: lower bound of the norm before the iteration.
        fp32_matmul_prec: ``medium`` (bfloat16), ``high`` (TF32) or ``highest`` (the parameter's dtype).
        tp_mode: see :mod:`megatron_muon.engine.tensor_parallel`.
        tp_group: tensor-parallel group of dense weights; None if nothing is divided.
        expert_tp_group: that of weights with ``expert_tp = True``.

    Raises:
        ValueError: for a wrong value (:class:`megatron_muon.ConfigError`), a parameter that is not 2-D, or a fused
            weight whose shards ``tp_mode`` cannot split.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.01,
        *,
        split_qkv: bool = True,
        scale_mode: str = "spectral",
        extra_scale_factor: float = 1.0,
        coefficient_type: str = "quintic",
        num_ns_steps: int = 5,
        eps: float = 1e-7,
        fp32_matmul_prec: str = "medium",
        tp_mode: str = "duplicated",
        tp_group: dist.ProcessGroup | None = None,
        expert_tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"lr {lr}: give a number of at least 0")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay {weight_decay}: give a number of at least 0")
        self.config = MuonConfig(
            momentum=momentum,
            nesterov=nesterov,
            split_qkv=split_qkv,
            scale_mode=scale_mode,
            extra_scale_factor=extra_scale_factor,
            coefficient_type=coefficient_type,
            num_ns_steps=num_ns_steps,
            eps=eps,
            fp32_matmul_prec=fp32_matmul_prec,
            tp_mode=tp_mode,
        ).validate()
        self.tp_group = tp_group
        self.expert_tp_group = expert_tp_group
        self._coefficients = coefficients(coefficient_type, num_ns_steps)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``; refuses what cannot be orthogonalized."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dim() != 2:
                raise ValueError(f"Muon updates 2-D weights, got shape {tuple(param.shape)}: give it to Adam")
            shard = shard_of(param, self.tp_group, self.expert_tp_group)
            check_mode(self.config.tp_mode, self._layout(param), shard, param.shape)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: as in ``torch.optim.Optimizer``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with _matmul_precision(self.config.fp32_matmul_prec):
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Create missing state. Megatron-Core calls this with False before it loads a checkpoint."""
        for param in group["params"]:
            if skip_non_grad_params and param.grad is None:
                continue
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param)

    def _step_group(self, group: dict[str, Any]) -> None:
        self._init_group(group)
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        lr, momentum = group["lr"], group["momentum"]
        buffers = [self.state[param]["momentum_buffer"] for param in params]
        grads = [param.grad.to(buffer.dtype) for param, buffer in zip(params, buffers, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1.0 - momentum)
        if group["weight_decay"] != 0.0:
            torch._foreach_mul_(params, 1.0 - lr * group["weight_decay"])
        for param, grad, buffer in zip(params, grads, buffers, strict=True):
            # The gradient itself stays as it is: Megatron reads its buffer again (logging, gradient norms).
            u = grad.lerp(buffer, momentum) if self.config.nesterov else buffer
            shard = shard_of(param, self.tp_group, self.expert_tp_group)
            update = update_direction(u, self._layout(param), shard, self.config.tp_mode, self._direction)
            param.add_(update, alpha=-lr)

    def _layout(self, param: torch.Tensor) -> MatrixLayout:
        return layout_of(param, split_qkv=self.config.split_qkv)

    def _direction(
        self, x: torch.Tensor, m: int, n: int, *, shard_dim: int | None = None, reduce: Reduce | None = None
    ) -> torch.Tensor:
        """Scaled orthogonalized ``x``; see :class:`megatron_muon.engine.tensor_parallel.Direction`."""
        config = self.config
        dtype = torch.bfloat16 if config.fp32_matmul_prec == "medium" else None
        orthogonal = newton_schulz(
            x, self._coefficients, dtype=dtype, eps=config.eps, shard_dim=shard_dim, reduce=reduce
        )
        return orthogonal * (scale_factor(config.scale_mode, m, n) * config.extra_scale_factor)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """float32 products in TF32 where asked for; the process-wide setting is put back."""
    before = torch.get_float32_matmul_precision()
    # "medium" converts to bfloat16 by itself, so that float32 products (there are none then) may stay exact.
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

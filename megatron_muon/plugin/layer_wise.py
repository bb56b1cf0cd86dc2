"""Megatron-Core's layer-wise optimizer with float32 models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_muon._patching import Patch

__all__ = ["patches"]


def patches() -> list[Patch]:
    """The hook on the layer-wise optimizer's constructor."""
    return [
        Patch(
            "megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.__init__",
            _with_fp32,
            "Megatron wraps the optimizers inside only for bfloat16 models; with float32 ones its own assertion fails",
        )
    ]


def _with_fp32(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(
        self: Any,
        optimizers: list[Any],
        config: Any,
        pg_collection: Any = None,
        init_state_fn_list: list[Any] | None = None,
        model_chunks: list[Any] | None = None,
    ) -> None:
        if not config.bf16:
            init_state = init_state_fn_list or [None] * len(optimizers)
            member = _fp32_member()
            optimizers = [member(inner, config, fn) for inner, fn in zip(optimizers, init_state, strict=True)]
        original(self, optimizers, config, pg_collection, init_state_fn_list, model_chunks)

    return __init__


@functools.cache
def _fp32_member() -> type:
    """The float32 wrapper whose state has the form that the layer-wise optimizer saves and loads.

    Made on first use: the base class is Megatron's, which must not be imported before it is needed.
    """
    from megatron.core.optimizer.optimizer import FP32Optimizer

    class LayerWiseFP32Optimizer(FP32Optimizer):
        """``FP32Optimizer`` that saves its state under ``optimizer``, as ``Float16OptimizerWithFloat16Params`` does."""

        def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"optimizer": super().sharded_state_dict(*args, **kwargs)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict.get("optimizer", state_dict))  # --ckpt-format torch saves it flat

    return LayerWiseFP32Optimizer

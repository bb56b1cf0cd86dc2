"""bfloat16 models without float32 copies: of weights whose masters are kept as remainders, and of gradients.

Megatron-Core's wrapper of an optimizer makes a float32 copy of each bfloat16 weight, which the optimizer updates, and
where gradients are reduced in bfloat16 it copies all of them to float32 before each step. For Muon's weights there is
another: the optimizer's parameters are the model's weights themselves, or float32 copies, and gradients are DDP's
buffers, under Megatron-Core's name for a gradient of another type than its weight (``decoupled_grad``).

Megatron-Core reads that name only of a whole model, by its config. Here Adam's weights have their gradients as ever,
beside Muon's in one chain: its functions are told of each weight.

Clipping multiplies gradients in their buffer, as it does for Adam there: each number of a bfloat16 gradient is rounded
once more. That changes updates by 0.5e-3 to 1.8e-3 (where gradients are all noise), just as much as that gradients are
bfloat16; an iteration in bfloat16 changes them by 5.3e-3.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from megatron_muon._patching import Original, Patches
from megatron_muon.config import flag
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.storage import gradient_of

PATCHES = Patches()

_OPTIMIZER = "megatron.core.optimizer.optimizer"
_CLIPPING = "megatron.core.optimizer.clip_grads"
_DECOUPLED = "decoupled_grad"


@PATCHES.around(
    f"{_OPTIMIZER}:Float16OptimizerWithFloat16Params.__init__",
    "it copies all of Muon's weights in float32, and before each step their bfloat16 gradients",
)
def _without_copies(
    original: Original, self: Any, optimizer: Any, config: Any, grad_scaler: Any, init_state_fn: Any
) -> None:
    is_megatrons = type(self).__name__ == "Float16OptimizerWithFloat16Params"
    if isinstance(optimizer, Muon) and optimizer.config.master == "remainder":
        if not is_megatrons:
            raise ConfigError(
                f"{flag('master')} remainder: {type(self).__name__} keeps float32 copies of weights. Use "
                f"{flag('master')} fp32, or Megatron-Core's own wrapper."
            )
        self.__class__ = _class()
        self.begin(optimizer, config, grad_scaler, init_state_fn)
        return
    groups = optimizer.param_groups if isinstance(optimizer, Muon) and is_megatrons else ()
    params = [param for group in groups for param in group["params"]]
    original(self, optimizer, config, grad_scaler, init_state_fn)
    if any(param.dtype == torch.bfloat16 and not _is_reduced_in_float32(param) for param in params):
        self.__class__ = _class()


def _is_reduced_in_float32(param: torch.Tensor) -> bool:
    gradient = getattr(param, "main_grad", None)
    return gradient is not None and gradient.dtype == torch.float32


@functools.cache
def _class() -> type:
    """The wrapper; made on first use, since ``install()`` imports nothing of Megatron-Core."""
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MixedPrecisionOptimizer

    class Float16OptimizerWithoutCopies(Float16OptimizerWithFloat16Params):
        """``Float16OptimizerWithFloat16Params`` without float32 copies of gradients, and perhaps of weights.

        Attributes:
            fp32_from_float16_groups: what the optimizer updates for ``float16_groups``: float32 copies, or these
                weights themselves, whose masters are kept as remainders.
        """

        def begin(self, optimizer: Any, config: Any, grad_scaler: Any, init_state_fn: Any) -> None:
            """What a constructor does where weights have no copies."""
            MixedPrecisionOptimizer.__init__(self, optimizer, config, grad_scaler, init_state_fn)
            self.is_stub_optimizer = False
            groups = [[param for param in group["params"] if param.requires_grad] for group in optimizer.param_groups]
            self.float16_groups = [[param for param in group if param.dtype == torch.bfloat16] for group in groups]
            self.fp32_from_float16_groups = self.float16_groups
            self.fp32_from_fp32_groups = [
                [param for param in group if param.dtype == torch.float32] for group in groups
            ]
            if others := {param.dtype for group in groups for param in group} - {torch.bfloat16, torch.float32}:
                raise TypeError(f"masters kept as remainders, of weights of {', '.join(map(str, others))}")
            for param, _ in self._pairs():
                vars(param).pop("main_param", None)  # of an optimizer that the model had before

        def _pairs(self) -> Iterator[tuple[Any, Any]]:
            for params, mains in zip(self.float16_groups, self.fp32_from_float16_groups, strict=True):
                yield from zip(params, mains, strict=True)

        def _copy_model_grads_to_main_grads(self) -> None:
            for param, main in self._pairs():
                gradient = param.main_grad if hasattr(param, "main_grad") else param.grad
                if gradient is not None:
                    setattr(main, _DECOUPLED, gradient)
                param.grad = None
            for group in self.fp32_from_fp32_groups:
                for param in group:
                    param.grad = param.main_grad if hasattr(param, "main_grad") else param.grad

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)
            for _, main in self._pairs():
                gradient = getattr(main, _DECOUPLED, None)
                if set_to_none:
                    setattr(main, _DECOUPLED, None)
                elif gradient is not None:
                    gradient.zero_()

        @property
        def _has_copies(self) -> bool:
            return self.fp32_from_float16_groups is not self.float16_groups

        def _copy_main_params_to_model_params(self) -> None:
            if self._has_copies:
                super()._copy_main_params_to_model_params()

        def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
            super()._copy_model_params_to_main_params(state_dict)
            if not self._has_copies:
                self.optimizer.forget()  # what is left of masters are the weights

    return Float16OptimizerWithoutCopies


@contextlib.contextmanager
def _all_decoupled(params: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within, weights have their gradients under the one name, whatever they have them under."""
    others = [param for param in params if getattr(param, _DECOUPLED, None) is None]
    for param in others:
        setattr(param, _DECOUPLED, param.grad)
    try:
        yield
    finally:
        for param in others:
            setattr(param, _DECOUPLED, None)


def _have_decoupled(params: Iterable[torch.Tensor]) -> bool:
    return any(getattr(param, _DECOUPLED, None) is not None for param in params)


@PATCHES.around(
    f"{_OPTIMIZER}:MegatronOptimizer._filter_grads_for_norm",
    "gradients of weights without float32 copies are in decoupled_grad, and would not count in the norm; kernels want "
    "lists of one type, and norms of bfloat16 gradients would be rounded to bfloat16 on the CPU",
)
def _norms_of_all(
    original: Original, self: Any, params: Sequence[torch.Tensor], param_filter: Any = None
) -> list[torch.Tensor]:
    if self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 or not _have_decoupled(params):
        return original(self, params, param_filter)
    asking = copy.copy(self)
    asking.config = copy.copy(self.config)
    asking.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    with _all_decoupled(params):
        grads = original(asking, params, param_filter)
    wide = [grad for grad in grads if grad.dtype != torch.bfloat16]
    narrow = [grad for grad in grads if grad.dtype == torch.bfloat16]
    # A norm of norms: the same, and it is the one thing that these are for.
    return [*wide, torch.stack(torch._foreach_norm(narrow, dtype=torch.float32))] if narrow else wide


@PATCHES.around(
    f"{_CLIPPING}:clip_grad_by_total_norm_fp32",
    "gradients of weights without float32 copies are under another attribute, and would not be clipped; kernels take "
    "those of one list for numbers of one type",
)
def _clip_all(
    original: Original, parameters: Any, max_norm: float, total_norm: Any, use_decoupled_grad: bool = False
) -> None:
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if use_decoupled_grad or not _have_decoupled(params):  # of Adam, by its own config
        original(parameters, max_norm, total_norm, use_decoupled_grad)
        return
    alike: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for param in params:
        if (grad := gradient_of(param)) is not None:
            alike[grad.dtype].append(param)
    with _all_decoupled(params):
        for some in alike.values():
            original(some, max_norm, total_norm, use_decoupled_grad=True)


@PATCHES.around(
    f"{_CLIPPING}:count_zeros_fp32",
    "gradients of weights without float32 copies are under another attribute, and their zeros would not count",
)
def _count_all(
    original: Original,
    parameters: Any,
    grad_stats_parallel_group: Any,
    use_decoupled_grad: bool = False,
    **kwargs: Any,
) -> Any:
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if use_decoupled_grad or not _have_decoupled(params):
        return original(parameters, grad_stats_parallel_group, use_decoupled_grad, **kwargs)
    with _all_decoupled(params):
        return original(params, grad_stats_parallel_group, True, **kwargs)

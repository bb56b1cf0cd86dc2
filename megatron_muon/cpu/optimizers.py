"""Scalar optimizers: torch's arithmetic in the place of TransformerEngine's and Apex's fused kernels.

Megatron-Core prefers ``FusedAdam`` wherever TransformerEngine or Apex can be imported, which needs a GPU to run. Its
fallback for ``torch.optim.AdamW`` is a different code path that cannot resume a run: the distributed optimizer asserts
that every state has a step count before there is any state, and the layer-wise optimizer's legacy path drops the count
where rank 0 owns no Adam parameter. So the CPU gets an optimizer with torch's arithmetic and FusedAdam's contract, and
runs the code that GPUs run; checkpoints of either can be read by the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from megatron_muon._patching import Original, Patch, Patches, replace_by

_CORE = "megatron.core.optimizer"
_DISTRIBUTED = f"{_CORE}.distrib_optimizer"
PATCHES = Patches()


class GroupStepAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` that counts steps in the parameter group, as FusedAdam does, not in each state.

    Args:
        params: parameters or parameter groups.
        adam_w_mode: decoupled weight decay (AdamW); False adds the decay to the gradient (Adam).
        capturable: accepted for FusedAdam's signature; there are no CUDA graphs to be captured in.
        **kwargs: of ``torch.optim.AdamW``: lr, betas, eps, weight_decay.
    """

    def __init__(self, params: Any, adam_w_mode: bool = True, capturable: bool = False, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.adam_w_mode = adam_w_mode

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for a step count in each state

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # type: ignore[override]
        """One step of AdamW over all groups; a group without parameters keeps its count, as with FusedAdam."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update = adamw if self.adam_w_mode else adam
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            params = [param for param in group["params"] if param.grad is not None]
            states = [self._state_of(param) for param in params]
            update(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],  # torch's function adds the one itself
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return loss

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


def _local(name: str) -> Callable[[Any], Any]:
    """Megatron-Core's own torch version of a multi-tensor kernel."""
    return lambda original: getattr(importlib.import_module("megatron.core.utils"), name)


@PATCHES.around(
    f"{_DISTRIBUTED}:DistributedOptimizer._set_main_param_and_optimizer_states",
    "fp32 training, which is rare on GPUs, loads --ckpt-format torch into views of leaves outside of no_grad",
)
def _without_grad(original: Original, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return original(*args, **kwargs)


_UTILS = "megatron.training.utils.common_utils"
_FUSED = "fused optimizers need a GPU, also where TransformerEngine or Apex can be imported"
_CONTRACT = "the replacement keeps its step count where FusedAdam keeps it"
_KERNEL = "multi-tensor kernels need a GPU, also where TransformerEngine or Apex can be imported"

# No copies are replaced here: others hold torch.optim.SGD and the local kernels for their own sake, and would lose them
# on revert. Each module that imports them is named instead.
PATCHES += [
    Patch(f"{_CORE}:Adam", replace_by(GroupStepAdamW), _FUSED, copies_in=()),
    Patch(f"{_CORE}:SGD", replace_by(torch.optim.SGD), _FUSED, copies_in=()),
    Patch(f"{_CORE}:USING_PYTORCH_OPTIMIZER", replace_by(False), _CONTRACT),
    Patch(f"{_DISTRIBUTED}:Adam", replace_by(GroupStepAdamW), _FUSED, copies_in=()),
    Patch(f"{_DISTRIBUTED}:HAVE_APEX_OR_TE", replace_by(True), _CONTRACT),
    Patch(f"{_DISTRIBUTED}:USING_TE_OPTIMIZER", replace_by(True), _CONTRACT),
    Patch(f"{_CORE}.clip_grads:multi_tensor_scale_tensor_impl", replace_by(None), _KERNEL, copies_in=()),
    *(
        Patch(target, _local(name), _KERNEL, copies_in=())
        for target, name in (
            (f"{_CORE}.optimizer:multi_tensor_applier", "local_multi_tensor_applier"),
            (f"{_CORE}.optimizer:multi_tensor_scale_impl", "local_multi_tensor_scale"),
            (f"{_CORE}.clip_grads:multi_tensor_applier", "local_multi_tensor_applier"),
            (f"{_CORE}.clip_grads:multi_tensor_scale_impl", "local_multi_tensor_scale"),
            (f"{_CORE}.clip_grads:l2_norm_impl", "local_multi_tensor_l2_norm"),
            (f"{_UTILS}:multi_tensor_applier", "local_multi_tensor_applier"),
            (f"{_UTILS}:multi_tensor_l2norm", "local_multi_tensor_l2_norm"),
        )
    ),
]

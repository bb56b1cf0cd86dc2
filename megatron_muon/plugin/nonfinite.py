"""NaN and infinity in gradients: they must not reach momentum and weights, which would keep them for ever.

Megatron-Core looks for them where DDP's ``check_for_nan_in_grad`` is on, before gradients are reduced; afterwards only
a loss scaler does. :func:`refuse_nonfinite` looks at what the optimizer is about to read, before any state changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.config import flag
from megatron_muon.plugin.optimizer_state import held_by
from megatron_muon.routing import global_names

__all__ = ["refuse_nonfinite"]

_SUSPECT, _OVERFLOW, _FAILED = 1.0, 2.0, 3.0
"""What a rank finds: a norm that is not finite, what Megatron-Core's loss scaler has seen, that it cannot step at all.

The largest counts on all ranks: with a loss scaler infinity is to be expected, and Megatron-Core leaves the step out.
"""


def refuse_nonfinite(
    optimizer: Any,
    model_chunks: Sequence[torch.nn.Module],
    ranks: Ranks,
    choice: str,
    device: torch.device,
    check: Callable[[], None],
) -> None:
    """Let ``optimizer.prepare_grads``, with which every step begins, stop the run or have the step left out.

    Args:
        optimizer: Megatron-Core's, of a model.
        model_chunks: of the model on this rank.
        ranks: the model's; all of them step together, and decide alike.
        choice: ``stop`` or ``skip``.
        device: of the model.
        check: refuses a step; on some ranks perhaps. What it raises there is raised on all.

    Raises (in each step):
        RuntimeError: with ``stop``, on all ranks, naming the weights.
    """
    prepare = optimizer.prepare_grads

    def prepare_grads() -> bool:
        failure: Exception | None = None
        verdict = torch.full((), _FAILED, device=device)
        try:
            check()
            verdict = torch.full((), _OVERFLOW, device=device) if prepare() else _suspect(optimizer, device)
        except Exception as error:  # the other ranks are on their way to what follows
            failure = error
        ranks.reduce_max(verdict)
        # Waits for the device, before state changes; Megatron-Core waits after each step, for whether it succeeded.
        worst = verdict.item()
        if worst == _FAILED:
            ranks.together(lambda: _raise(failure))
        if worst != _SUSPECT:
            return bool(worst == _OVERFLOW)
        names = dict.fromkeys(itertools.chain.from_iterable(ranks.gather(lambda: _names(optimizer, model_chunks))))
        if not names:
            return False  # finite, but too large to be squared
        told = ", ".join(itertools.islice(names, 4)) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        if choice == "stop":
            raise RuntimeError(
                f"NaN or infinity in the gradients of {told}. Weights and momentum are those of the last step. "
                f"{flag('nonfinite')} skip leaves out such steps; a checkpoint from before and a lower learning rate "
                "help where they come back."
            )
        if ranks.is_first:
            print(f"megatron_muon: step left out: NaN or infinity in the gradients of {told}", flush=True)
        return True

    optimizer.prepare_grads = prepare_grads


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _suspect(optimizer: Any, device: torch.device) -> torch.Tensor:
    """:data:`_SUSPECT` where a norm of this rank's gradients is not finite, else 0: a scalar."""
    params = (param for group in optimizer.param_groups for param in group["params"])
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros((), device=device)
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(grads)])
    return (~norms.isfinite()).any() * _SUSPECT


def _names(optimizer: Any, model_chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Weights whose gradient, as this rank's optimizer is to read it, is not finite."""
    names = {param: name for chunk in model_chunks for name, param in global_names(chunk)}
    held = [(each.param, each.key.grad) for each in held_by(optimizer, refuse=False) if each.key is not None]
    return [names[param] for param, grad in held if grad is not None and not grad.isfinite().all()]

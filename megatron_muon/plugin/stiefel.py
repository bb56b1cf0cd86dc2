"""Stiefel Muon in Megatron-Core: no run without a weight on the manifold, and how far its solver comes is logged."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon._patching import Patch
from megatron_muon.config import flag
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.plugin import options
from megatron_muon.routing.layout import STIEFEL, layout_of
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding

__all__ = ["check_stiefel", "has_stiefel", "log_scalars", "patches", "watch"]


def patches() -> list[Patch]:
    """The hook on Megatron's log."""
    return [
        Patch(
            "megatron.training.training:training_log",
            _with_log,
            "how nearly tangent the updates of --optimizer stiefel_muon are is logged, over the whole model",
        )
    ]


def has_stiefel(chunk: torch.nn.Module) -> bool:
    """Whether a model chunk has weights on the manifold."""
    return any(
        param.requires_grad and layout_of(param).direction == STIEFEL and not _is_nonlinear_or_embedding(param)
        for param in chunk.parameters()
    )


def check_stiefel(optimizer: str, found: bool) -> None:
    """Refuse ``--optimizer stiefel_muon`` without a weight for it: nothing would be constrained.

    Args:
        optimizer: its name.
        found: whether any rank has such a weight.

    Raises:
        ConfigError: naming the flag that gives it some.
    """
    if optimizer.removeprefix("dist_") == "stiefel_muon" and not found:
        raise ConfigError(
            f"--optimizer stiefel_muon without a weight on the Stiefel manifold: name some, such as "
            f"{flag('param_rule')} '*.linear_qkv.weight=stiefel', or use --optimizer muon."
        )


class _Log:
    """What is said about the updates of the model in training."""

    def __init__(self) -> None:
        self.optimizers: list[StiefelMuon] | None = None
        self.scalars: dict[str, float] = {}

    def write(self, iteration: int) -> None:
        """Write what is due after ``iteration``; all ranks together, each knows its own matrices."""
        if self.optimizers is None:
            return
        args = options.training_arguments()
        to_text, to_writers = (iteration % each == 0 for each in (args.log_interval, args.tensorboard_log_interval))
        if not to_text and not to_writers:
            return
        worst = self._worst()
        if dist.get_rank() != dist.get_world_size() - 1:
            return
        # Megatron waits for the device at its intervals, too.
        value = worst.item()
        if to_text:
            self.scalars = {"stiefel_tangency": value}
            print(f" Stiefel manifold after iteration {iteration}: tangency residual {value:.3g}", flush=True)
        if to_writers:
            _to_writers(value, iteration)

    def _worst(self) -> torch.Tensor:
        """The largest residual of the last step, over all ranks."""
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        worst = torch.zeros((), dtype=torch.float32, device=device)
        for optimizer in self.optimizers or ():
            if optimizer.tangency is not None:
                worst = torch.maximum(worst, optimizer.tangency.float())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst


def _to_writers(value: float, iteration: int) -> None:
    training = sys.modules["megatron.training.global_vars"]
    if tensorboard := training.get_tensorboard_writer():
        tensorboard.add_scalar("stiefel/tangency", value, iteration)
    if wandb := training.get_wandb_writer():
        wandb.log({"stiefel/tangency": value}, iteration)


_log = _Log()


def watch(optimizers: Iterable[Any], name: str) -> None:
    """Log what these optimizers of this rank, of a run with ``--optimizer name``, say from now on."""
    is_stiefel = name.removeprefix("dist_") == "stiefel_muon"
    _log.optimizers = [each for each in optimizers if isinstance(each, StiefelMuon)] if is_stiefel else None
    _log.scalars = {}


def log_scalars() -> dict[str, float]:
    """What a record of an iteration that Megatron has just logged says too; empty with other optimizers."""
    return _log.scalars


def _with_log(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        _log.write(signature.bind(*args, **kwargs).arguments["iteration"])
        return result

    return training_log

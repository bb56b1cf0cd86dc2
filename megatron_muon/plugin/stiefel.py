"""Stiefel Muon in Megatron-Core: no run without a weight on the manifold, and how far its solver comes is logged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.config import flag
from megatron_muon.errors import ConfigError
from megatron_muon.monitor.sources import Report
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.plugin import recording
from megatron_muon.plugin.optimizer_state import leaves
from megatron_muon.routing.layout import STIEFEL, layout_of
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding


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


class Tangency:
    """How nearly tangent the updates of a model's last step were; logged, see :class:`Source`.

    Args:
        variants: of the optimizers of this rank, which may have none.
        ranks: the model's. Each knows its own matrices.
        device: of the model.
    """

    title, prefix = "Stiefel manifold", "stiefel"

    def __init__(self, variants: Sequence[StiefelMuon], ranks: Ranks, device: torch.device) -> None:
        self._variants = variants
        self._ranks = ranks
        self._worst = torch.zeros((), dtype=torch.float32, device=device)

    def step(self, update: Callable[[], Any]) -> Any:
        """Run the optimizer's ``step_with_ready_grads``.

        The largest residual over all ranks costs an all-reduce of one number. Not left to the log, which is one rank's:
        ranks that log at other times would wait for each other.
        """
        result = update()
        self._worst.zero_()
        for variant in self._variants:
            if variant.tangency is not None:
                torch.maximum(self._worst, variant.tangency.float(), out=self._worst)
        self._ranks.reduce_max(self._worst)
        return result

    def report(self, iteration: int) -> Report:
        """See :class:`Source`."""
        value = self._worst.item()
        return Report(f"tangency residual {value:.3g}", {"stiefel_tangency": value})

    def scalars(self, iteration: int) -> dict[str, float]:
        """See :class:`Source`."""
        return {"tangency": self._worst.item()}


def watch(optimizer: Any, ranks: Ranks, device: torch.device) -> None:
    """Log what Megatron-Core's wrapper of ``--optimizer stiefel_muon`` says from now on; on all ranks of its model."""
    variants = [getattr(part.optimizer, "variant", None) for part, _ in leaves(optimizer)]
    tangency = Tangency([each for each in variants if isinstance(each, StiefelMuon)], ranks, device)
    optimizer.step_with_ready_grads = functools.partial(tangency.step, optimizer.step_with_ready_grads)
    if ranks.is_last:
        recording.watch(optimizer, tangency)

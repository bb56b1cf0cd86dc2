"""Variants that give an update, or a weight, a size of its own: PolarGrad and Hyperball."""

from __future__ import annotations

from typing import Any

import torch

from megatron_muon.optimizers.stages import Matrices, Variant

__all__ = ["VARIANTS", "Hyperball", "PolarGrad"]

RADIUS = "radius"
"""State of Hyperball."""


class PolarGrad(Variant):
    """PolarGrad (arXiv 2505.21799): the nuclear norm of u times its polar factor, |u|_* O with |u|_* = <O, u>.

    Updates have the size of gradients, so that the learning rate is one of gradient descent; use scale mode ``none``.
    """

    name = "polargrad"
    adapts = True

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Scaled by the nuclear norm."""
        updates = matrices.updates
        mixes = [update.mix() for update in updates]
        nuclear = matrices.sums([update.direction * mix for update, mix in zip(updates, mixes, strict=True)])
        return [update.direction * norm for update, norm in zip(updates, nuclear, strict=True)]


class Hyperball(Variant):
    """MuonHyperball (arXiv 2606.16899): W <- R Norm_F(W - lr R Norm_F(O)), R = |W_0|_F of each logical matrix.

    The learning rate is the angle by which a weight turns. Weight decay does nothing; the scale mode must be ``none``.
    """

    name = "hyperball"
    adapts = True
    retracts = True
    decays = False

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """R of each matrix, repeated in each of its rows, so that it is saved and resharded with them; 0: not yet."""
        if RADIUS not in state:
            state[RADIUS] = torch.zeros_like(param[..., :1])

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """The direction with the norm of the weight's sphere."""
        updates = matrices.updates
        norms = matrices.norms([update.batch_of(update.param) for update in updates])
        lengths = matrices.norms([update.direction for update in updates])
        found = []
        for update, norm, length in zip(updates, norms, lengths, strict=True):
            radius = update.batch_of(update.state[RADIUS])
            radius = torch.where(radius > 0, radius, norm)
            for stored, value in update.pairs(update.state[RADIUS], radius):
                stored.copy_(value)
            found.append(update.direction * (radius / length.clamp_min(torch.finfo(length.dtype).tiny)))
        return found

    def retract(self, matrices: Matrices) -> None:
        """Back to the sphere. A weight that was zero at the start stays where the update takes it."""
        updates = matrices.updates
        weights = [update.batch_of(update.param) for update in updates]
        for update, weight, norm in zip(updates, weights, matrices.norms(weights), strict=True):
            radius = update.batch_of(update.state[RADIUS])
            factor = torch.where((radius > 0) & (norm > 0), radius / norm, torch.ones_like(radius))
            for stored, value in update.pairs(update.param, weight * factor):
                stored.copy_(value)


VARIANTS: dict[str, type[Variant]] = {cls.name: cls for cls in (PolarGrad, Hyperball)}
"""By name, for ``--muon-variant``."""

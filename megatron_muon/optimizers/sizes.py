"""Sizes of updates and of weights that are measured: scale mode ``update_norm``, PolarGrad and Hyperball."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.stages import Matrices, Variant, divided, init_rows
from megatron_muon.routing.blocks import BlockRange

__all__ = ["Hyperball", "PolarGrad", "ZeroWeights", "normalized"]

RADIUS = "radius"
"""State of Hyperball."""


def normalized(matrices: Matrices, directions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """P5 in scale mode ``update_norm``: directions with the Frobenius norm that an orthogonal matrix has.

    Args:
        matrices: the updates.
        directions: of each, as they are to be added.
    """
    norms = matrices.norms(directions)
    wanted = [min(update.rows, update.columns) ** 0.5 for update in matrices.updates]
    return [divided(x, norm / size) for x, size, norm in zip(directions, wanted, norms, strict=True)]


class ZeroWeights:
    """Stops a run at a matrix of zeros whose norm is to be kept: it would never move."""

    def __init__(self, what: str, way_out: str) -> None:
        """
        Args:
            what: keeps norms, for the message.
            way_out: beside another rule for the weight.
        """
        self._what, self._way_out = what, way_out
        self._seen: set[tuple[torch.Tensor, BlockRange]] = set()

    def refuse(self, matrices: Matrices, radii: Sequence[torch.Tensor]) -> None:
        """Look at matrices that have not been looked at yet, alike on all ranks that hold parts of them.

        Args:
            matrices: the updates.
            radii: (matrices, ., 1) of each.

        Raises:
            ConfigError: naming the weight's kind and shape, and the way out.
        """
        keys = {(update.param, update.piece) for update in matrices.updates}
        if keys <= self._seen:
            return
        self._seen |= keys
        # Waits for the device, once for each matrix in a process.
        zeros = torch.stack([(radius == 0).any() for radius in radii]).tolist()
        for update, is_zero in zip(matrices.updates, zeros, strict=True):
            if is_zero:
                kind = update.piece.layout.kind
                raise ConfigError(
                    f"{self._what} with a {kind} weight whose {update.rows} x {update.columns} matrix is all zeros: it "
                    f"would stay so for ever. Use {self._way_out}, other initial weights, or --muon-param-rule "
                    "'NAME=adam' for it."
                )


class PolarGrad(Variant):
    """PolarGrad (arXiv 2505.21799): the nuclear norm of u times its polar factor, |u|_* O with |u|_* = <O, u>.

    Updates have the size of gradients, so that the learning rate is one of gradient descent; use scale mode ``none``.
    """

    name = "polargrad"

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
    decays = False

    def __init__(self) -> None:
        self._zeros = ZeroWeights("--muon-variant hyperball (which keeps the norm of each matrix)", "--optimizer muon")

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """R of each matrix."""
        init_rows(param, state, RADIUS)

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """The direction with the norm of the weight's sphere."""
        updates = matrices.updates
        norms = matrices.norms([update.batch_of(update.param) for update in updates])
        lengths = matrices.norms([update.direction for update in updates])
        stored_radii = [update.batch_of(update.state[RADIUS]) for update in updates]
        radii = [torch.where(radius > 0, radius, norm) for radius, norm in zip(stored_radii, norms, strict=True)]
        self._zeros.refuse(matrices, radii)
        found = []
        for update, radius, length in zip(updates, radii, lengths, strict=True):
            for stored, value in update.pairs(update.state[RADIUS], radius):
                stored.copy_(value)
            found.append(divided(update.direction, length) * radius)
        return found

    def retract(self, matrices: Matrices) -> None:
        """Back to the sphere."""
        updates = matrices.updates
        weights = [update.batch_of(update.param) for update in updates]
        for update, weight, norm in zip(updates, weights, matrices.norms(weights), strict=True):
            radius = update.batch_of(update.state[RADIUS])
            factor = torch.where((radius > 0) & (norm > 0), radius / norm, torch.ones_like(radius))
            for stored, value in update.pairs(update.param, weight * factor):
                stored.copy_(value)

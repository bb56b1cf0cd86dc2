"""Sizes of updates and of weights that are measured: two scale modes, PolarGrad and Hyperball."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.handled import HostReads
from megatron_muon.optimizers.matrices import Matrices, divide_
from megatron_muon.optimizers.spectra import spectral_norms
from megatron_muon.optimizers.stages import Variant, init_rows
from megatron_muon.routing.blocks import BlockRange

RADIUS = "radius"
"""Name of the state of Hyperball: R of each matrix."""


def normalize(matrices: Matrices, directions: Sequence[torch.Tensor]) -> None:
    """Scale mode ``update_norm``: give directions the Frobenius norm that an orthogonal matrix has, in place.

    Args:
        matrices: the updates.
        directions: of each, as they are to be added.
    """
    for update, x, norm in zip(matrices.updates, directions, matrices.norms(directions), strict=True):
        divide_(x, norm, min(update.rows, update.columns) ** 0.5)


def spectrally_normalize(matrices: Matrices, directions: Sequence[torch.Tensor]) -> None:
    """Scale mode ``spectral_norm``: divide directions by their spectral norms, in place.

    Args:
        matrices: the updates.
        directions: of each, as they are to be added.

    Source:
        arXiv 2512.05620, appendix F, which estimates the norm by a power iteration a step. Where singular values lie
        close, as Newton-Schulz leaves them, that finds too little: up to 14 % (:func:`spectra.spectral_norms` less
        than 1 %), and what an update is depends on the steps before.
    """
    for x, norm in zip(directions, matrices.norms(directions), strict=True):
        divide_(x, norm)
    for x, size in zip(directions, spectral_norms(matrices, directions), strict=True):
        x.mul_(size.reciprocal())


class ZeroWeightCheck:
    """Stops a run at a matrix of zeros whose norm is to be kept: it would never move."""

    def __init__(self, what: str, way_out: str) -> None:
        """
        Args:
            what: the option that keeps norms, for the message.
            way_out: the option that the message advises.
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
        keys = {key for update in matrices.updates for key in update.keys}
        if keys <= self._seen:
            return
        self._seen |= keys
        HostReads.note("which weights are zero")
        # Waits for the device, once for each matrix in a process.
        zeros = torch.stack([(radius == 0).any() for radius in radii]).tolist()
        for update, is_zero in zip(matrices.updates, zeros, strict=True):
            if is_zero:
                kind = update.slices.ranges[0].layout.kind
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
        """Multiply directions by the nuclear norm of the momentum."""
        products = [update.mix().mul_(update.direction) for update in matrices.updates]
        for update, norm in zip(matrices.updates, matrices.sums(products), strict=True):
            update.direction.mul_(norm)
        return super().adapt(matrices)


class Hyperball(Variant):
    """MuonHyperball (arXiv 2606.16899): W <- R Norm_F(W - lr R Norm_F(O)), R = |W_0|_F of each logical matrix.

    The learning rate is the angle by which a weight turns. Weight decay does nothing; the scale mode must be ``none``.
    """

    name = "hyperball"
    decays = False

    def __init__(self) -> None:
        self._zeros = ZeroWeightCheck(
            "--muon-variant hyperball (which keeps the norm of each matrix)", "--optimizer muon"
        )

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Create R of each matrix, which the first step measures."""
        init_rows(param, state, RADIUS)

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Give directions the norm R of the weight."""
        updates = matrices.updates
        weights = [update.master_norms() for update in updates]
        norms = matrices.norms([*weights, *(update.direction for update in updates)])
        stored = [update.gather(update.named(RADIUS)) for update in updates]
        radii = [torch.where(radius > 0, radius, norm) for radius, norm in zip(stored, norms, strict=False)]
        self._zeros.refuse(matrices, radii)
        for update, radius, length in zip(updates, radii, norms[len(updates) :], strict=True):
            update.store(update.named(RADIUS), radius)
            divide_(update.direction, length, radius)
        return super().adapt(matrices)

    def retract(self, matrices: Matrices) -> None:
        """Bring weights back to the norm R."""
        updates = matrices.updates
        norms = matrices.norms([update.master_norms() for update in updates])
        for update, norm in zip(updates, norms, strict=True):
            radius = update.gather(update.named(RADIUS))
            update.multiply(torch.where((radius > 0) & (norm > 0), radius / norm, 1.0))

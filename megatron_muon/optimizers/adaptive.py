"""Muon with second moments of its directions: AdaMuon, NorMuon, NAMO, on whole logical matrices at every layout."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from megatron_muon.config import SECOND_MOMENT_DEFAULTS, MuonConfig
from megatron_muon.optimizers.stages import Matrices, Variant, init_rows, signs_

__all__ = ["NAMO", "AdaMuon", "AdaMuonEO", "NorMuon", "SecondMoment"]


class SecondMoment(Variant):
    """What these variants share.

    Args:
        beta2: decay of the second moment, 0 <= beta2 < 1.
        eps: keeps divisions finite; positive.
    """

    optimizer = "adaptive_muon"
    flags: ClassVar[Mapping[str, str]] = {"beta2": "adaptive_muon_beta2", "eps": "adaptive_muon_eps"}

    state_name = "moment2_buffer"
    """Of the second moment; another name where it means something else, so that none is taken for the other's."""

    def __init__(
        self,
        beta2: float = SECOND_MOMENT_DEFAULTS["adaptive_muon_beta2"],
        eps: float = SECOND_MOMENT_DEFAULTS["adaptive_muon_eps"],
    ) -> None:
        self.beta2 = beta2
        self.eps = eps

    @property
    def settings(self) -> dict[str, Any]:
        """As of every variant, with the method."""
        return {**super().settings, "adaptive_muon_moment2_method": self.name}

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """Both numbers."""
        return {"moment2_beta2": self.beta2, "moment2_eps": self.eps}

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """One number for each row of the weight."""
        init_rows(param, state, self.state_name)

    def _average(self, matrices: Matrices, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Move each weight's second moment towards ``values``, and return it in their form."""
        found = []
        for update, value in zip(matrices.updates, values, strict=True):
            moment = update.state[self.state_name]
            for stored, new in update.pairs(moment, value):
                stored.lerp_(new.to(stored.dtype), 1.0 - self.beta2)
            found.append(update.batch_of(moment))
        return found


class AdaMuonEO(SecondMoment):
    """emerging-optimizers' ``adamuon``: V <- EMA(O^2), O / (sqrt(V) + eps), elementwise."""

    name = "adamuon_eo"

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """V, of the weight's shape."""
        if self.state_name not in state:
            state[self.state_name] = torch.zeros_like(param)

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Divide each element by the root of its second moment."""
        moments = self._average(matrices, [update.direction.square() for update in matrices.updates])
        return [
            update.direction / moment.sqrt_().add_(self.eps)
            for update, moment in zip(matrices.updates, moments, strict=True)
        ]


class AdaMuon(AdaMuonEO):
    """AdaMuon (arXiv 2507.11005): O = NS(sign(u)), divided like Adam's, with the RMS of an orthogonal matrix."""

    name = "adamuon"

    def transform(self, batches: Sequence[torch.Tensor]) -> None:
        """The sign of the momentum."""
        for batch in batches:
            signs_(batch)

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Divided, and brought to the norm sqrt(min(m, n)) that a semi-orthogonal matrix has."""
        divided = super().adapt(matrices)
        norms = matrices.norms(divided)
        return [
            tensor.mul_(min(update.rows, update.columns) ** 0.5 / norm.clamp_min(self.eps))
            for update, tensor, norm in zip(matrices.updates, divided, norms, strict=True)
        ]


class NorMuon(SecondMoment):
    """NorMuon (arXiv 2510.05491): v <- EMA(mean of O^2 over a row), O / sqrt(v), at the norm of O."""

    name = "normuon"
    state_name = "normuon_moment2"

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Rows of equal size, in the long run."""
        updates = matrices.updates
        squares = [update.direction.square() for update in updates]
        sums = matrices.row_sums(squares)
        moments = self._average(matrices, [total / update.columns for update, total in zip(updates, sums, strict=True)])
        adapted = [
            update.direction * moment.clamp_min_(self.eps).rsqrt_()
            for update, moment in zip(updates, moments, strict=True)
        ]
        before, after = matrices.norms([update.direction for update in updates]), matrices.norms(adapted)
        return [
            tensor.mul_(norm / new.clamp_min(self.eps))
            for tensor, norm, new in zip(adapted, before, after, strict=True)
        ]


class NAMO(SecondMoment):
    """NAMO (arXiv 2602.17080): alpha O with alpha = |u| / (sqrt(v) + eps), v <- EMA(|G|^2), Frobenius norms."""

    name = "namo"
    state_name = "namo_moment2"

    def check(self, config: MuonConfig) -> None:
        """Warn of a second moment that fades faster than the momentum."""
        if config.momentum**2 > self.beta2:
            warnings.warn(
                f"NAMO with momentum {config.momentum:g} and beta2 {self.beta2:g}: where a weight gets no gradients "
                "for long (an expert without tokens), its second moment fades faster than its momentum, and updates "
                "grow. Give a beta2 above the momentum's square.",
                stacklevel=4,
            )

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Scaled by how much of the gradient the momentum holds."""
        updates = matrices.updates
        grads = [update.batch_of(update.grad) for update in updates]
        mixes = [update.mix() for update in updates]
        squares = matrices.sums([grad.square() for grad in grads])
        rows = [
            square.expand(*update.direction.shape[:-1], 1).contiguous()
            for update, square in zip(updates, squares, strict=True)
        ]
        moments = self._average(matrices, rows)
        return [
            update.direction * (norm / moment.sqrt_().add_(self.eps))
            for update, norm, moment in zip(updates, matrices.norms(mixes), moments, strict=True)
        ]

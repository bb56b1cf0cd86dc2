"""Muon with second moments of its directions: AdaMuon, NorMuon, NAMO, on whole logical matrices at every layout."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from megatron_muon.config import SECOND_MOMENT, MuonConfig
from megatron_muon.optimizers.matrices import Matrices, Update, row_norms, signs_
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.optimizers.stages import Variant, init_rows


class SecondMoment(Variant):
    """Base of the variants that divide directions by a second moment.

    Args:
        beta2: decay of the second moment, 0 <= beta2 < 1.
        eps: keeps divisions finite; positive.
    """

    optimizer = "adaptive_muon"
    flags: ClassVar[Mapping[str, str]] = {"beta2": "adaptive_muon_beta2", "eps": "adaptive_muon_eps"}

    state_name = "moment2_buffer"
    """Name of the second moment in the state: another one where it means something else, so that none is misread."""

    def __init__(
        self, beta2: float = SECOND_MOMENT["adaptive_muon_beta2"][0], eps: float = SECOND_MOMENT["adaptive_muon_eps"][0]
    ) -> None:
        self.beta2 = beta2
        self.eps = eps

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`Variant`; ``--adaptive-muon-moment2-method`` is the variant's name."""
        return {**super().settings, "adaptive_muon_moment2_method": self.name}

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """The decay and the eps of the second moment."""
        return {"moment2_beta2": self.beta2, "moment2_eps": self.eps}

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Create a second moment with one number for each row of the weight."""
        init_rows(param, state, self.state_name)

    def missing(self, state: Mapping[str, Any]) -> str:
        """Momentum of another variant beside a second moment of zero: first updates are larger than at the start."""
        if self.state_name in state:
            return ""
        return f"had no {self.state_name}, which begins at zero: their first updates may be too large"

    def _average(self, update: Update, values: torch.Tensor) -> torch.Tensor:
        """Move second moments, a number a row, towards ``values``, (matrices, rows or 1, 1), and return them."""
        moment = update.gather(update.named(self.state_name))
        moment.lerp_(values.to(moment.dtype).expand_as(moment), 1.0 - self.beta2)
        update.store(update.named(self.state_name), moment)
        return moment


class AdaMuonEO(SecondMoment):
    """emerging-optimizers' ``adamuon``: V <- EMA(O^2), O / (sqrt(V) + eps), elementwise."""

    name = "adamuon_eo"

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Create V, of the weight's shape."""
        if self.state_name not in state:
            state[self.state_name] = torch.zeros_like(param, dtype=own_dtype(param.dtype))

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Divide each element by the root of its second moment."""
        for update in matrices.updates:
            work = update.direction.square()
            moments, squares = update.pairs(update.named(self.state_name), work)
            if moments:
                values = [x.to(v.dtype) for v, x in zip(moments, squares, strict=True)]
                torch._foreach_lerp_(moments, values, 1.0 - self.beta2)
                torch._foreach_copy_(squares, moments)
            update.direction.div_(work.sqrt_().add_(self.eps))
        return super().adapt(matrices)


class AdaMuon(AdaMuonEO):
    """AdaMuon (arXiv 2507.11005): O = NS(sign(u)), divided like Adam's, with the RMS of an orthogonal matrix."""

    name = "adamuon"

    def transform(self, batches: Sequence[torch.Tensor]) -> None:
        """Replace the momentum by its sign."""
        for batch in batches:
            signs_(batch)

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Divide as ``adamuon_eo`` does, then scale to the norm sqrt(min(m, n)) of a semi-orthogonal matrix."""
        adapted = super().adapt(matrices)
        for update, norm in zip(matrices.updates, matrices.norms(adapted), strict=True):
            update.direction.mul_(min(update.rows, update.columns) ** 0.5 / norm.clamp_min_(self.eps))
        return adapted


class NorMuon(SecondMoment):
    """NorMuon (arXiv 2510.05491): v <- EMA(mean of O^2 over a row), O / sqrt(v), at the norm of O."""

    name = "normuon"
    state_name = "normuon_moment2"

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Divide each row by the root of its second moment, and keep the norm of the matrix."""
        updates = matrices.updates
        squares = matrices.row_squares([update.direction for update in updates])
        moments = [self._average(u, total / u.columns) for u, total in zip(updates, squares, strict=True)]
        factors = [moment.clamp_min_(self.eps).rsqrt_() for moment in moments]
        # The norm of O, and what it is after its rows are multiplied by the factors, follow from those of its rows.
        rows = [total.sqrt_() for total in squares]
        norms = matrices.norms_over_rows([*rows, *(x * factor for x, factor in zip(rows, factors, strict=True))])
        before, after = norms[: len(updates)], norms[len(updates) :]
        for update, factor, norm, new in zip(updates, factors, before, after, strict=True):
            update.direction.mul_(factor.mul_(norm / new.clamp_min_(self.eps)))
        return super().adapt(matrices)


class NAMO(SecondMoment):
    """NAMO (arXiv 2602.17080): alpha O with alpha = |u| / (sqrt(v) + eps), v <- EMA(|G|^2), Frobenius norms.

    eps is in units of |u|, so that alpha, too, does not depend on the scale of gradients; it is 1 / eps at most.
    """

    name = "namo"
    state_name = "namo_root"  # of v, which would overflow in float32 for gradients of norm 1.8e19

    def check(self, config: MuonConfig) -> None:
        """Warn of a second moment that fades faster than the momentum."""
        if config.momentum**2 > self.beta2:
            warnings.warn(
                f"NAMO with momentum {config.momentum:g} and beta2 {self.beta2:g}: where a weight gets no gradients "
                "for long (an expert without tokens), its second moment fades faster than its momentum, and updates "
                "grow. Give a beta2 above the momentum's square.",
                stacklevel=4,
            )

    def init_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Create the root of v, from v itself where a ``state_dict()`` of older versions has it."""
        if "namo_moment2" in state:
            state[self.state_name] = state.pop("namo_moment2").sqrt()
        super().init_state(param, state)

    def missing(self, state: Mapping[str, Any]) -> str:
        """See :class:`SecondMoment`."""
        return "" if "namo_moment2" in state else super().missing(state)

    def adapt(self, matrices: Matrices) -> list[torch.Tensor]:
        """Scale each matrix by alpha, which is near 1 where gradients agree and small where they are mostly noise."""
        updates = matrices.updates
        mixes = [row_norms(update.mix(), wide=True) for update in updates]
        grads = [update.gradient_norms() for update in updates]
        norms = matrices.norms([*mixes, *grads], wide=True)
        for update, mix, grad in zip(updates, norms[: len(updates)], norms[len(updates) :], strict=True):
            root = update.gather(update.named(self.state_name)).double()
            root = root.square_().lerp_(grad.square_().to(root.dtype).expand_as(root), 1.0 - self.beta2).sqrt_()
            update.store(update.named(self.state_name), root)
            root.add_(mix, alpha=self.eps)  # 0 where O is
            update.direction.mul_(torch.where(root > 0, mix / root, 0.0).to(update.direction.dtype))
        return super().adapt(matrices)

"""Momentum that has only faded since gradients stopped is forgotten.

An update is of one size, however small the momentum is. So what is left of a weight's last gradients would move it on
in one direction, at full size, until float32 has no smaller numbers: for some 1,600 steps at a momentum of 0.95, of an
expert without tokens. How small the momentum is does not tell, since all gradients may be small, as those that a global
clip scales down. Against its own history it does: each row of a weight has a peak, that of its largest entry, which
falls by half as many digits in a step as momentum without gradients does. Where the momentum is below a thousandth of
the peak, gradients have been zero, or less than 1e-6 of what they were, for 270 steps or more at 0.95 (1,400 at 0.99).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.engine.plan import Piece
from megatron_muon.engine.shards import Shard
from megatron_muon.optimizers.handled import STEP
from megatron_muon.optimizers.param_step import rows_of
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.optimizers.storage import momentum_of, opened_in_turn
from megatron_muon.routing.layout import MatrixLayout, layout_of

PEAK = "momentum_peak"
"""State: the peak of each row of the momentum, (..., rows, 1); 0 where nothing is known."""

EVERY = 64
"""Between how many updates of a weight its momentum is looked at."""

_FADED = 1e-3


def forget_faded(
    states: Sequence[tuple[torch.Tensor, dict[str, Any]]],
    momentum: float,
    shard_of: Callable[[torch.Tensor], Shard | None],
) -> None:
    """Set the rows of momentum that have only faded, and their peaks, to zero: of weights whose turn it is.

    Nothing is read on the host. Ranks that divide columns share the largest entries of rows, by one all-reduce.

    Args:
        states: weights of one param group that are to be updated now, each with its state.
        momentum: decay of the momentum.
        shard_of: tells which shard a weight is.
    """
    known = [(param, state) for param, state in states if PEAK in state and state[STEP] % EVERY == 0 < state[STEP]]
    known = [(param, state) for param, state in known if param.numel() or shard_of(param) is not None]
    largest = [_largest(layout_of(param), state) for param, state in known]
    divided = defaultdict(list)
    for index, (param, _) in enumerate(known):
        shard = shard_of(param)
        if shard is not None and shard.dim == -1:
            divided[shard.group].append((index, shard.piece if shard.is_grid else None, shard))
    for group, its in divided.items():
        wide = [_with_others(largest[index], piece, shard) for index, piece, shard in its]
        together = torch.cat([each.view(-1) for each in wide])
        dist.all_reduce(together, dist.ReduceOp.MAX, group)
        for (index, piece, _), part in zip(its, together.split([each.numel() for each in wide]), strict=True):
            rows = slice(None) if piece is None else slice(*piece.rows)
            largest[index] = part.view(*largest[index].shape[:-2], -1, 1)[..., rows, :]
    for (param, state), now in zip(known, largest, strict=True):
        _forget(param, state, now, momentum)


def _with_others(largest: torch.Tensor, piece: Piece | None, shard: Shard) -> torch.Tensor:
    """With zeros for the rows of other ranks, where they divide rows, too."""
    if piece is None:
        return largest
    wide = largest.new_zeros((*largest.shape[:-2], max(each.rows[1] for each in shard.pieces), 1))
    wide[..., slice(*piece.rows), :] = largest
    return wide


def _largest(layout: MatrixLayout, state: dict[str, Any]) -> torch.Tensor:
    """The largest entry of each row of a weight's momentum, in the shape of its peaks."""
    kept = momentum_of(state)
    found = torch.empty_like(state[PEAK], dtype=own_dtype(kept.planes[0].dtype))
    if not kept.planes[0].numel():
        return found.zero_()  # of a rank that has no part of the weight

    def cut(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [layout.seen(tensor) for tensor in tensors]

    for numbers, take in opened_in_turn([kept], cut, writes=False):
        for rows, largest in zip(numbers, take(cut([found])), strict=True):
            torch.linalg.vector_norm(rows, torch.inf, -1, keepdim=True, dtype=found.dtype, out=largest)
    return found


def _forget(param: torch.Tensor, state: dict[str, Any], largest: torch.Tensor, momentum: float) -> None:
    """Of one weight."""
    layouts, kept, stays = [layout_of(param)], momentum_of(state), []
    for peak, now in zip(rows_of([state[PEAK]], layouts), rows_of([largest], layouts), strict=True):
        torch.maximum(now, peak.mul_(momentum ** (EVERY / 2)), out=peak)
        stays.append(~(now < _FADED * peak))  # NaN stays: it must show
        peak.mul_(stays[-1])
    for numbers, take in opened_in_turn([kept], lambda planes: rows_of(planes, layouts)):
        torch._foreach_mul_(numbers, take(stays))

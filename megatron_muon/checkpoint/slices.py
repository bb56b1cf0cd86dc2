"""Weights whose state lies in slices on several ranks, put together on the one that saves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_muon.checkpoint.held import Held

__all__ = ["gathered", "scatter"]


def gathered(held: Sequence[Held]) -> list[dict[str, torch.Tensor]]:
    """The state of each weight, whole, on the rank that saves it; empty elsewhere.

    Only slices of weights that several ranks share are sent, one weight after the other, to the rank that has most of
    it. All ranks of the groups must call this with weights in the same order.

    Args:
        held: from :func:`megatron_muon.checkpoint.held.held_by`.
    """
    return [_gather(each) if each.slices else each.tensors for each in held]


def _gather(held: Held) -> dict[str, torch.Tensor]:
    slices, mine = held.slices, held.tensors
    assert slices is not None
    holders = slices.holders
    if holders == [slices.rank]:
        return {name: tensor.reshape(held.param.shape) for name, tensor in mine.items()}
    if slices.rank not in holders:
        return {}
    receives = slices.rank == slices.owner
    whole: dict[str, torch.Tensor] = {}
    work: list[dist.P2POp] = []
    owner = dist.get_global_rank(slices.group, slices.owner)
    for name in sorted(mine):
        if not receives:
            work.append(dist.P2POp(dist.isend, mine[name].contiguous(), owner, slices.group))
            continue
        flat = whole[name] = mine[name].new_empty(held.param.numel())
        start, stop = slices.mine
        flat[start:stop].copy_(mine[name].reshape(-1))
        for rank in holders:
            if rank != slices.rank:
                part = flat[slice(*slices.spans[rank])]
                work.append(dist.P2POp(dist.irecv, part, dist.get_global_rank(slices.group, rank), slices.group))
    for request in dist.batch_isend_irecv(work):
        request.wait()
    return {name: tensor.reshape(held.param.shape) for name, tensor in whole.items()}


def scatter(held: Held, name: str, whole: torch.Tensor) -> None:
    """Write this rank's elements of a state.

    Args:
        held: the weight.
        name: of the state.
        whole: of the weight's shape, or of the state's where it is whole on this rank.
    """
    target = held.tensors[name]
    if held.slices is not None:
        start, stop = held.slices.mine
        whole = whole.reshape(-1)[start:stop]
    if whole.data_ptr() != target.data_ptr():
        target.copy_(whole.reshape(target.shape))

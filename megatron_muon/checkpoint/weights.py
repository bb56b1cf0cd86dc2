"""Sums of the bits of the model's own tensors: its weights, and the buffers that it saves beside them.

The model describes them as it describes state (:mod:`megatron_muon.checkpoint.sharding`): each part that is no copy of
another rank's counts once, whatever the layout, so that sums do not depend on it. What is read is compared before the
model takes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import raise_together
from megatron_muon.checkpoint.fingerprint import added, fingerprints
from megatron_muon.checkpoint.keys import name_of
from megatron_muon.checkpoint.sharding import tensors_of
from megatron_muon.checkpoint.stored import Stored

__all__ = ["check", "described", "sums_of"]

Where = tuple[Any, ...]
Described = dict[Where, ShardedTensor | ShardedTensorFactory]


def described(state: Any) -> Described:
    """The description of every tensor, by its place in nested dictionaries and lists.

    Copies: Megatron-Core's loading changes the originals. What its fully parallel strategies have changed is left out:
    replica numbers there tell who reads or writes a tensor, no longer which are copies.
    """
    return {
        path: copy.copy(leaf)
        for path, leaf in _leaves(state, ())
        if _is_plain(leaf.data) and isinstance(leaf.replica_id, tuple)
    }


def _leaves(state: Any, path: Where) -> Iterator[tuple[Where, Any]]:
    if isinstance(state, (ShardedTensor, ShardedTensorFactory)):
        yield path, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(state, (list, tuple)):
        for number, value in enumerate(state):
            yield from _leaves(value, (*path, number))


def _is_plain(data: Any) -> bool:
    """Quantized weights are classes of their own; what is stored of them are other numbers."""
    return type(data) in (torch.Tensor, torch.nn.Parameter)


def sums_of(tensors: Described, counts: Callable[[ShardedTensor], bool] = lambda part: True) -> dict[str, int]:
    """This rank's share of the sums.

    Args:
        tensors: from :func:`described`.
        counts: which parts do, of those that are no copies.

    Returns:
        the model's key, with the index of layer and expert, -> a number in [0, 2**64); those of the ranks are to be
        added up.
    """
    parts = [part for part in tensors_of(tensors.values()) if is_main_replica(part.replica_id) and counts(part)]
    names = [name_of(part.key, part.global_offset[: part.prepend_axis_num]) for part in parts]
    return added(zip(names, fingerprints(part.data for part in parts), strict=True))


def check(ranks: Ranks, tensors: Described, loaded: Any, stored: Stored) -> None:
    """Compare what was read with what was saved.

    Tensors that the checkpoint has in another shape (the padding of a vocabulary) or in other numbers are left out.

    Args:
        ranks: of the model; all of them must call this, under :meth:`Ranks.together`.
        tensors: the descriptions of what was asked for, from before it was read.
        loaded: what ``dist_checkpointing.load`` returned.
        stored: the checkpoint's contents.

    Raises:
        CheckpointError: on all ranks, if a tensor is not what was saved.
    """
    saved = None if stored.record is None else stored.record.model
    if not saved:
        return
    read = {
        path: _with_data(base, content) for path, base in tensors.items() if (content := _at(loaded, path)) is not None
    }

    def counts(part: ShardedTensor) -> bool:
        return stored.shapes.get(part.key) == (tuple(part.global_shape), part.data.dtype)

    totals = added(share for sums in ranks.gather(lambda: sums_of(read, counts)) for share in sums.items())
    raise_together(
        ranks,
        [f"weight {name}" for name, value in totals.items() if saved.get(name, value) != value],
        f"{stored.folder} is damaged: what was read is not what was saved:",
        "Load an earlier checkpoint (--ckpt-step), and check the storage.",
    )


def _at(state: Any, path: Where) -> torch.Tensor | None:
    """The tensor at a place; None if there is none, or none whose bits can be summed."""
    for key in path:
        try:
            state = state[key]
        except (KeyError, IndexError, TypeError):
            return None
    return state if _is_plain(state) else None


def _with_data(base: ShardedTensor | ShardedTensorFactory, data: torch.Tensor) -> ShardedTensor | ShardedTensorFactory:
    found = copy.copy(base)
    found.data = data
    return found

"""Sums of what is saved: of the model's own tensors, its weights and the buffers beside them, and of the state of each.

Both are described in the same way (:mod:`megatron_muon.checkpoint.sharding`): each part that is no copy of another
rank's counts once, whatever the layout, so that sums do not depend on it. What is read is compared before it is used,
and so are copies of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import raise_together
from megatron_muon.checkpoint.fingerprint import added, fingerprints, fits
from megatron_muon.checkpoint.keys import name_of
from megatron_muon.checkpoint.param_state import ParamState
from megatron_muon.checkpoint.record import WEIGHT, Record, Sums
from megatron_muon.checkpoint.sharding import tensors_of
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.routing.predicate import is_expert_parallel

Where = tuple[Any, ...]
Described = dict[Where, ShardedTensor | ShardedTensorFactory]

CountedShard = tuple[tuple[str, str], ShardedTensor, int]
"""What a sum is known by; a shard; and how many axes of layers and experts come first in its global tensor."""


def described(state: Any) -> Described:
    """The description of every tensor, by its place in nested dictionaries and lists.

    Copies: Megatron-Core's loading changes the originals. What its fully parallel strategies have changed is left out:
    replica numbers there tell who reads or writes a tensor, no longer which are copies.
    """
    return {
        path: copy.copy(leaf)
        for path, leaf in _leaves(state, ())
        if is_plain(leaf.data) and isinstance(leaf.replica_id, tuple)
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


def is_plain(data: Any) -> bool:
    """Whether it has bits of its own; quantized weights are classes that have other tensors in them."""
    return isinstance(data, torch.Tensor) and type(data.data) is torch.Tensor


def sums_of(tensors: Described, counts: Callable[[ShardedTensor], bool] = lambda part: True) -> Sums:
    """This rank's share of the sums of the model's tensors: of parts that are no copies, and that ``counts`` takes."""
    return sums_of_parts(
        ((name_of(part.key, part.global_offset[: part.prepend_axis_num]), WEIGHT), part, part.prepend_axis_num)
        for part in filter(counts, tensors_of(tensors.values()))
    )


def sums_of_parts(shares: Iterable[CountedShard], device: torch.device | None = None) -> Sums:
    """This rank's part of the sums of these; copies do not count.

    They are taken on ``device``, one part after the other, or where each is: copies for a checkpoint are on the host.
    """
    mine = [share for share in shares if is_main_replica(share[1].replica_id)]
    own = [part.global_offset[depth:] for _, part, depth in mine]
    parts = zip(mine, own, strict=True)
    tensors = (part.data.reshape(part.local_shape[-len(at) :]).to(device) for (_, part, _), at in parts)
    return added(zip((key for key, _, _ in mine), fingerprints(tensors, own), strict=True))


def compare(ranks: Ranks, folder: str, record: Record, mine: Sums) -> None:
    """Compare sums of what was read with those of what was saved, on the first rank; ``mine`` is this rank's share.

    All ranks of the model must call this, under :meth:`Ranks.together`.

    Raises:
        CheckpointError: on all ranks, if a tensor is not what was saved.
    """
    totals = added(share for shares in ranks.to_first(lambda: mine) or () for share in shares.items())
    raise_together(
        ranks,
        [f"{kind} of {name}" for (name, kind), value in totals.items() if not fits(record.sum_of(name, kind), value)],
        f"{folder} is damaged: what was read is not what was saved:",
        "Load an earlier checkpoint (--ckpt-step), and check the storage.",
    )


def check(ranks: Ranks, tensors: Described, loaded: Any, stored: Stored, others: Collection[str] = ()) -> None:
    """Compare what was read with what was saved: ``tensors`` are the descriptions of what was asked for, from before.

    Tensors that the checkpoint has in another shape (the padding of a vocabulary) or in other numbers are left out, and
    ``others``, which are not the model's. All of its ranks must call this, under :meth:`Ranks.together`.

    Raises:
        CheckpointError: on all ranks, if a tensor is not what was saved.
    """
    if stored.record is None or not stored.record.model:
        return
    read = {
        path: _with_data(base, content) for path, base in tensors.items() if (content := _at(loaded, path)) is not None
    }

    def counts(part: ShardedTensor) -> bool:
        if name_of(part.key, part.global_offset[: part.prepend_axis_num]) in others:
            return False
        return stored.shapes.get(part.key) == (tuple(part.global_shape), part.data.dtype)

    compare(ranks, stored.folder, stored.record, sums_of(read, counts))


def _at(state: Any, path: Where) -> torch.Tensor | None:
    """The tensor at a place; None if there is none, or none whose bits can be summed."""
    for key in path:
        try:
            state = state[key]
        except (KeyError, IndexError, TypeError):
            return None
    return state if is_plain(state) else None


def _with_data(base: ShardedTensor | ShardedTensorFactory, data: torch.Tensor) -> ShardedTensor | ShardedTensorFactory:
    found = copy.copy(base)
    found.data = data
    return found


def check_copies(ranks: Ranks, chunks: Iterable[torch.nn.Module], held: Sequence[ParamState], groups: Any) -> None:
    """After loading, copies of a weight and of its state must be the same bit for bit on data-parallel ranks.

    All ranks of the model must call this, under :meth:`Ranks.together`.

    Raises:
        CheckpointError: on all ranks, if copies differ.
    """
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    names = {id(param): name for name, param in named}
    checked: list[tuple[str, torch.nn.Parameter, torch.Tensor]] = [(name, param, param.data) for name, param in named]
    for each in held:
        if each.slices is None and not each.owned:
            name = names.get(id(each.param), "a weight")
            checked += [(f"{state} of {name}", each.param, tensor) for state, tensor in sorted(each.tensors.items())]
    sums: list[tuple[list[str], list[int], Any]] = []
    for experts, group_name in ((False, "dp_cp"), (True, "expt_dp")):
        group = getattr(groups, group_name, None)
        mine = [entry for entry in checked if is_expert_parallel(entry[1]) == experts]
        if group is not None and group.size() > 1 and mine:
            sums.append(
                ([name for name, _, _ in mine], fingerprints(_comparable(tensor) for _, _, tensor in mine), group)
            )
    ranks.together(lambda: None)  # whoever has failed so far must not be missed in what follows
    different = [name for names, values, group in sums for name in _different(names, values, Ranks((group,)))]
    raise_together(
        ranks,
        different,
        "The checkpoint is loaded, but these are not the same on all data-parallel ranks:",
        "A rank has read something else than the others. Start again; if it happens again, check the storage.",
    )


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """What is compared.

    A quantized weight is a class that has other tensors in it, some of them caches: the numbers that it stands for.
    Those of TransformerEngine's ``GroupedTensor`` of experts are the result of any operation. Of any other class, such
    as the shards of a ``DTensor``, nothing: whether ranks have the same is not known.
    """
    if is_plain(tensor):
        return tensor
    if type(tensor).dequantize is not torch.Tensor.dequantize:
        return tensor.dequantize()
    return tensor + 0 if type(tensor).__name__ == "GroupedTensor" else torch.empty(0)


def _different(names: Sequence[str], values: list[int], copies: Ranks) -> list[str]:
    everywhere = zip(*copies.gather(lambda: values), strict=True)
    return [name for name, found in zip(names, everywhere, strict=True) if len(set(found)) > 1]

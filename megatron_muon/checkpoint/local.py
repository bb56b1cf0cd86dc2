"""Local checkpoints, of which each rank has what it saved itself, in a file or in memory (Megatron-Core's
``MCoreTensorAwareStateDict``): without a folder or an index that all could look at.

A rank finds there what it would save now: they are read at the layout that saved them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import raise_together
from megatron_muon.checkpoint.record import Record
from megatron_muon.checkpoint.sharding import noted, tensors_of
from megatron_muon.checkpoint.stored import Stored, records_in

WAY_OUT = (
    "A local checkpoint is read with the flags of the run that saved it. Give those, or leave "
    "--non-persistent-ckpt-type away: a persistent checkpoint (--load) is read at every layout, by every optimizer."
)


def contents(saved: Any, ranks: Sequence[Ranks]) -> Stored:
    """What a rank has of a local checkpoint (Megatron-Core's ``MCoreTensorAwareStateDict``); ``ranks`` as of
    :meth:`Stored.read`.
    """
    folder = name_of(saved)
    shapes = {part.key: (tuple(part.global_shape), part.dtype) for part in _parts(saved, ShardedTensor)}
    objects = {part.key: part.data for part in _parts(saved, ShardedObject)}
    found: list[Record] = []
    for each in ranks:
        found = each.from_first(lambda: records_in(folder, saved.common, lambda keys: [objects[key] for key in keys]))
    record = Record.joined(found) if len(found) > 1 else next(iter(found), None)
    return Stored(folder, shapes, saved.common, record, False, tuple(found))


def name_of(saved: Any) -> str:
    """What it is called in messages."""
    return f"the local checkpoint of iteration {saved.common.get('iteration')}"


def check_parts(ranks: Ranks, asked: Any, saved: Any, shared: bool) -> None:
    """Each rank has saved what it asks for; all of the model must call this, under :meth:`Ranks.together`.

    If they are ``shared`` (``fully_parallel``), the parts that are read here may lie on other ranks. Who has which
    follows from what all ask for, so it must be what they saved.

    Raises:
        CheckpointError: on all ranks, if a part is missing on one.
    """
    there = {_place(part): part for part in _parts(saved, ShardedTensor)}
    mine = {_place(part): part for part in tensors_of(noted(asked))}
    problems = [f"{part.key} at {part.global_offset}: not saved by this rank" for part in _without(mine, there)]
    if shared:
        problems += [f"{part.key} at {part.global_offset}: saved, not asked for" for part in _without(there, mine)]
    else:
        problems += [
            f"{there[place].key}: saved on another rank alone (--non-persistent-local-ckpt-algo fully_parallel)"
            for place in mine.keys() & there.keys()
            if there[place].data is None
        ]
    objects = {(part.key, part.global_offset, part.global_shape) for part in _parts(saved, ShardedObject)}
    problems += [
        f"{part.key}: not saved by this rank"
        for part in nested_values(asked)
        if isinstance(part, ShardedObject) and (part.key, part.global_offset, part.global_shape) not in objects
    ]
    raise_together(ranks, problems, f"{name_of(saved)} cannot be read:", WAY_OUT)


def _parts[T](saved: Any, kind: type[T]) -> list[T]:
    return [part for part in nested_values(saved.sharded_state_dict) if isinstance(part, kind)]


def _place(part: ShardedTensor) -> tuple[Any, ...]:
    return (part.key, part.global_offset, part.global_shape, part.local_shape, part.dtype)


def _without[Key](parts: Mapping[Key, Any], others: Mapping[Key, Any]) -> Iterable[Any]:
    return [part for place, part in parts.items() if place not in others]

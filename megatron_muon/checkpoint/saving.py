"""Save the state of Megatron-Core's optimizers in the space of the model's weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint import record as records
from megatron_muon.checkpoint import weights as model_weights
from megatron_muon.checkpoint.keys import ALONE, PREFIX, name_of
from megatron_muon.checkpoint.param_state import ParamState
from megatron_muon.checkpoint.record import RECORD, RankRecord, Record, Recorder, Rule, Sums, WeightRecord, layout_text
from megatron_muon.checkpoint.sharding import Place, places_of
from megatron_muon.checkpoint.shards import Replica
from megatron_muon.checkpoint.weights import CountedShard, sums_of_parts
from megatron_muon.optimizers.handled import STEP
from megatron_muon.routing.layout import layout_of

WEIGHTS, OBJECT = "weights", "record"
"""In an optimizer's sharded state: what is saved of its weights, and its record, which only the first rank has."""


@dataclass(frozen=True)
class Model:
    """What places of weights are found by, see :func:`megatron_muon.checkpoint.sharding.places_of`."""

    state: Any  # its sharded state, with the parameters themselves in it
    again: Callable[[], Any]  # asks for it once more
    names: Mapping[torch.nn.Parameter, str]  # of weights on this rank

    def places(self, held: Sequence[ParamState]) -> list[Place]:
        """Of the weights of this rank."""
        return places_of([each.param for each in held], self.state, self.again, self.names)


def saved_state(ranks: Ranks, held: Sequence[ParamState], model: Model, recorder: Recorder) -> dict[str, Any]:
    """The state of an optimizer for ``dist_checkpointing.save``; ``recorder`` is the same at every save.

    All ranks of the model must call this, under :meth:`Ranks.together`, with all of their state created.

    Raises:
        CheckpointError: for a weight or a state that has no place in the model's tensors.
    """
    places = model.places(held)
    shares = (each for pair in zip(held, places, strict=True) for each in sums_in(*pair))
    sums = sums_of_parts(shares, device_of(held))
    sums |= model_weights.sums_of(model_weights.described(model.state))
    record = _record(recorder, ranks, held, places, sums)
    weights: dict[str, Any] = {}
    for each, place in zip(held, places, strict=True):
        each.keep_apart()
        for state, parts in described(each, place, recorder.alone).items():
            weights.setdefault(place.name, {})[state] = dict(enumerate(parts))
    whole = None if record is None else record.to_plain()
    return {
        RECORD: records.note([recorder.key]),
        OBJECT: ShardedObject(recorder.key, whole, (1,), (0,), 0 if ranks.is_first else 1),
        WEIGHTS: or_local(weights),
    }


def described(
    held: ParamState, place: Place, alone: Collection[tuple[str, str]] = ()
) -> dict[str, list[ShardedTensor]]:
    """What this rank has of each state of a weight, where it lies; those of replica (0, 0, 0) are saved.

    Of a (state, key) in ``alone`` not all weights of a tensor have the state: it has a key of its own.
    """
    found = {}
    for state, tensor in held.saved.items():
        mark = ALONE if (state, place.key) in alone else ""
        found[state] = place.sharded(f"{PREFIX}.{state}{mark}", tensor, replica_of(held, place), held.span)
    return found


def device_of(held: Sequence[ParamState]) -> torch.device | None:
    """Where this rank has its weights."""
    return held[0].param.device if held else None


def or_local(weights: dict[str, Any]) -> Any:
    """What is read or saved of weights. Empty containers would be stored, and lost, as plain data."""
    return weights or LocalNonpersistentObject({})


def replica_of(held: ParamState, place: Place) -> Replica:
    """(pipeline, tensor, data) rank among those that have the same of its state; zeros for the one that saves it."""
    pipeline, shard, data = place.replica
    return (pipeline, shard, 0 if held.owned or held.slices else data)


def rule_of(held: ParamState) -> Rule:
    """The rule by which an optimizer updates a weight."""
    layout = layout_text(layout_of(held.param)) if hasattr(held.inner, "checkpoint_rule") else ""
    return Rule(held.rule, layout, tuple(sorted(held.states)))


def _record(
    recorder: Recorder, ranks: Ranks, held: Sequence[ParamState], places: Sequence[Place], sums: Sums
) -> Record | None:
    """The record of the optimizer, on the first rank; None on others."""
    saved = [
        (each, place)
        for each, place in zip(held, places, strict=True)
        if each.key is not None and replica_of(each, place) == (0, 0, 0)
    ]
    keys = tuple((sys.intern(name), kind) for name, kind in sums)  # each name is sent once
    return recorder.join(ranks, RankRecord(tuple(_weight_records(saved)), keys), _step(held), sums.values())


def _weight_records(saved: Iterable[tuple[ParamState, Place]]) -> Iterator[WeightRecord]:
    """What does not depend on contents; the rules and numbers of weights that have the same are one object."""
    rules: dict[Rule, Rule] = {}
    numbers: dict[tuple[int, Any], tuple[tuple[str, Any], ...]] = {}
    for each, place in saved:
        rule = rule_of(each)
        rule = rules.setdefault(rule, rule)
        kind = id(each.group), each.key is not None and layout_of(each.key).budget
        if kind not in numbers:
            numbers[kind] = records.numbers_of(each.numbers)
        for key, index in place.members.values():
            yield WeightRecord(sys.intern(key), index, place.siblings, rule, numbers[kind])


def sums_in(held: ParamState, place: Place, one_of_all: bool = False) -> Iterator[CountedShard]:
    """What of a weight's state is stored under keys of their own, as if all weights of a tensor had it.

    Form 1 of the record has it by the name of the weight (``one_of_all``), experts of a stack by their own.
    """
    depth = len(place.index)
    for state, parts in described(held, place).items():
        for part in parts:
            name = name_of(part.key.removeprefix(f"{PREFIX}.{state}."), part.global_offset[:depth])
            yield (place.name if one_of_all and len(place.members) == 1 else name, state), part, depth


def _step(held: Sequence[ParamState]) -> int:
    found = [0]
    for each in held:
        if each.key is not None:
            found += [int(its.get(STEP, 0)) for its in (each.inner.state[each.key], each.group)]
    return max(found)

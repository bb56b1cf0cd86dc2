"""Names of the optimizer's tensors in checkpoints, ours and Megatron-Core's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

PREFIX = "optimizer.state"
"""Before the names of states in keys."""

RECORD_KEY = "megatron_muon.record."
"""Before the name of a weight, in the key of the record of the optimizer that has it."""

ALONE = "@"
"""Marks a state that not all layers (experts) in the model's tensor have."""

_CHAIN = re.compile(r"chained_\d+\.")
_BUCKET = "optimizer.distributed.dp_group_idx_"
_BUCKET_PARTS = re.compile(
    rf"(?:{_CHAIN.pattern})?{re.escape(_BUCKET)}(\d+)\.gbuf_idx_(\d+)\..*\.bucket_idx_(\d+)\.([^.]+)$"
)
_STATE = re.compile(rf"({_CHAIN.pattern})?{re.escape(PREFIX)}\.([^.]+)\.(.+)$")


class StateKey(NamedTuple):
    """The parts of a key such as ``chained_0.optimizer.state.momentum_buffer.decoder.layers.mlp.linear_fc1.weight``.

    Attributes:
        chain: Megatron-Core's number of the optimizer in a chain, with a dot at its end; mostly empty.
        state: ``momentum_buffer``, ``exp_avg``, ``fp32_param``...
        weight: the model's key, and :data:`ALONE` with an index where the state has a tensor of its own.
    """

    chain: str
    state: str
    weight: str


class BucketKey(NamedTuple):
    """What the key of a bucket of the distributed optimizer says, whatever chain it is in."""

    domain: int  # number of the model-parallel domain
    buffer: int  # number of the buffer
    number: int  # of the bucket in it
    state: str  # ``param``, ``exp_avg``, ``exp_avg_sq``


def name_of(key: str, index: Iterable[int]) -> str:
    """The name of a weight: the model's key, and the layer (expert...) where a tensor of that key holds several."""
    where = ",".join(map(str, index))
    return f"{key}[{where}]" if where else key


def state_key(source: str, key: str, index: Iterable[int]) -> str:
    """The key of a state of the model's tensor ``key``.

    Args:
        source: what precedes the model's key (``optimizer.state.momentum_buffer``); with :data:`ALONE` at its end, this
            layer (expert...) has a tensor of its own.
        key: the model's.
        index: of the layer.
    """
    if not source.endswith(ALONE):
        return f"{source}.{key}"
    return f"{source.removesuffix(ALONE)}.{key}{ALONE}{'.'.join(map(str, index))}"


def parse_state(key: str) -> StateKey | None:
    """The parts of a key; None for what is no state in the space of the model's weights."""
    found = _STATE.match(key)
    return None if found is None else StateKey(found.group(1) or "", found.group(2), found.group(3))


def without_chain(key: str) -> str:
    """The key of a state as an optimizer saves it that is in no chain; other keys as they are."""
    found = parse_state(key)
    return key if found is None else key.removeprefix(found.chain)


def is_bucket(key: str) -> bool:
    """Whether the tensor is a bucket of the distributed optimizer."""
    return _BUCKET in key


def parse_bucket(key: str) -> BucketKey | None:
    """The parts of the key of a bucket of the distributed optimizer; None for other keys."""
    found = _BUCKET_PARTS.match(key)
    if found is None:
        return None
    domain, buffer, number, state = found.groups()
    return BucketKey(int(domain), int(buffer), int(number), state)

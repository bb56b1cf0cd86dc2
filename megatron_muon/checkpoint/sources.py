"""Which tensor of a checkpoint becomes which state.

The state of one optimizer serves another where both mean the same: Adam's first moment and Muon's momentum are moving
averages of the gradient, whatever the matrices are split into; a master weight is a master weight. Adam's second moment
has no source in Muon; it is estimated from the momentum, which is the average of noise if the learning rate is small:
for an average with decay b, E[m^2] = (1 - b) / (1 + b) E[g^2].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_muon.checkpoint.param_state import MASTER, Bucket, ParamState
from megatron_muon.checkpoint.record import Rule
from megatron_muon.checkpoint.sharding import Place
from megatron_muon.checkpoint.shards import Replica
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.optimizers.adaptive import NAMO
from megatron_muon.optimizers.fading import PEAK
from megatron_muon.optimizers.sizes import RADIUS as BALL_RADIUS
from megatron_muon.optimizers.sphere import LEFT, MULTIPLIER, RADIUS

_ALTERNATIVES = {
    MASTER: (MASTER, "param"),
    "momentum_buffer": ("momentum_buffer", "exp_avg"),
    "exp_avg": ("exp_avg", "momentum_buffer"),
}
"""State -> names under which the same may be stored."""

MODEL = "the model's weight"
"""Where a master weight comes from if the checkpoint has none (float32 runs have none)."""

_SAME = {MASTER: (MASTER, "param", MODEL)}
"""Names that mean the same rule."""

ESTIMATED = "exp_avg_sq"

_WARM_STARTS = (LEFT, MULTIPLIER)
"""Where iterations go on from: without them they start anew, and find the same."""

_OF_MATRICES = (*_WARM_STARTS, RADIUS, BALL_RADIUS, NAMO.state_name)
"""What is one matrix's: of no use to the matrices that another split makes of the weight."""


@dataclass(frozen=True)
class Choice:
    """Where a state comes from.

    Attributes:
        state: name.
        stored_as: the name that it has in the checkpoint, without prefixes, or :data:`MODEL`; None if there is nothing.
        parts: what to read, see :meth:`Place.sharded`.
        targets: of each part, the memory of the state that it is read into.
    """

    state: str
    stored_as: str | None
    parts: tuple[ShardedTensor, ...] = ()
    targets: tuple[torch.Tensor, ...] = ()

    @classmethod
    def reading(cls, state: str, stored_as: str, parts: list[ShardedTensor]) -> Choice:
        """A choice to read these parts."""
        # A loader may take the data out of the descriptions.
        return cls(state, stored_as, tuple(parts), tuple(part.data for part in parts if part.data is not None))

    @property
    def is_same(self) -> bool:
        """Whether it was this state of this rule; Megatron-Core's Muon, and older versions, have no peaks."""
        return self.state == PEAK or self.stored_as in _SAME.get(self.state, (self.state,))

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        if self.stored_as is not None:
            return f"from {self.stored_as}"
        return "from an estimate" if self.state == ESTIMATED else "begun anew"

    @property
    def is_read(self) -> bool:
        """Whether there is something to read."""
        return bool(self.parts)


def choose(
    held: ParamState,
    place: Place,
    state: str,
    replica: Replica,
    stored: Stored,
    bucket: Bucket | None = None,
    fresh: bool = False,
    regrouped: bool = False,
) -> Choice | str:
    """Find the source of a state, or say what is wrong.

    A ``fresh`` state, of a weight that had another rule, may start anew if it is not there; a ``regrouped`` weight was
    split into other matrices. The distributed optimizer that saved it may have had the weight in a bucket.

    Returns:
        the choice, or what is wrong.
    """
    if regrouped and state in _OF_MATRICES:
        return Choice(state, None)
    tensor, wrong = held.saved[state], ""
    for name, source in _sources(state, stored):
        parts = place.sharded(source, tensor, replica, held.span)
        if not all(part.key in stored.shapes for part in parts):
            continue
        different = stored.misfits(parts)
        if not different:
            if name == state and parts:
                own = held.read_as(state, stored.shapes[parts[0].key][1])
                parts = parts if own is tensor else place.sharded(source, own, replica, held.span)
            return Choice.reading(state, name, parts)
        wrong = wrong or different[0]
    if bucket is not None:
        for name in _ALTERNATIVES.get(state, (state,)):
            key = stored.bucket_key(bucket, name)
            if key is not None:
                return Choice.reading(state, name, [_slice_of_bucket(key, bucket, tensor, replica, held.span)])
    if wrong:
        return wrong
    if state == MASTER:
        return Choice(state, MODEL)
    if state in (ESTIMATED, PEAK, *_WARM_STARTS) or (fresh and state not in _ALTERNATIVES):
        return Choice(state, None)
    return f"{place.name}: there is no {state}"


def _slice_of_bucket(
    key: str, bucket: Bucket, tensor: torch.Tensor, replica: Replica, span: tuple[int, int] | None
) -> ShardedTensor:
    """What this rank has of a flattened weight in a bucket. Tensor-parallel ranks have buckets of their own."""
    flat, start = tensor.view(-1), bucket.start + (span[0] if span else 0)
    shape = tuple(flat.shape)
    return ShardedTensor(key, flat, flat.dtype, shape, (bucket.size,), (start,), None, (0, 0, replica[2]))


def _sources(state: str, stored: Stored) -> Iterator[tuple[str, str]]:
    """Names under which a state may be stored, and what precedes the model's key then."""
    for name in _ALTERNATIVES.get(state, (state,)):
        for prefix in stored.prefixes.get(name, ()):
            yield name, prefix


def gradients_to_average(decay: float) -> float:
    """The mean square of gradients of noise, divided by that of their moving average of this decay, in [0, 1).

    By it a second moment is estimated for a weight that has had none: one number for all of its elements.
    """
    return (1.0 + decay) / (1.0 - decay)


def difference(name: str, before: Rule | None, now: Rule) -> str | None:
    """What has changed for a weight since the checkpoint; None if nothing that gives its state a meaning."""
    if before is None:
        return f"{name}: not trained in the checkpoint, {now} now"
    if (before.name, before.layout) != (now.name, now.layout):
        return f"{name}: {before} in the checkpoint, {now} now"
    return None

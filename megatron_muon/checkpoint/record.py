"""What is stored beside the tensors: who updates which weight and how, with which numbers, after how many steps.

The record is plain Python data, once in the checkpoint, the same whatever layout wrote it. It is an object with a key
of its own, which other readers of the checkpoint pass by; the optimizer's plain state has a note of it. In form 1 it
had the record in place of the note.

It is put together on the first rank of the model, which alone saves it. Most of it is the same at every save, and is
sent once. What is not, sums and steps, is sent as numbers, in an order that both sides know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.keys import RECORD_KEY, name_of
from megatron_muon.routing.layout import MSIGN, SCALAR, MatrixLayout
from megatron_muon.version import __version__

RECORD = "megatron_muon"
"""Key of the note of the record, or of the record itself, in the optimizer's part of a checkpoint."""

ACCEPT = "accept"
"""The value of the option that lets a run go on with other rules than the checkpoint's."""

WEIGHT = "weight"
"""What the weight itself is called beside its states."""

_WORD = 64
"""Bits of a word; a sum is sent as two words."""

Sums = dict[tuple[str, str], int]
"""(Name, :data:`WEIGHT` or a state) -> number that depends on the contents, see :mod:`.fingerprint`."""

FORMAT = 3
"""Form 2, read as well, has no digest; form 1 has sums that do not see the order of elements, one for all parts of a
fused weight's state."""

_DIGEST = "digest"
"""Key of the digest of a record, beside its fields: a wrong step or rate in it would be taken for right."""

_PASSING = ("params", "step", "lr", "weight_decay", "is_expert_parallel")
"""Entries of param groups that the schedule or the parallel layout sets, or that are stored otherwise."""


@dataclass(frozen=True)
class Rule:
    """How a weight is updated, as far as it gives its state a meaning."""

    name: str  # ``muon``, ``adam``, ``lion``
    layout: str  # of its logical matrices, see :func:`layout_text`; empty for rules on single numbers
    states: tuple[str, ...]  # names of its state tensors
    numbers: int = 0  # index of its param group's numbers in the record

    def __str__(self) -> str:
        return self.name + (f" ({self.layout})" if self.layout else "")


@dataclass(frozen=True)
class WeightRecord:
    """One weight, from the rank that saves it."""

    key: str  # the model's key
    index: tuple[int, ...]  # in the tensor of that key
    siblings: int  # how many weights that tensor has place for
    rule: Rule  # with ``numbers`` 0
    numbers: tuple[tuple[str, Any], ...]  # of its param group

    @property
    def name(self) -> str:
        """As :attr:`megatron_muon.checkpoint.sharding.Place.name`."""
        return name_of(self.key, self.index)


@dataclass
class Record:
    """All weights.

    Attributes:
        step: updates so far.
        rules: in use.
        numbers: of param groups: rates, betas...
        weights: name -> index in ``rules``.
        alone: (state, key) of states that not all weights of a tensor have.
        sums: name of what has a key of its own, with layer and expert -> state -> number that depends on the contents.
        model: name -> such a number, for each tensor of the model itself; empty in checkpoints of versions that had
            none.
        converted: the optimizer that the checkpoint was converted for; it then fits any rules, and ``weights`` is
            empty.
        package: version that wrote it.
        version: of this form.
    """

    step: int
    rules: list[Rule]
    numbers: list[dict[str, Any]]
    weights: dict[str, int]
    alone: list[tuple[str, str]]
    sums: dict[str, dict[str, int]]
    model: dict[str, int] = field(default_factory=dict)
    converted: str = ""
    package: str = __version__
    version: int = FORMAT

    def rule(self, name: str) -> Rule | None:
        """Of a weight; None if it was not trained."""
        index = self.weights.get(name)
        return None if index is None else self.rules[index]

    def sum_of(self, name: str, kind: str) -> int | None:
        """Of a state, or of the weight itself, when it was saved; None if there was none."""
        return self.model.get(name) if kind == WEIGHT else self.sums.get(name, {}).get(kind)

    def to_plain(self) -> dict[str, Any]:
        """Lists, dictionaries, numbers and strings only."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plain["rules"] = [{**vars(rule), "states": list(rule.states)} for rule in self.rules]
        plain["alone"] = [list(pair) for pair in self.alone]
        return {**plain, _DIGEST: _digest(plain)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`to_plain`.

        Raises:
            ValueError: for a form that this version does not know, or if anything in it is not what was saved.
        """
        check_version(plain)
        values = dict(plain)
        digest = values.pop(_DIGEST, None)
        if (digest is not None or plain["version"] >= 3) and digest != _digest(values):
            raise ValueError("the record of its optimizer state is not what was saved")
        values["rules"] = [Rule(**{**rule, "states": tuple(rule["states"])}) for rule in plain["rules"]]
        values["alone"] = [(state, key) for state, key in plain["alone"]]
        return cls(**values)

    @classmethod
    def joined(cls, records: Iterable[Record]) -> Record:
        """One of several optimizers that are saved together."""
        whole = cls(0, [], [], {}, [], {})
        for record in records:
            whole.step = max(whole.step, record.step)
            numbers = [index_in(whole.numbers, each) for each in record.numbers]
            rules = [index_in(whole.rules, replace(rule, numbers=numbers[rule.numbers])) for rule in record.rules]
            whole.weights |= {name: rules[index] for name, index in record.weights.items()}
            whole.alone = list(dict.fromkeys([*whole.alone, *record.alone]))
            whole.sums |= record.sums
            whole.model |= record.model
            whole.version = record.version
        return whole


def _digest(plain: Mapping[str, Any]) -> str:
    """Of a record as plain data; tuples count as lists."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=repr).encode()).hexdigest()


def note(keys: Iterable[str]) -> dict[str, Any]:
    """What the optimizer's plain state says of the records of a checkpoint, and under which keys they are."""
    return {"version": FORMAT, "package": __version__, "keys": sorted(keys)}


def check_version(plain: Mapping[str, Any]) -> None:
    """Of a record, or of the note of it.

    Raises:
        ValueError: for a form that this version does not know.
    """
    if plain.get("version") not in range(1, FORMAT + 1):
        raise ValueError(
            f"its optimizer state has form {plain.get('version')}, written by megatron_muon {plain.get('package')}; "
            f"this is {__version__}, which reads forms up to {FORMAT}"
        )


def index_in[Value](known: list[Value], value: Value) -> int:
    """The place of a value, which is put at the end if it is not there."""
    if value not in known:
        known.append(value)
    return known.index(value)


def layout_text(layout: MatrixLayout) -> str:
    """What of a layout does not depend on the parallel layout: the kind of weight, its sections and their rules.

    Each section is named once: fused down projections of multi-latent attention have some of each tensor-parallel rank.
    """
    sections = (
        section.name + (" by head" if section.matrix_rows else "") + (" scalar" if section.rule == SCALAR else "")
        for section in layout.sections
    )
    text = ", ".join(dict.fromkeys(sections))
    kind = layout.kind if layout.direction == MSIGN else f"{layout.kind} by {layout.direction}"
    return f"{kind}: {text}" if text else kind


def numbers_of(group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What of a param group is told and compared at resume."""
    found = []
    for key, value in sorted(group.items()):
        plain = list(value) if isinstance(value, (tuple, list)) else value  # the group's own may change in place
        if key not in _PASSING and _is_plain(plain):
            found.append((key, plain))
    return tuple(found)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


@dataclass(frozen=True)
class RankRecord:
    """What a rank says of its weights, but for their contents."""

    weights: tuple[WeightRecord, ...]  # that it saves, or shards of them
    sums: tuple[tuple[str, str], ...]  # keys of its :data:`Sums`


class Recorder:
    """Puts the record of one optimizer together, save after save.

    Attributes:
        alone: (state, key) of states that not all weights of a tensor have; on all ranks.
        key: under which the record is saved, unique among the optimizers of a checkpoint: no two have a weight in
            common; on all ranks.
    """

    def __init__(self) -> None:
        self.alone: frozenset[tuple[str, str]] = frozenset()
        self.key = ""
        self._told: tuple[Ranks, RankRecord] | None = None
        self._whole: JoinedRecord | None = None

    def join(self, ranks: Ranks, part: RankRecord, step: int, sums: Iterable[int]) -> Record | None:
        """The record, on the first rank; None elsewhere. All of the model must call this, under :meth:`Ranks.together`.

        ``sums`` are this rank's shares, in the order of ``part.sums``, to be added up over the ranks in each 64 bits.
        """
        if any(ranks.gather(lambda: self._told != (ranks, part))):
            self._told = None  # whatever fails now, all tell it again
            parts = ranks.to_first(lambda: part)

            def put_together() -> tuple[list[tuple[str, str]], str]:
                assert parts is not None
                self._whole = JoinedRecord(parts)
                return self._whole.record.alone, RECORD_KEY + next(iter(self._whole.record.weights), "")

            alone, self.key = ranks.from_first(put_together)
            self.alone, self._told = frozenset(alone), (ranks, part)
        contents = ranks.to_first(lambda: (step, _packed(sums)))
        if contents is None:
            return None
        assert self._whole is not None
        steps, packed = zip(*contents, strict=True)
        return self._whole.filled(max(steps), packed)


class JoinedRecord:
    """The record without what changes between saves, on the first rank, from what all say in their order.

    Attributes:
        record: with neither steps nor sums.
    """

    def __init__(self, parts: Iterable[RankRecord]) -> None:
        parts = list(parts)
        numbers: list[tuple[tuple[str, Any], ...]] = []
        rules: list[Rule] = []
        known: dict[tuple[int, int], int] = {}
        where: dict[str, int] = {}
        holders: dict[tuple[str, str], set[tuple[int, ...]]] = {}
        siblings: dict[str, int] = {}
        weights = [weight for part in parts for weight in part.weights]
        for weight in sorted(weights, key=lambda weight: (weight.key, weight.index)):
            kind = id(weight.rule), id(weight.numbers)  # those of a rank are few
            if kind not in known:
                known[kind] = index_in(rules, replace(weight.rule, numbers=index_in(numbers, weight.numbers)))
            where[weight.name] = known[kind]
            siblings[weight.key] = weight.siblings
            for state in weight.rule.states:
                holders.setdefault((state, weight.key), set()).add(weight.index)
        alone = [pair for pair, indices in sorted(holders.items()) if len(indices) < siblings[pair[1]]]
        self.record = Record(0, rules, [dict(each) for each in numbers], where, alone, {})
        # Each name is one string: it takes its place in the file once.
        strings = {name: name for name in where}
        self._sums = sorted({pair for part in parts for pair in part.sums})
        at = {pair: number for number, pair in enumerate(self._sums)}
        self._sums = [(strings.setdefault(name, name), kind) for name, kind in self._sums]
        self._places = torch.tensor([at[pair] for part in parts for pair in part.sums], dtype=torch.int64)

    def filled(self, step: int, packed: Iterable[bytes]) -> Record:
        """The record of one save, from the sums of each rank."""
        data = bytearray().join(packed)
        shares = torch.frombuffer(data, dtype=torch.int64) if data else torch.empty(0, dtype=torch.int64)
        totals = torch.zeros(len(self._sums), 2, dtype=torch.int64).index_add_(0, self._places, shares.view(-1, 2))
        sums: dict[str, dict[str, int]] = {}
        model: dict[str, int] = {}
        for (name, kind), (low, high) in zip(self._sums, totals.tolist(), strict=True):
            value = high % (1 << _WORD) << _WORD | low % (1 << _WORD)
            if kind == WEIGHT:
                model[name] = value
            else:
                sums.setdefault(name, {})[kind] = value
        return replace(self.record, step=step, sums=sums, model=model)


def _packed(sums: Iterable[int]) -> bytes:
    """Two words for each, the lower first."""
    return b"".join(value.to_bytes(2 * _WORD // 8, "little") for value in sums)

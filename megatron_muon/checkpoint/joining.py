"""The record of an optimizer, put together on the first rank of its model: it alone saves it.

Most of it is the same at every save, and is sent once. What is not, sums and steps, is sent as numbers, in an order
that both sides know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.keys import RECORD_KEY
from megatron_muon.checkpoint.record import WEIGHT, Record, Rule, WeightRecord, index_in

__all__ = ["Part", "Recorder", "Whole"]

_WORD = 64


@dataclass(frozen=True)
class Part:
    """What a rank says of its weights, but for their contents.

    Attributes:
        weights: that it saves, or shards of them.
        sums: keys of its :data:`megatron_muon.checkpoint.record.Sums`.
    """

    weights: tuple[WeightRecord, ...]
    sums: tuple[tuple[str, str], ...]


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
        self._told: tuple[Ranks, Part] | None = None
        self._whole: Whole | None = None

    def join(self, ranks: Ranks, part: Part, step: int, sums: Iterable[int]) -> Record | None:
        """The record, on the first rank; None elsewhere.

        Args:
            ranks: of the model; all of them must call this, under :meth:`Ranks.together`.
            part: of this rank.
            step: updates so far.
            sums: in the order of ``part.sums``: this rank's shares, to be added up over the ranks in each 64 bits.
        """
        if any(ranks.gather(lambda: self._told != (ranks, part))):
            self._told = None  # whatever fails now, all tell it again
            parts = ranks.to_first(lambda: part)

            def put_together() -> tuple[list[tuple[str, str]], str]:
                assert parts is not None
                self._whole = Whole(parts)
                return self._whole.record.alone, RECORD_KEY + next(iter(self._whole.record.weights), "")

            alone, self.key = ranks.from_first(put_together)
            self.alone, self._told = frozenset(alone), (ranks, part)
        contents = ranks.to_first(lambda: (step, _packed(sums)))
        if contents is None:
            return None
        assert self._whole is not None
        steps, packed = zip(*contents, strict=True)
        return self._whole.filled(max(steps), packed)


class Whole:
    """The record without what changes between saves, on the first rank.

    Attributes:
        record: with neither steps nor sums.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        """
        Args:
            parts: of all ranks, in their order.
        """
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
        """The record of one save.

        Args:
            step: updates so far.
            packed: the sums of each rank, in the order of the parts.
        """
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

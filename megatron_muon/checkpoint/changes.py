"""What a checkpoint brings and what the flags change, in words, once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from megatron_muon.checkpoint.record import Record, numbers_of
from megatron_muon.checkpoint.sources import ESTIMATED, Choice

if TYPE_CHECKING:
    from megatron_muon.checkpoint.canonical import Request

__all__ = ["describe_changes"]


def describe_changes(request: Request, record: Record | None) -> str:
    """Lines for the first rank.

    Args:
        request: filled; all its ranks must call this.
        record: of the checkpoint; None if it is not this package's.
    """
    stored = request.stored
    assert stored is not None
    mine: Counter[str] = Counter()
    differences: set[str] = set()
    for each, place, choices in zip(request.held, request.places, request.choices, strict=True):
        for choice in choices:
            if choice.stored_as not in (choice.state, "param"):
                mine[f"{choice.state} {_source(choice)}"] += 1
        rule = None if record is None else record.rule(place.name)
        if record is not None and rule is not None and rule.name == each.rule:
            differences |= _differences(each.rule, record.numbers[rule.numbers], dict(numbers_of(each.numbers)))
    everywhere = request.ranks.gather(lambda: (dict(mine), differences))
    lines = [f"megatron_muon: optimizer state of {stored.folder}, after {stored.step} updates"]
    carried: Counter[str] = Counter()
    for counts, _ in everywhere:
        carried.update(counts)
    lines += [f"  {what} ({number} shards)" for what, number in sorted(carried.items())]
    lines += [f"  changed by flags: {line}" for line in sorted(set().union(*(lines for _, lines in everywhere)))]
    return "\n".join(lines)


def _source(choice: Choice) -> str:
    if choice.stored_as is not None:
        return f"from {choice.stored_as}"
    return "from an estimate" if choice.state == ESTIMATED else "begun anew"


def _differences(rule: str, before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    return {
        f"{rule} {name}: {before[name]} in the checkpoint, {now[name]} now"
        for name in before.keys() & now.keys()
        if before[name] != now[name]
    }

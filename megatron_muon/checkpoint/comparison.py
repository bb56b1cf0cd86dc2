"""``python -m megatron_muon ckpt diff``: what two checkpoints do not have in common, whatever layouts wrote them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch

from megatron_muon.checkpoint.errors import some
from megatron_muon.checkpoint.keys import ALONE, name_of, parse_state
from megatron_muon.checkpoint.pieces import Box, pieces
from megatron_muon.checkpoint.reading import Chunk, Index
from megatron_muon.checkpoint.record import WEIGHT
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.optimizers.fading import PEAK

_PIECE = 1 << 20
"""Elements of each that are compared at once."""
_SHOWN = 20


@dataclass(frozen=True)
class _Part:
    """A stored part of a tensor, in the place that it has there; ``chunk`` may lack the first axes, of length 1."""

    chunk: Chunk
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def read(self, index: Index, box: Box) -> torch.Tensor:
        lacking = len(self.sizes) - len(self.chunk.sizes)
        return index.read(self.chunk, box[lacking:])[(None,) * lacking]

    def meets(self, other: _Part) -> Box | None:
        box = tuple(
            (max(a, b), min(a + m, b + n))
            for a, b, m, n in zip(self.offsets, other.offsets, self.sizes, other.sizes, strict=True)
        )
        return box if all(first < last for first, last in box) else None


@dataclass
class _Line:
    """What was found of one weight or state."""

    elements: int = 0  # that both have
    differing: int = 0  # of them, by their bits
    greatest: float = 0.0  # difference between finite numbers
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # sums, of each, and of differences
    nonfinite: list[int] = field(default_factory=lambda: [0, 0])  # numbers that are not finite, in each
    apart: int = 0  # places where one of them is not finite and the other is another
    only: list[int] = field(default_factory=lambda: [0, 0])  # elements that are on one side only
    types: str = ""  # of numbers, if they are not the same

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Compare two pieces of one shape."""
        self.elements += a.numel()
        alike = a.dtype == b.dtype
        if alike and torch.equal(_bits(a), _bits(b)):
            flat = a.flatten().float()
            square = float(flat.dot(flat))
            if math.isfinite(square):  # of a million numbers at once: enough for a norm, and all are finite
                self.squares = [square + self.squares[0], square + self.squares[1], self.squares[2]]
                return
        self.differing += int((_bits(a) != _bits(b) if alike else a.double() != b.double()).sum())
        wide = [each.double() for each in (a, b)]
        finite = [each.isfinite() for each in wide]
        both = finite[0] & finite[1]
        self.apart += int((~both & (wide[0] != wide[1]) & ~(wide[0].isnan() & wide[1].isnan())).sum())
        for side in (0, 1):
            self.nonfinite[side] += a.numel() - int(finite[side].sum())
            wide[side] = wide[side].where(both, 0.0)
            self.squares[side] += float(wide[side].square().sum())
        distance = (wide[1] - wide[0]).abs()
        self.greatest = max(self.greatest, float(distance.max()))
        self.squares[2] += float(distance.square().sum())

    @property
    def relative(self) -> float:
        """Norm of the difference, by the greater of both norms."""
        return math.sqrt(self.squares[2] / max(self.squares[:2])) if self.squares[2] else 0.0

    def is_same(self, tolerance: float | None) -> bool:
        if any(self.only) or self.apart:
            return False
        return not self.differing and not self.types if tolerance is None else self.relative <= tolerance


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(getattr(torch, f"int{8 * tensor.element_size()}"))


def compare(
    a: Index, b: Index, *, tolerance: float | None = None, moments: bool = False, fast: bool = False
) -> dict[str, Any]:
    """Everything that differs, as plain data.

    Args:
        a: the index of one checkpoint.
        b: of the other; chunks, and names for the same state, may differ.
        tolerance: of relative norms; bits are compared by default.
        moments: whether Muon's momentum and Adam's first moment are the same state.
        fast: do not read what both records have the same sum of bits for.
    """
    indices, stored = (a, b), (a.stored, b.stored)
    named = [_named(index, moments) for index in indices]
    lines: dict[tuple[str, str], _Line] = {}
    skipped = 0
    for kind, key in sorted({**named[0], **named[1]}):
        if kind == PEAK and not all((kind, key) in each for each in named):
            continue  # what others do without is no difference
        sides = [_parts(index, each.get((kind, key), {})) for index, each in zip(indices, named, strict=True)]
        depth = _depth([*sides[0], *sides[1]])
        groups: dict[tuple[int, ...], list[list[_Part]]] = defaultdict(lambda: [[], []])
        for number, side in enumerate(sides):
            for part in side:
                groups[part.offsets[:depth]][number].append(part)
        for at, mine in sorted(groups.items(), key=lambda pair: pair[0]):
            name = name_of(key, at)
            if fast and all(mine) and _same_sum(stored, name, kind):
                skipped += 1
            else:
                lines[kind, name] = _line(indices, mine)
    rows = [_row(kind, name, line) for (kind, name), line in lines.items() if not line.is_same(tolerance)]
    rows.sort(key=lambda row: (-max(row["nonfinite"]), -row["relative_norm"], -row["differing"], row["name"]))
    settings = _settings(*stored)
    return {
        "folders": [str(index.folder) for index in indices],
        "same": not rows and not settings,
        "tolerance": tolerance,
        "compared": len(lines),
        "not_read": skipped,
        "settings": settings,
        "differences": rows,
    }


def _named(index: Index, moments: bool) -> dict[tuple[str, str], dict[tuple[int, ...], str]]:
    """(kind, weight) -> the keys that have it, by the layer (expert) that each is alone for."""
    found: dict[tuple[str, str], dict[tuple[int, ...], str]] = defaultdict(dict)
    names = {"param": "fp32_param", **({"momentum_buffer": "exp_avg"} if moments else {})}
    for key in index.tensors:
        state = parse_state(key)
        weight, _, alone = (key if state is None else state.weight).partition(ALONE)
        kind = WEIGHT if state is None else names.get(state.state, state.state)
        mine, at = found[kind, weight], tuple(map(int, alone.split("."))) if alone else ()
        if at not in mine or (state is not None and state.state == kind):
            mine[at] = key
    return found


def _parts(index: Index, keys: dict[tuple[int, ...], str]) -> list[_Part]:
    return [
        _Part(chunk, (*at, *chunk.offsets), (*(1 for _ in at), *chunk.sizes))
        for at, key in keys.items()
        for chunk in index.chunks(key)
    ]


def _depth(parts: list[_Part]) -> int:
    """How many axes are of layers and experts: each part is of one of them."""
    axes = zip(*(part.sizes[:-1] for part in parts), strict=True)
    return sum(1 for _ in takewhile(lambda lengths: set(lengths) == {1}, axes))


def _same_sum(stored: tuple[Stored, Stored], name: str, kind: str) -> bool:
    records = [each.record for each in stored]
    a, b = [None if each is None else (each.version > 1, each.sum_of(name, kind)) for each in records]
    return a == b and a is not None and a[0] and a[1] is not None  # sums of form 1 do not see the order of elements


def _line(indices: tuple[Index, Index], sides: list[list[_Part]]) -> _Line:
    line = _Line()
    types = ["", ""]
    for number, (index, parts) in enumerate(zip(indices, sides, strict=True)):
        line.only[number] = sum(math.prod(part.sizes) for part in parts)
        if parts:
            types[number] = str(index.tensors[parts[0].chunk.key].properties.dtype).removeprefix("torch.")
    line.types = " and ".join(types) if all(types) and types[0] != types[1] else ""
    for first in sides[0]:
        for second in sides[1]:
            if (whole := first.meets(second)) is not None:
                for box in pieces(whole, (first.sizes, second.sizes), _PIECE):
                    line.add(first.read(indices[0], box), second.read(indices[1], box))
    line.only = [number - line.elements for number in line.only]
    return line


def _row(kind: str, name: str, line: _Line) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "elements": line.elements,
        "differing": line.differing,
        "max_abs": line.greatest,
        "relative_norm": line.relative,
        "nonfinite": line.nonfinite,
        "only": line.only,
        "dtypes": line.types,
    }


def _settings(a: Stored, b: Stored) -> list[str]:
    """What differs beside the tensors, a line each."""
    schedules = [each.common.get("opt_param_scheduler") or {} for each in (a, b)]
    pairs = {
        "iteration": (a.common.get("iteration"), b.common.get("iteration")),
        "updates": (a.step, b.step),
        **{f"schedule {name}": (value, schedules[1].get(name)) for name, value in schedules[0].items() if schedules[1]},
    }
    found = [f"{name}: {first} and {second}" for name, (first, second) in pairs.items() if first != second]
    rules: dict[str, list[str]] = defaultdict(list)
    numbers: dict[str, None] = {}
    if a.record is not None and b.record is not None:
        for name in a.record.weights.keys() & b.record.weights.keys():
            first, second = a.record.rule(name), b.record.rule(name)
            assert first is not None and second is not None
            if (first.name, first.layout) != (second.name, second.layout):
                rules[f"{first} and {second}"].append(name)
                continue
            mine, other = a.record.numbers[first.numbers], b.record.numbers[second.numbers]
            for number in sorted(mine.keys() & other.keys()):
                if mine[number] != other[number]:
                    numbers[f"{first.name} {number}: {mine[number]} and {other[number]}"] = None
    found += [f"{both}: {some(names)}" for both, names in sorted(rules.items())]
    return found + sorted(numbers)


def render(found: dict[str, Any]) -> str:
    """What :func:`compare` has found, as text: what differs most first."""
    lines = [f"a: {found['folders'][0]}", f"b: {found['folders'][1]}"]
    lines += [f"  {line}" for line in found["settings"]]
    rows = [row for row in found["differences"] if row["elements"]]
    if rows:
        width = max(len(row["kind"]) + len(row["name"]) + 1 for row in rows[:_SHOWN])
        lines.append(f"{'':{width}}  {'differing':>21}  {'max abs':>9}  {'relative':>9}")
    for row in rows[:_SHOWN]:
        notes = [
            *(f"{count} not finite in {side}" for side, count in zip("ab", row["nonfinite"], strict=True) if count),
            *(f"{count} elements only in {side}" for side, count in zip("ab", row["only"], strict=True) if count),
            *([row["dtypes"]] if row["dtypes"] else []),
        ]
        share = f"{row['differing']:,} of {row['elements']:,}"
        numbers = f"{row['max_abs']:>9.2e}  {row['relative_norm']:>9.2e}"
        lines.append(f"{row['kind'] + ' ' + row['name']:{width}}  {share:>21}  {numbers}  {', '.join(notes)}".rstrip())
    if len(rows) > _SHOWN:
        lines.append(f"and {len(rows) - _SHOWN} more (--json has all)")
    lonely: dict[str, list[str]] = defaultdict(list)
    for row in found["differences"]:
        if not row["elements"]:
            lonely[f"only in {'a' if row['only'][0] else 'b'}: {row['kind']}"].append(row["name"])
    lines += [f"{what} of {some(names)}" for what, names in sorted(lonely.items())]
    by = "bits" if found["tolerance"] is None else f"within a relative norm of {found['tolerance']:g}"
    read = f"{found['compared']} weights and states compared"
    read += f", {found['not_read']} not read: their sums of bits are equal" if found["not_read"] else ""
    lines.append(f"{read}: {'same ' + by if found['same'] else f'{len(found["differences"])} differ'}")
    return "\n".join(lines)

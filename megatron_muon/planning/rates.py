"""Rates of devices, each with its source, and how long an operation takes by them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from megatron_muon.errors import ConfigError

KINDS = ("measured", "published", "assumed")
"""Where a rate is from: measured by us, of torch or by ``tools.rates``; measured by others, who published it;
neither, as its source says why."""

_TABLE = "devices.json"

_LIKE = {"float16": "bfloat16"}
"""Numbers whose products run at the rate of others', where the table does not have their own."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and how long it takes to begin.

    * ``T.flops``: operations a second in products of the type of numbers T; ``T.start``: seconds of each beside.
    * ``memory``: bytes a second that an elementwise pass reads and writes. Where these differ, ``cache``: the same if
      they are at most ``cache.size`` together; ``cast``, ``turn``, ``norm``: of passes that change types, of copies
      that turn matrices, of norms in float64. ``kernel``: seconds of a pass over nothing.
    * ``launch``: seconds of the host for each operation.
    * ``within.bytes``, ``within.latency``: bytes a second that a rank sends to others of its node, and seconds of a
      message over nothing; ``between.bytes``, ``between.latency``: to other nodes. ``node``: ranks of a node.
    * ``overlaps``: 1 if the host, and messages, do their work beside the device.

    Attributes:
        name: of the device.
        numbers: by name.
        sources: of each: one of :data:`KINDS`, and who measured it, when, at which shape, with which versions.
    """

    name: str
    numbers: Mapping[str, float]
    sources: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, device: str) -> Rates:
        """The entry of a device.

        Raises:
            ConfigError: for one that the table does not have.
        """
        if device not in devices():
            raise ConfigError(
                f"--device {device}: the table of rates has {', '.join(devices())}. Choose one of these, or add the "
                "device that torch finds here, in a clone of this repository: python -m tools.rates --add NAME."
            )
        return cls.read(devices()[device])

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Rates:
        """From an entry of the table, see :meth:`entry`."""
        rates = entry["rates"]
        numbers = {name: float(each["value"]) for name, each in rates.items()}
        return cls(entry["name"], numbers, {name: (each["kind"], each["source"]) for name, each in rates.items()})

    def entry(self) -> dict[str, Any]:
        """As the table and the JSON file of a plan have it."""
        named = {name: self.sources[name] for name in self.numbers}
        rates = {
            name: {"value": self.numbers[name], "kind": kind, "source": source}
            for name, (kind, source) in named.items()
        }
        return {"name": self.name, "rates": rates}

    @property
    def overlaps(self) -> bool:
        """Whether the host, and messages, work beside the device."""
        return bool(self.numbers["overlaps"])

    def product_seconds(self, dtype: str, batch: int, m: int, n: int, k: int, share: float = 1.0) -> float:
        """Of ``batch`` products of m x k and k x n matrices: the greater of what operations and bytes take.

        Args:
            dtype: of the numbers: ``float32``, ``tf32``, ``bfloat16``, ``float16``.
            batch: how many.
            m: rows of the result.
            n: its columns.
            k: terms of each sum.
            share: of the operations that is done: half of them where the result is symmetric.
        """
        if not batch * m * n * k:
            return 0.0
        numbers = dtype if f"{dtype}.flops" in self.numbers else _LIKE.get(dtype, dtype)
        flops, start = (self._number(f"{numbers}.{what}", dtype) for what in ("flops", "start"))
        size = 4 if dtype in ("float32", "tf32") else 2
        moved = size * batch * (m * k + k * n + m * n)
        return start + max(share * 2 * batch * m * n * k / flops, moved / self._memory(moved))

    def pass_seconds(self, size: float, what: str = "") -> float:
        """Of an elementwise pass that reads and writes ``size`` bytes; ``what``: its kind, if that has a rate."""
        return self.numbers["kernel"] + size / self.numbers.get(what, self._memory(size))

    def message_seconds(self, link: str, size: float) -> float:
        """Of a collective in which a rank sends ``size`` bytes; ``link``: ``within`` or ``between`` nodes."""
        return self.numbers[f"{link}.latency"] + size / self.numbers[f"{link}.bytes"]

    def _memory(self, size: float) -> float:
        fits = size <= self.numbers.get("cache.size", 0.0)
        return self.numbers["cache" if fits else "memory"]

    def _number(self, name: str, dtype: str) -> float:
        if name not in self.numbers:
            raise ConfigError(
                f"--device {self.name}: its rates have no products of {dtype}. Measure them, in a clone of this "
                f"repository: python -m tools.rates --add {self.name}."
            )
        return self.numbers[name]


@cache
def devices() -> dict[str, dict[str, Any]]:
    """The table: entries by the names that ``--device`` takes."""
    return json.loads((files(__package__) / _TABLE).read_text(encoding="utf-8"))

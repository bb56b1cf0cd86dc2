"""What an item of a part says: checks that can fail, targets, and rows of tables."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_check.targets import TARGETS

PASSED, FAILED, NOT_RUN, UNFINISHED = "passed", "failed", "not run", "unfinished"


class NotRunError(Exception):
    """This cannot be run here; the message says why."""


@dataclass
class Report:
    """What one item has found.

    Attributes:
        checks: (what, whether it is so, numbers in words).
        targets: key of :data:`TARGETS`, value, of what, whether it is reached.
        rows: of tables, by their names.
        notes: what was left out, and why.
    """

    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    targets: list[tuple[str, float, str, bool]] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def check(self, what: str, passed: bool, text: str = "") -> None:
        """Something is, or is not, as it must be."""
        self.checks.append((what, bool(passed), text))

    def at_most(self, what: str, value: float, limit: float) -> None:
        """A number, which is not NaN, is within its limit."""
        self.check(what, value <= limit, f"{value:.3g}, at most {limit:.3g}")

    def target(self, key: str, value: float, of: str) -> None:
        """A number of :data:`TARGETS`."""
        self.targets.append((key, value if math.isfinite(value) else math.inf, of, TARGETS[key].reached(value)))

    def row(self, table: str, **columns: Any) -> None:
        """A line of a table."""
        self.rows.setdefault(table, []).append(columns)

    def left_out(self, what: str, why: str) -> None:
        """Something that is not there on this machine: said, never silent."""
        self.notes.append(f"not run: {what}: {why}")

    @property
    def state(self) -> str:
        """Of the item: one that says nothing has failed."""
        said = self.checks or self.targets or self.rows
        if not said:
            return NOT_RUN if self.notes else FAILED
        return PASSED if all(each[1] for each in self.checks) and all(each[3] for each in self.targets) else FAILED

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        found: dict[str, Any] = {"state": self.state}
        if found["state"] == FAILED and not (self.checks or self.targets or self.rows):
            found["reason"] = "it checked nothing"
        own = {"checks": self.checks, "targets": self.targets, "rows": self.rows, "notes": self.notes}
        return found | {name: value for name, value in own.items() if value}


@dataclass(frozen=True)
class Setting:
    """Where and how a part runs.

    Attributes:
        device: ``cpu`` or ``cuda``; on the CPU everything is small, and only to see that it runs.
        deadline: time of the clock at which the part is to have ended.
        folder: for files of this part; it is deleted afterwards.
    """

    device: str
    deadline: float
    folder: Path

    @property
    def is_gpu(self) -> bool:
        """Whether numbers mean something."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Item:
    """A step of a part.

    Attributes:
        name: unique in its part.
        run: does it; what it raises is a failure, except :class:`NotRunError`.
        limit: seconds after which it is ended.
    """

    name: str
    run: Callable[[Report], None]
    limit: float = 60.0


def need(*modules: str) -> None:
    """Modules that an item cannot do without.

    Raises:
        NotRunError: naming the first that is not installed.
    """
    for name in modules:
        if not is_there(name):
            package = {"megatron.core": "megatron-core", "megatron.training": "megatron-core"}.get(name, name)
            raise NotRunError(f"{package.replace('_', '-')} is not installed")


def is_there(name: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def only_on_gpus(setting: Setting) -> None:
    """Raises :class:`NotRunError` elsewhere."""
    if not setting.is_gpu:
        raise NotRunError("it needs a GPU")


def repository() -> Path:
    """The folder that holds all of it."""
    return Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """For processes of an item: this package is found, wherever they are started."""
    paths = [str(repository()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

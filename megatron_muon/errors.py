"""The error that a user's mistake raises."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_MODULES = re.compile(r"( when instantiating \w+)+$")


class ConfigError(ValueError):
    """A flag, a parameter or a combination that cannot be honoured.

    The message names the flag or parameter, its value, and the way out. It is an ordinary exception
    that is raised before the first training step; where nobody catches it, one rank prints it.
    """

    def __init__(self, message: str = "") -> None:
        # Megatron-Core makes another exception of one that is raised while it builds a module, with words of its own.
        super().__init__(_MODULES.sub("", message))


_ARGUMENTS = {
    "--optimizer (?:dist_)?muon\\b": "variant none",
    "--optimizer stiefel_muon": "variant stiefel",
    "--optimizer (adaptive_muon|spectral_sphere)": r"variant \1",
    "--adaptive-muon-moment2-method": "variant",
    "--muon-param-rule ('[^']*')": r"param_rule=(\1,)",
}


def in_python(message: str) -> str:
    """What is said of flags, for who has given arguments: ``--muon-scale-mode x`` is ``scale_mode x``."""
    for flag, argument in _ARGUMENTS.items():
        message = re.sub(flag, argument, message)
    return re.sub("--(?:muon-)?(?:no-)?([a-z][a-z0-9-]*)", lambda found: found[1].replace("-", "_"), message)


_FOR_FLAGS: ContextVar[bool] = ContextVar("megatron_muon_for_flags", default=False)


@contextmanager
def told_in_flags() -> Iterator[None]:
    """What is refused within is told to who has given flags, also by what tells it in Python's words elsewhere."""
    token = _FOR_FLAGS.set(True)
    try:
        yield
    finally:
        _FOR_FLAGS.reset(token)


@contextmanager
def told_in_python() -> Iterator[None]:
    """What is refused within, or by the function that this stands above, is told by :func:`in_python`."""
    try:
        yield
    except ConfigError as error:
        if not _FOR_FLAGS.get():
            error.args = (in_python(str(error)),)
        raise


def sizes(shape: Iterable[int]) -> str:
    """A shape for a message: ``12 x 8``."""
    return " x ".join(map(str, shape))


def shown(value: object) -> object:
    """A value for a message that asks for a number: a string of digits is told from one by its quotes."""
    return repr(value) if isinstance(value, str) and value[:1].isdigit() else value


def ranges(numbers: Sequence[int]) -> str:
    """Numbers for a message: ``[0, 2, 3, 4]`` -> ``0, 2-4``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def size_text(number: float) -> str:
    """A number of bytes for a message: ``457.1 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"

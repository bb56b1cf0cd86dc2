"""Functions that a plug-in may wrap or replace.

A function under :func:`extension_point` is called as ever while no plug-in is chosen. A plug-in is
a Python package with an entry point of the group ``megatron_core.plugins``: a function without
arguments, called before the first extension point runs if the environment names it. It hands its
replacements to the points, by name::

    from megatron.core.extension_points import points

    def load():
        import megatron.core.optimizer

        point = points["megatron.core.optimizer:get_megatron_optimizer"]
        point.add(lambda original: my_factory)

``MEGATRON_CORE_PLUGINS`` chooses among installed plug-ins: names with commas between. Without it
none is loaded, and the installed packages are not even looked at.
"""

import functools
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

GROUP = "megatron_core.plugins"
CHOICE = "MEGATRON_CORE_PLUGINS"

_loaded = False
_called: set[str] = set()


class ExtensionPoint:
    """A function and what plug-ins have made of it.

    Attributes:
        name: ``"package.module:function"`` or ``"package.module:Class.method"``.
        original: the function as it is defined.
        call: what takes its place: it runs what the last replacement was made into.
    """

    def __init__(self, original: Callable) -> None:
        self.name = f"{original.__module__}:{original.__qualname__}"
        self.original = original
        self.current = original
        self._makes: list[Callable[[Callable], Callable]] = []

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not _loaded:
                load_plugins()
            return self.current(*args, **kwargs)

        self.call = call

    def add(self, make: Callable[[Callable], Callable]) -> None:
        """Let ``make(function)`` take the function's place, or that of what others made of it."""
        self._set([*self._makes, make])

    def remove(self, make: Callable[[Callable], Callable]) -> None:
        """Undo :meth:`add`."""
        makes = list(self._makes)
        makes.remove(make)
        self._set(makes)

    def _set(self, makes: list[Callable[[Callable], Callable]]) -> None:
        current = self.original
        for make in makes:
            current = make(current)
        self._makes, self.current = makes, current
        self.call.__wrapped__ = current  # inspect.signature follows it


points: dict[str, ExtensionPoint] = {}
"""Those of all modules imported so far."""


def extension_point(function: Callable) -> Callable:
    """Make a function, or a method of a class, one that plug-ins can replace."""
    point = ExtensionPoint(function)
    points[point.name] = point
    return point.call


def load_plugins() -> None:
    """Call the plug-ins that are installed and chosen, each once in a process.

    Raises:
        ValueError: if one is chosen that is not installed.
        RuntimeError: if one cannot be loaded, at every call: nothing goes on without it.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True  # while they are loaded too: they may call functions with extension points
    try:
        for entry in _chosen():
            if entry.name not in _called:
                _call(entry)
                _called.add(entry.name)
    except BaseException:
        _loaded = False
        raise


def _chosen() -> list[Any]:
    choice = os.environ.get(CHOICE, "")
    names = {name.strip() for name in choice.split(",") if name.strip()}
    if not names:
        return []
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    unknown = sorted(names - set(found))
    if unknown:
        missing, there = ", ".join(unknown), sorted(found)
        raise ValueError(f"{CHOICE}={choice}: not installed: {missing}. Installed: {there}.")
    return [found[name] for name in sorted(names)]


def _call(entry: Any) -> None:
    try:
        entry.load()()
    except Exception as error:
        message = f"The plug-in {entry.name} cannot be loaded: {error}"
        raise RuntimeError(f"{message} To run without it: {CHOICE}= (empty).") from error

"""Calls functions after the import of a module, whoever imports it: a hook on ``sys.meta_path``."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


class _AfterImports(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loaders of modules.

    There is one for all: two finders that each ask the rest of ``sys.meta_path`` would ask each other.
    """

    def __init__(self) -> None:
        self._actions: dict[str, list[Action]] = {}

    def call(self, module: str, action: Action) -> None:
        """Call ``action`` with the module whenever it has been imported; what the action raises, the import raises."""
        self._actions.setdefault(module, []).append(action)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def forget(self, action: Action) -> None:
        """Call ``action`` no more, after whichever import."""
        left = {name: [each for each in actions if each != action] for name, actions in self._actions.items()}
        self._actions = {name: actions for name, actions in left.items() if actions}
        if not self._actions and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._actions:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def imported(self, module: ModuleType) -> None:
        """Call the actions of a module that has just been imported."""
        for action in list(self._actions.get(module.__name__, ())):
            action(module)


class _Loader(importlib.abc.Loader):
    """A module's own loader, after which the actions are called."""

    def __init__(self, loader: Any, finder: _AfterImports) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Put the real loader back first: inspect, pickle and importlib.resources ask a module for it.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.imported(module)


AFTER_IMPORTS = _AfterImports()

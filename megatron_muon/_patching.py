"""Reversible changes to attributes of other packages, in any import order.

Two packages of this one change what they did not write: ``plugin`` (Megatron-Core's factory, flags, models) and
``cpu`` (what Megatron-Core asks of CUDA). Both describe each change as a :class:`Patch` - where, what, and why - and
hand them to a :class:`PatchSet`, which

* applies a patch at once if its module is imported, and after every import of it (:mod:`megatron_muon._imports`), so
  that nobody has to import this package first and nothing is imported that the user does not use; where a patch fails,
  the import does, the next one too;
* also replaces the copies that ``from module import name`` left in other modules, whoever wrote them. Those in objects
  (a default argument, a dictionary, a ``functools.partial``) cannot be found: what stands or falls with a hook must see
  for itself whether it was entered;
* puts everything back on :meth:`PatchSet.revert`.

:func:`holds`, :func:`lost` and :func:`in_place_of` say what is there now.

A Megatron-LM with our git patches (``patches/``) has extension points where these changes belong. A patch whose target
is one is handed to it, and no attribute is replaced: the function itself asks who wraps it. This is decided for each
patch, so a fork may take some of the git patches and leave others.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_muon._imports import AFTER_IMPORTS

EXTENSION_POINTS = "megatron.core.extension_points"
"""The module in which a patched Megatron-LM keeps its extension points, by the targets of patches."""

Original = Callable[..., Any]
"""A function that a patch replaces."""

_BELOW = frozenset({"torch", "numpy", "sympy", "networkx", "mpmath", "triton"})
"""torch and what it imports: most of all modules, and none has a copy from a package that is built on torch."""

_MISSING = object()


@dataclass(frozen=True)
class Patch:
    """One change to one attribute.

    Attributes:
        target: ``"package.module:name"`` or ``"package.module:Class.name"``.
        make: receives the original value and returns the replacement.
        reason: why the change is needed; shown by :meth:`PatchSet.describe`.
        create: whether the attribute may be absent (it is then made, and deleted on revert). Without it an absent
            attribute raises ``AttributeError``: upstream has moved and the patch would do nothing.
        copies_in: the top-level packages in which ``from module import name`` copies are replaced as well, with
            ``__main__`` unless there are none. None means every module, if the value is of the package of ``target``;
            what that has from elsewhere others may hold for its own sake, and it is replaced in that package alone.
            Empty means no copies are replaced, which is needed where the replacement is such an object
            (``torch.optim.AdamW``): on revert they would lose it.
        point: the extension point of a patched Megatron-LM, where it is another function than ``target``.
        make_at_point: what ``point`` is given in place of ``make``.
        in_subclasses: what is made of the attributes of the same name that subclasses of the target's class have of
            their own, if they are there when the patch is applied; None leaves them alone.
        optional: whether the attribute may be absent; nothing is done then.
        fixed_by: a word in the source of a ``target`` that needs this change no more, in later versions or with our git
            patches; None if every version needs it.
    """

    target: str
    make: Callable[[Any], Any]
    reason: str
    create: bool = False
    copies_in: tuple[str, ...] | None = None
    point: str | None = None
    make_at_point: Callable[[Any], Any] | None = None
    in_subclasses: Callable[[Any], Any] | None = None
    fixed_by: str | None = None
    optional: bool = False

    @property
    def module(self) -> str:
        """The module to patch."""
        return self.target.partition(":")[0]

    @property
    def path(self) -> str:
        """The attribute inside the module, with dots for members of classes."""
        return self.target.partition(":")[2]


def replace_by(value: Any) -> Callable[[Any], Any]:
    """What a :class:`Patch` makes of an original that is not needed."""
    return lambda original: value


def around(wrapper: Callable[..., Any]) -> Callable[[Any], Any]:
    """What a :class:`Patch` makes of a function: ``wrapper`` is called with it, and then with its arguments."""

    def make(original: Original) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        return staticmethod(call) if isinstance(original, staticmethod) else call

    return make


class Patches(list[Patch]):
    """The patches of one subject, in the order of application. Decorators add those that functions make."""

    def around[F: Callable[..., Any]](self, target: str, reason: str, **options: Any) -> Callable[[F], F]:
        """Decorates what is called in place of ``target``, with the original before the arguments.

        Args:
            target: of the :class:`Patch`.
            reason: of the patch.
            **options: its other attributes.
        """

        def add(wrapper: F) -> F:
            self.append(Patch(target, around(wrapper), reason, **options))
            return wrapper

        return add

    def making[F: Callable[[Any], Any]](self, target: str, reason: str, **options: Any) -> Callable[[F], F]:
        """Decorates what makes the replacement of ``target`` from the original; arguments as of :meth:`around`."""

        def add(make: F) -> F:
            self.append(Patch(target, make, reason, **options))
            return make

        return add


class PatchSet:
    """A named set of patches that is applied and reverted as one.

    Args:
        name: shown in error messages.
        patches: in the order of application; several patches may have the same target, each sees the one before.

    Attributes:
        active: whether the set is applied.
        native: targets of the patches that needed no hook so far: an extension point took them, or upstream's function
            does what they are for.
    """

    def __init__(self, name: str, patches: Iterable[Patch] = ()) -> None:
        self.name = name
        self.patches = list(patches)
        self.active = False
        self.native: list[str] = []
        self._undo: list[Callable[[], None]] = []
        self._copied: list[_Copied] = []
        self._placed: dict[str, Any] = {}

    def describe(self) -> list[tuple[str, str]]:
        """``(target, reason)`` of every patch, in order."""
        return [(patch.target, patch.reason) for patch in self.patches]

    def apply(self) -> None:
        """Apply all patches, now and after later imports of their modules. Does nothing twice."""
        if self.active:
            return
        self.active = True
        _ACTIVE.append(self)
        try:
            imported = [patch for patch in self.patches if patch.module in sys.modules]
            for name in dict.fromkeys(patch.module for patch in self.patches):
                AFTER_IMPORTS.call(name, self._imported)
            copied = [found for patch in imported for found in self._apply_one(sys.modules[patch.module], patch)]
            self._replace_copies(copied)
        except BaseException:
            self.revert()
            raise

    def revert(self) -> None:
        """Restore every attribute, newest first. Does nothing when the set is not active.

        Modules that were imported meanwhile may hold copies of replacements; these get the original too.
        """
        AFTER_IMPORTS.forget(self._imported)
        if self in _ACTIVE:
            _ACTIVE.remove(self)
        while self._undo:
            self._undo.pop()()
        self._replace_copies([copied.reversed() for copied in reversed(self._copied)])
        self._undo.clear()  # what the line above has set must stay
        self._copied.clear()
        self._placed.clear()
        self.native.clear()
        self.active = False

    def _imported(self, module: ModuleType) -> None:
        """Apply the patches of a module that has just been imported."""
        patches = [patch for patch in self.patches if patch.module == module.__name__]
        copied = [found for patch in patches for found in self._apply_one(module, patch)]
        self._replace_copies(copied, since=module.__name__)

    def holds(self, patch: Patch, module: ModuleType) -> bool:
        """Whether the last replacement of the patch's target is in its place, or in what others have wrapped around it.

        A wrapper has it in its ``__wrapped__``, as ``functools.wraps`` does.
        """
        if patch.target in self.native:
            return True
        *parents, name = patch.path.split(".")
        value: Any = vars(functools.reduce(getattr, parents, module)).get(name)
        placed = self._placed.get(patch.target, _MISSING)
        while value is not placed and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        return value is placed

    def in_place_of(self, value: Any) -> Any:
        """What replaced ``value``; itself if nothing did."""
        for copied in self._copied:
            if value is copied.original:
                value = copied.replacement
        return value

    def _apply_one(self, module: ModuleType, patch: Patch) -> list[_Copied]:
        """Apply one patch; returns what its module may have handed out to others by ``from module import name``."""
        owner: Any = module
        *parents, name = patch.path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        copied = [] if self._give_to_point(patch) else self._replace(module, owner, name, patch)
        for cls in _subclasses(owner) if patch.in_subclasses is not None else ():
            if name in vars(cls):
                self._set(cls, name, vars(cls)[name], patch.in_subclasses(vars(cls)[name]))  # type: ignore[misc]
        return copied

    def _replace(self, module: ModuleType, owner: Any, name: str, patch: Patch) -> list[_Copied]:
        """Replace the target; returns as :meth:`_apply_one`."""
        own = vars(owner).get(name, _MISSING)  # not getattr: an inherited member must not become the class's own
        original = own if own is not _MISSING else getattr(owner, name, _MISSING)
        if original is _MISSING and patch.optional:
            self.native.append(patch.target)
            return []
        if original is _MISSING and not patch.create:
            raise AttributeError(
                f"{self.name}: {patch.target} does not exist in the installed version, and without it this would not "
                f"hold: {patch.reason}"
            )
        if patch.fixed_by is not None and patch.fixed_by in _source_of(original):
            self.native.append(patch.target)
            return []
        replacement = patch.make(None if original is _MISSING else original)
        self._set(owner, name, own, replacement)
        self._placed[patch.target] = replacement
        unknown = original is _MISSING or original is replacement or _is_constant(replacement)
        if owner is not module or unknown or patch.copies_in == ():
            return []
        copied = _Copied(original, replacement, module.__name__.partition(".")[0], patch.copies_in)
        if _is_constant(original):
            self._copied.append(copied)  # copies of None cannot be told apart; those of the replacement can, on revert
            return []
        return [copied]

    def _give_to_point(self, patch: Patch) -> bool:
        """Hand the patch to the extension point that its target is in a patched Megatron-LM, if it is one."""
        points = getattr(sys.modules.get(EXTENSION_POINTS), "points", {})
        point = points.get(patch.point or patch.target)
        if point is None:
            return False
        make = patch.make_at_point or patch.make
        point.add(make)
        self._undo.append(functools.partial(point.remove, make))
        self.native.append(patch.target)
        return True

    def _set(self, owner: Any, name: str, original: Any, value: Any) -> None:
        missing = original is _MISSING
        back = functools.partial(delattr, owner, name) if missing else functools.partial(setattr, owner, name, original)
        self._undo.append(back)
        setattr(owner, name, value)

    def _replace_copies(self, copied: Sequence[_Copied], since: str | None = None) -> None:
        """Replace what ``from module import name [as other]`` bound elsewhere, in one walk over the modules.

        Only their own dictionaries are looked at: asking a module for an attribute may import what it has put off.

        Args:
            copied: what to replace.
            since: a module that was just imported, if copies can only be in those that were imported meanwhile.
        """
        if not copied:
            return
        self._copied += copied
        by_identity = {id(entry.original): entry for entry in copied}
        below: frozenset[str] = frozenset() if any(entry.package in _BELOW for entry in copied) else _BELOW
        names = list(sys.modules)  # in the order of their imports
        for module_name in names[names.index(since) :] if since in names else names:
            module = sys.modules.get(module_name)
            if not issubclass(type(module), ModuleType):
                continue
            package = module_name.partition(".")[0]
            if package in below:
                continue
            namespace = vars(module)
            for attribute, value in list(namespace.items()):
                current = value
                # Follow the chain: a name that was patched twice went from the first original to the last replacement.
                while (entry := by_identity.get(id(current))) is not None and entry.is_for(package):
                    current = entry.replacement
                if current is not value:
                    self._undo.append(functools.partial(namespace.__setitem__, attribute, value))
                    namespace[attribute] = current


_ACTIVE: list[PatchSet] = []
"""Those that are applied, in this order."""


def holds(target: str) -> bool | None:
    """Whether all that patches have made of ``target`` is in its place now.

    Args:
        target: as of :class:`Patch`.

    Returns:
        None if its module is not imported, so that nobody can have called it.
    """
    module = sys.modules.get(target.partition(":")[0])
    if module is None:
        return None
    found = [patches.holds(patch, module) for patches in _ACTIVE for patch in patches.patches if patch.target == target]
    return bool(found) and all(found)


def lost() -> list[str]:
    """Targets in whose place something else stands now."""
    targets = dict.fromkeys(patch.target for patches in _ACTIVE for patch in patches.patches)
    return [target for target in targets if holds(target) is False]


def in_place_of(value: Any) -> Any:
    """What patches have put in the place of ``value``, of which somebody has a copy; itself if nothing."""
    for patches in _ACTIVE:
        value = patches.in_place_of(value)
    return value


def _source_of(value: Any) -> str:
    """The source of a function; empty if there is only its code."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return ""


def _subclasses(cls: type) -> list[type]:
    """All that derive from ``cls`` now, each once, bases first."""
    found: dict[type, None] = dict.fromkeys(cls.__subclasses__())
    for each in list(found):
        found |= dict.fromkeys(_subclasses(each))
    return list(found)


def _is_constant(value: Any) -> bool:
    """Whether ``value`` is a shared object: the same None, True or "" elsewhere is no copy of an attribute."""
    return isinstance(value, (bool, int, float, str, tuple, type(None)))


@dataclass(frozen=True)
class _Copied:
    """A replaced module attribute whose copies are to follow.

    Attributes:
        original: what the copies are.
        replacement: what becomes of them.
        package: of the target.
        packages: the only ones to look in, beside ``__main__``; None for every module.
    """

    original: Any
    replacement: Any
    package: str
    packages: tuple[str, ...] | None

    def is_for(self, package: str) -> bool:
        """Whether copies in modules of ``package`` are to follow."""
        if self.packages is not None:
            return package in (*self.packages, "__main__")
        home = (getattr(self.original, "__module__", None) or self.package).partition(".")[0]
        made_here = "<locals>" in getattr(self.original, "__qualname__", "")  # nobody can have it from its home
        return package in (self.package, "__main__") or home == self.package or made_here

    def reversed(self) -> _Copied:
        """The way back."""
        return _Copied(self.replacement, self.original, self.package, self.packages)

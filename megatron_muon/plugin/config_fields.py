"""This package's options as fields of Megatron-Core's ``OptimizerConfig``, with its defaults.

Real code does much with a config: it derives classes whose ``__post_init__`` is empty, copies it field by field, calls
``dataclasses.replace`` and ``asdict``, writes YAML and reads it again. What is a field goes along. So fields are added
to the class and to the subclasses that it has already; those that are made later inherit them.

The defaults are those in force when a config is built (:func:`megatron_muon.plugin.options.current`). Where
Megatron-Core has an option too, its field gets this package's default (``muon_tp_mode`` auto, not blockwise).

A config that is built in code gets the refusals of the command line, whatever its class does after construction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import reprlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field
from typing import Any

from megatron_muon._patching import Patch
from megatron_muon.config import PREFIX, MuonConfig
from megatron_muon.plugin import options, precision_aware
from megatron_muon.plugin.arguments import megatron_defaults
from megatron_muon.plugin.optimizer_config import check_optimizer_config, is_ours

_CONFIG = "megatron.core.optimizer.optimizer_config:OptimizerConfig"


@functools.cache
def _types() -> dict[str, Any]:
    """The types of the fields, by name."""
    return {PREFIX + name: kind for name, kind in typing.get_type_hints(MuonConfig).items()}


_COPIED = "an OptimizerConfig was given all of Megatron-Core's Muon options and none of this package's"

_not_given: set[str] = set()
"""Options whose default was asked for since the last config was built."""


def _default(name: str) -> Any:
    _not_given.add(name)
    return getattr(options.current(), name.removeprefix(PREFIX))


@functools.cache
def _template(kw_only: bool) -> Any:
    """A dataclass with all options, whose fields and parameters ``OptimizerConfig`` gets."""
    members = [
        (name, kind, dataclasses.field(default_factory=functools.partial(_default, name)))
        for name, kind in _types().items()
    ]
    return dataclasses.make_dataclass("Options", members, kw_only=kw_only)


class _Hooks:
    """The functions on the class. One object for all: they must know which options Megatron-Core has itself."""

    def __init__(self) -> None:
        self.megatron: dict[str, Field[Any]] = {}
        """Megatron's fields of options that it has too."""
        self.ours: dict[str, Field[Any]] = {}
        """The fields that take their place, and those that are added."""

    def with_fields(self, original: dict[str, Field[Any]]) -> dict[str, Field[Any]]:
        """The fields of ``OptimizerConfig``."""
        self.megatron = {name: original[name] for name in _types() if name in original}
        # Megatron's keep their places among the positional parameters; what is added has none.
        self.ours = {name: _template(name not in self.megatron).__dataclass_fields__[name] for name in _types()}
        return self.with_fields_of_base(original)

    def with_fields_of_base(self, original: dict[str, Field[Any]]) -> dict[str, Field[Any]]:
        """The fields of a subclass that was made before: those that it has not defined itself are the base's.

        Added ones come before those that Megatron-Core has. Whoever reads a config from before ``install()`` field by
        field meets one that is missing first, and then finds all values settled (:meth:`with_late_options`).
        """
        added = {name: field for name, field in self.ours.items() if name not in original}
        first = next((name for name in original if name in self.megatron), None)
        fields: dict[str, Field[Any]] = {}
        for name, field in original.items():
            if name == first:
                fields |= added
            fields[name] = self.ours[name] if field is self.megatron.get(name) else field
        return fields | added

    def with_options(self, original: Callable[..., None]) -> Callable[..., None]:
        """An ``__init__`` that takes the options, around one that was generated without them."""
        signature = inspect.signature(original)
        taken = self.megatron.keys() | signature.parameters.keys()

        @functools.wraps(original)
        def __init__(config: Any, *args: Any, **kwargs: Any) -> None:
            _not_given.clear()  # of a config whose constructor has failed
            cls = type(config)
            positional = [field.name for field in dataclasses.fields(cls) if field.init and not field.kw_only]
            given = {*positional[: len(args)], *kwargs}
            for name, field in self.ours.items():
                if cls.__dataclass_fields__.get(name) is not field:
                    continue  # a subclass has a field of its own by this name
                if name not in taken:
                    setattr(config, name, kwargs.pop(name) if name in kwargs else _default(name))
                elif name not in given:
                    kwargs[name] = _default(name)
            original(config, *args, **kwargs)

        __init__.__signature__ = self._signature(signature)  # type: ignore[attr-defined]
        return __init__

    def _signature(self, original: inspect.Signature) -> inspect.Signature:
        """What ``__init__`` takes now."""
        ours = inspect.signature(_template(True)).parameters
        parameters = [
            parameter.replace(default=ours[name].default) if name in self.megatron else parameter
            for name, parameter in original.parameters.items()
        ]
        added = [
            parameter
            for name, parameter in ours.items()
            if name not in original.parameters.keys() | self.megatron.keys()
        ]
        rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        return original.replace(parameters=[*parameters, *added, *rest])

    def with_check(self, original: Callable[..., None]) -> Callable[..., None]:
        """A ``__post_init__`` that first looks at what the constructor was given."""

        @functools.wraps(original)
        def __post_init__(config: Any, *args: Any) -> None:
            cls = type(config)
            added = {name for name in self.ours.keys() - self.megatron.keys() if name not in self._own(cls)}
            try:
                if _not_given == added:
                    self.settle(config, megatron_defaults(), _COPIED)
                if is_ours(config.optimizer):
                    check_optimizer_config(config, is_complete=False)  # some may be set as attributes later
                    precision_aware.take(config)
            finally:
                _not_given.clear()
            if not is_ours(config.optimizer):
                original(config, *args)
                return
            gradients = precision_aware.clear(config)
            original(config, *args)
            config.main_grads_dtype = gradients

        return __post_init__

    def with_later_classes(self, original: Any) -> Any:
        """An ``__init_subclass__``, which Python calls when a subclass is made."""

        def __init_subclass__(cls: Any, /, **kwargs: Any) -> None:
            from megatron.core.optimizer.optimizer_config import OptimizerConfig

            super(OptimizerConfig, cls).__init_subclass__(**kwargs)
            method = vars(cls).get("__post_init__")
            if method is not None and not hasattr(method, "__wrapped__"):  # a class with slots is made twice
                cls.__post_init__ = self.with_check(method)

        return classmethod(__init_subclass__)

    def with_late_options(self, original: Callable[[Any, str], Any] | None) -> Callable[[Any, str], Any]:
        """A ``__getattr__``, which Python asks for what an object lacks."""

        def __getattr__(config: Any, name: str) -> Any:
            if name in self.ours:
                return self.settle(config, {}, "an OptimizerConfig is from before install()")[name]
            found = [vars(cls).get("__getattr__") for cls in type(config).__mro__]
            for other in filter(None, [original, *found[found.index(__getattr__) + 1 :]]):
                return other(config, name)  # as without the hook, which comes before other bases
            raise AttributeError(f"{type(config).__name__!r} object has no attribute {name!r}", name=name, obj=config)

        return __getattr__

    def settle(self, config: Any, parsed: Mapping[str, Any], what: str) -> dict[str, Any]:
        """Give a config the options in force, for those that it lacks and those that have Megatron-Core's defaults.

        What the config's class says itself counts.

        Args:
            config: from before ``install()``; or with all options of Megatron-Core's and none of ours, which somebody
                has copied: from arguments that were parsed before, from the file of a run without this package, or
                from a class of a framework's own.
            parsed: what Megatron-Core's command line would give.
            what: where the values come from, in words.

        Returns:
            the values of its fields.
        """
        own = self._own(type(config))
        defaults = {
            name: (field.default, parsed.get(name, field.default))
            for name, field in self.megatron.items()
            if name not in own
        }
        values: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            with contextlib.suppress(AttributeError):
                # Past __getattr__. Not of vars(): values may be in slots.
                values[field.name] = object.__getattribute__(config, field.name)
        options.supply(values, defaults, what)
        for name in self.ours:
            setattr(config, name, values[name])
        return values

    def _own(self, cls: type) -> set[str]:
        """Options of which a subclass has fields of its own: what it says, it has chosen."""
        fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
        return {
            name for name, field in self.ours.items() if fields.get(name) not in (None, field, self.megatron.get(name))
        }


def _if_generated(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Replace only methods that ``dataclass`` has written, which know the fields of their time."""

    def replace(original: Any) -> Any:
        code = getattr(inspect.unwrap(original), "__code__", None)
        return make(original) if code is not None and code.co_filename == "<string>" else original

    return replace


@reprlib.recursive_repr()
def _repr(config: Any) -> str:
    shown = (f"{field.name}={getattr(config, field.name)!r}" for field in dataclasses.fields(config) if field.repr)
    return f"{type(config).__qualname__}({', '.join(shown)})"


def _eq(config: Any, other: Any) -> Any:
    if type(other) is not type(config):
        return NotImplemented
    names = [field.name for field in dataclasses.fields(config) if field.compare]
    return all(getattr(config, name) == getattr(other, name) for name in names)


def _method(name: str, method: Callable[..., Any], reason: str) -> Patch:
    make = _if_generated(lambda original: method)
    return Patch(f"{_CONFIG}.{name}", make, reason, in_subclasses=make)


_hooks = _Hooks()

PATCHES = [
    Patch(
        f"{_CONFIG}.__dataclass_fields__",
        _hooks.with_fields,
        "the options are fields, which copies, replace(), asdict() and Megatron's own arguments carry along",
        in_subclasses=_hooks.with_fields_of_base,
    ),
    Patch(
        f"{_CONFIG}.__annotations__",
        lambda original: {**original, **_types()},
        "typing.get_type_hints() finds the types of fields there",
    ),
    Patch(
        f"{_CONFIG}.__init__",
        _hooks.with_options,
        "a config built in code takes the options, and has the same defaults as the command line",
        in_subclasses=_if_generated(_hooks.with_options),
    ),
    Patch(
        f"{_CONFIG}.__post_init__",
        _hooks.with_check,
        "a wrong Muon option in an OptimizerConfig is refused when it is built, before the model is",
        in_subclasses=_hooks.with_check,
    ),
    Patch(
        f"{_CONFIG}.__init_subclass__",
        _hooks.with_later_classes,
        "a wrong Muon option is refused by classes that are made later, too",
        create=True,
    ),
    Patch(
        f"{_CONFIG}.__getattr__",
        _hooks.with_late_options,
        "a config from before install() gets the options when one is first read",
        create=True,
    ),
    _method("__repr__", _repr, "the generated one knows the fields of its time, and would not show the options"),
    _method("__eq__", _eq, "the generated one would take configs with other options for equal"),
]
"""Hooks on the class ``OptimizerConfig``."""

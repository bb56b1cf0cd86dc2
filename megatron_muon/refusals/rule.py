"""A refusal as data: the settings that do not go together, why, and what to do instead.

The same rows are walked over whatever is known: parsed arguments, an ``OptimizerConfig``, a ``TransformerConfig``, a
:class:`megatron_muon.MuonConfig`, or several of them. Settings have the names of Megatron's arguments and of its
configs' fields, which agree (``muon_scale_mode``); a name with a dot is the field of one class alone
(``OptimizerConfig.use_distributed_optimizer``), where the argument of that name means something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_muon.choices import OPTIMIZERS, dtype_name
from megatron_muon.errors import ConfigError


class UnknownSettingError(LookupError):
    """A setting that none of the sources has."""


class Chosen:
    """What was chosen in a dataclass whose fields may still be set: all that differs from its default.

    Args:
        config: an object of the dataclass.
        names: fields that count in any case.
    """

    def __init__(self, config: Any, *names: str) -> None:
        self.of = type(config)
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            factory: Any = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            if field.name in names or value != default:
                setattr(self, field.name, value)


class Settings:
    """What is known of a run's settings, read-only.

    Args:
        sources: mappings, or objects with attributes; of a name that several have, the first one's value counts.
    """

    def __init__(self, *sources: object) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Any:
        """The value of a setting.

        Raises:
            UnknownSettingError: if no source has it.
        """
        owner, _, field = name.rpartition(".")
        for source in self._sources:
            cls = source.of if isinstance(source, Chosen) else type(source)
            if owner and owner not in (base.__name__ for base in cls.__mro__):
                continue
            if isinstance(source, Mapping):
                if field in source:
                    return source[field]
            elif hasattr(source, field):
                return getattr(source, field)
        raise UnknownSettingError(name)

    def get(self, name: str) -> Any:
        """The value of a setting; None if it is not known."""
        try:
            return self[name]
        except UnknownSettingError:
            return None

    @property
    def optimizer(self) -> str:
        """The name of the optimizer, without ``dist_``."""
        name: str = self["optimizer"]
        return name.removeprefix("dist_")

    @property
    def is_layer_wise(self) -> bool:
        """Whether each weight has one owner: by the older name ``dist_...``, a config's field, or the argument."""
        if self["optimizer"].startswith("dist_"):
            return True
        if self.get("use_layer_wise_distributed_optimizer"):
            return True
        if self.get("OptimizerConfig.use_layer_wise_distributed_optimizer") is not None:
            return False  # and what is not layer-wise may still say use_distributed_optimizer
        return bool(self["use_distributed_optimizer"])


@dataclass(frozen=True)
class Condition:
    """One part of a combination."""

    name: str  # of the setting that it is about
    holds: Callable[[Settings], bool]  # whether it does
    said: Callable[[Settings], str]  # how a message names it, with its value; empty if it goes without saying
    words: str  # how the documentation names it


@dataclass(frozen=True)
class Refusal:
    """A combination that is refused."""

    when: tuple[Condition, ...]  # conditions, all of which must hold; the message names them in this order
    because: str  # the reason; may be empty where ``instead`` says it all
    instead: str  # what to do
    where: str = ""  # added to what the message names (``on the CPU``)

    def holds(self, settings: Settings) -> bool:
        """Whether it does; not where a setting is unknown, since the row is walked again where it is known."""
        try:
            return all(condition.holds(settings) for condition in self.when)
        except UnknownSettingError:
            return False

    def message(self, settings: Settings) -> str:
        """Flags with their values, the reason and the way out."""
        head = _joined(condition.said(settings) for condition in self.when)
        where = f" {self.where}" if self.where else ""
        return f"{head}{where}: {'; '.join(part for part in (self.because, self.instead) if part)}."

    @property
    def words(self) -> str:
        """The combination, for the documentation."""
        return _joined(condition.words for condition in self.when)


def _joined(parts: Iterable[str]) -> str:
    """``a with b and c without d``."""
    first, *others = [part for part in parts if part]
    word = "with "
    for other in others:
        if other.startswith("without "):
            first += f" {other}"
        else:
            first, word = f"{first} {word}{other}", "and "
    return first


def refuse(rows: Iterable[Refusal], *sources: object) -> None:
    """Walk rows of the table over sources, see :class:`Settings`.

    Raises:
        ConfigError: with the messages of all rows that hold, one a line.
    """
    settings = Settings(*sources)
    if problems := [row.message(settings) for row in rows if row.holds(settings)]:
        raise ConfigError("\n".join(problems))


_FLAGS = {
    "nccl_ub": "--use-nccl-ub",
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "muon_layer_wise_param_layout": "--layer-wise-param-layout",  # as Megatron-LM has it
}
"""Settings whose flag has another name."""
_OFF = {"muon_split_qkv": "--muon-no-split-qkv"}
"""Those that are turned off by another name than ``--no-...``."""


def flag_of(name: str) -> str:
    """The command-line flag of a setting; a field of one class stays what it is."""
    return name if "." in name else _FLAGS.get(name, "--" + name.replace("_", "-"))


def _said(name: str, value: Any) -> str:
    if value is True and "." not in name:
        return flag_of(name)
    if value is False and "." not in name:
        return _OFF.get(name, flag_of(name).replace("--", "--no-", 1))
    if isinstance(value, (tuple, list)):
        value = " ".join(map(str, value))
    return f"{flag_of(name)} {getattr(value, 'name', value)}"  # some are members of an Enum


def that(name: str, test: Callable[[Any], bool], words: str) -> Condition:
    """A setting whose value passes a test; ``words`` describe such values after the flag."""
    return Condition(
        name,
        lambda settings: test(settings[name]),
        lambda settings: _said(name, settings[name]),
        f"`{flag_of(name)}` {words}".strip(),
    )


def of_dtype(name: str, *dtypes: str) -> Condition:
    """A setting that is one of these types of numbers."""
    return replace(one_of(name, *dtypes), holds=lambda settings: dtype_name(settings[name]) in dtypes)


def given(name: str) -> Condition:
    """A setting that is on, or has a value that is not zero or empty."""
    return that(name, bool, "True" if "." in name else "")


def missing(name: str) -> Condition:
    """A setting that is off, zero or empty."""
    without = f"without {flag_of(name)}"
    return Condition(name, lambda settings: not settings[name], lambda _: without, f"without `{flag_of(name)}`")


def turned_off(name: str, said: str) -> Condition:
    """A setting that is on by default, and off; ``said`` is what turns it off."""
    return Condition(name, lambda settings: not settings[name], lambda _: said, f"`{said}`")


def one_of(name: str, *values: Any) -> Condition:
    """A setting with one of these values."""
    found = that(name, lambda value: value in values, _listed(values))
    return found if len(values) > 1 else replace(found, words=f"`{flag_of(name)} {values[0]}`")


def other_than(name: str, *values: Any) -> Condition:
    """A setting with none of these values; a list counts as the tuple."""
    return that(
        name,
        lambda value: (tuple(value) if isinstance(value, list) else value) not in values,
        f"other than {_listed(values)}",
    )


def optimizer(*names: str) -> Condition:
    """A run with one of these optimizers, in either form."""
    named = f"`--optimizer {names[0]}`" if len(names) == 1 else f"`--optimizer` {_listed(names)}"
    words = "" if names == OPTIMIZERS else named
    return Condition("optimizer", lambda settings: settings.optimizer in names, _optimizer, words)


def ours() -> Condition:
    """A run with one of this package's optimizers, which goes without saying."""
    return Condition("optimizer", lambda settings: settings.optimizer in OPTIMIZERS, lambda _: "", "")


def other_optimizer(*names: str, said: str = "") -> Condition:
    """A run with none of these; ``said`` is added in the message."""
    return Condition(
        "optimizer",
        lambda settings: settings.optimizer not in names,
        lambda settings: _optimizer(settings) + said,
        f"`--optimizer` other than {_listed(names)}",
    )


def quietly(condition: Condition) -> Condition:
    """The same, which messages do not name: their reader knows."""
    return replace(condition, said=lambda _: "")


def layer_wise(is_so: bool = True) -> Condition:
    """A run with one of this package's optimizers whose weights have one owner each, or have not."""
    return Condition(
        "optimizer",
        lambda settings: settings.optimizer in OPTIMIZERS and settings.is_layer_wise == is_so,
        lambda settings: f"layer-wise {_optimizer(settings)}" if is_so else f"{_optimizer(settings)}, not layer-wise",
        "a layer-wise optimizer (`--use-distributed-optimizer`)" if is_so else "an optimizer that is not layer-wise",
    )


def _optimizer(settings: Settings) -> str:
    return f"--optimizer {settings['optimizer']}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(f"`{value}`" for value in values if value not in ((), "")) or "none"


def unread(name: str, default: Any, readers: Sequence[str], reasons: Mapping[str, str]) -> tuple[Refusal, ...]:
    """The rows that refuse a flag whose optimizer would not read it: somebody relies on a flag that is given.

    ``reasons`` are those optimizers that do not read it for a reason of their own.
    """
    asked = other_than(name, default)
    rows = [Refusal((asked, optimizer(other)), why, "leave it out") for other, why in reasons.items()]
    *names, last = readers
    others = other_optimizer(*readers, *reasons, said=", which does not read it")
    way_out = f"leave it out, or use --optimizer {' or '.join(filter(None, (', '.join(names), last)))}"
    return (*rows, Refusal((asked, others), "", way_out))

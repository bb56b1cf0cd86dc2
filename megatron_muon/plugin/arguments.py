"""The command line of ``megatron.training``: flags from :class:`MuonConfig`, refusals before the model is built."""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import Field, fields, replace
from typing import Any

from megatron_muon._patching import Original, Patches
from megatron_muon.choices import OPTIMIZERS
from megatron_muon.config import PREFIX, SECOND_MOMENT, UNREAD, MuonConfig, flag
from megatron_muon.errors import ConfigError
from megatron_muon.plugin import options, precision_aware, spellings
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.refusals import MUON, Settings, refuse
from megatron_muon.refusals.rule import flag_of

PATCHES = Patches()


@PATCHES.around(
    "megatron.training.arguments:add_megatron_arguments",
    "the --muon-* flags are those of MuonConfig, with its defaults",
)
def _with_flags(original: Original, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = original(parser)
    # Megatron has some of these flags already: ours replace them, so that defaults and help have one source.
    handler, parser.conflict_handler = parser.conflict_handler, "resolve"
    try:
        group = parser.add_argument_group("muon (megatron_muon)")
        defaults = options.flag_defaults()
        for field in fields(MuonConfig):
            option, dest, default = flag(field.name), PREFIX + field.name, getattr(defaults, field.name)
            if isinstance(field.default, bool):
                _add_switch(group, option, dest, default, field)
            else:
                _add_flag(group, option, dest, default, field.metadata["help"], type(field.default))
        for name, (default, about) in SECOND_MOMENT.items():
            _add_flag(group, flag_of(name), name, default, about, type(default))
    finally:
        parser.conflict_handler = handler
    _add_optimizers(parser)
    _mend_help(parser)
    spellings.watch(parser)
    return parser


def _add_flag(group: argparse._ArgumentGroup, option: str, dest: str, default: Any, about: str, kind: type) -> None:
    """One flag of a value. It is checked later: argparse would print Megatron's whole usage."""
    text = f"{about} Default: {default or 'none'}.".replace("%", "%%")
    if kind is tuple:
        form: dict[str, Any] = {"action": _Append, "metavar": "RULE" if "rule" in dest else "A,B,C"}
    else:
        form = {"type": _parse(kind), "metavar": kind.__name__.upper()}
    group.add_argument(option, dest=dest, default=default, help=text, **form)


def _add_switch(group: argparse._ArgumentGroup, option: str, dest: str, default: bool, field: Field[Any]) -> None:
    """A flag that is on or off, with the flag that turns it off."""
    text = f"{field.metadata['help']} Default: {default or 'none'}."
    group.add_argument(option, dest=dest, action="store_true", default=default, help=text)
    off = (option.replace("--", "--no-", 1), *field.metadata["aliases"])
    group.add_argument(*off, dest=dest, action="store_false", default=default, help=f"Turns {option} off.")


def _add_optimizers(parser: argparse.ArgumentParser) -> None:
    """``--optimizer`` takes the names of a fixed list."""
    for action in parser._actions:
        if action.dest == "optimizer" and action.choices is not None:
            action.choices = list(dict.fromkeys([*action.choices, *OPTIMIZERS]))


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Some of Megatron-Core's help texts hold a bare per cent sign, at which argparse fails to print any help."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (KeyError, TypeError, ValueError):
            action.help = (action.help or "").replace("%", "%%")


class _Append(argparse.Action):
    """Collects the values of a repeatable flag in a tuple."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), values))


def _parse(kind: type) -> Callable[[str], Any]:
    """Parse as ``kind``; text that does not parse stays text, for the check to refuse by name."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return parse


@PATCHES.around(
    "megatron.training.arguments:validate_args",
    "wrong Muon flags are refused before anything is built, with flag, value and way out",
)
def _with_check(original: Original, args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
    _complete(args)
    if is_ours(args.optimizer):
        precision_aware.take(args)
        options.take_arguments(from_arguments(args))
    else:
        _check_unread(args)
        known = {name: getattr(args, PREFIX + name) for name in options.ANY_OPTIMIZER}
        MuonConfig(**known).validate()
        options.take_arguments(replace(options.current(), **known))
    return original(args, *rest, **kwargs)


def from_arguments(args: argparse.Namespace) -> MuonConfig:
    """The options of parsed arguments, checked with all else that they say.

    What Megatron refuses late, badly or not at all is refused here.

    Raises:
        ConfigError: naming flags, values and the way out.
    """
    muon = MuonConfig(**{field.name: getattr(args, PREFIX + field.name) for field in fields(MuonConfig)})
    muon.validate(pairs=False)
    refuse((*UNREAD, *MUON), args)
    return muon


def _check_unread(args: argparse.Namespace) -> None:
    """Flags that Megatron's own optimizer does not read: a flag that only this package has is refused.

    Of one that Megatron-Core has, too, a line is said: without this package it would have trained.
    """
    known = Settings(given(args))
    unread = [row for row in UNREAD if row.holds(known)]
    megatron = megatron_defaults() if unread else {}
    theirs = [row for row in unread if row.when[0].name in megatron]
    refuse([row for row in unread if row not in theirs], given(args))
    for row in theirs:
        options.say(f"note: {row.message(known)}")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments without what they have from ``install(config)``: nobody gave a run of Adam these flags."""
    installed = options.installed().as_settings()
    return {name: value for name, value in vars(args).items() if name not in installed or value != installed[name]}


@PATCHES.around(
    "megatron.training.training:get_megatron_optimizer_config",
    "arguments from before install() have no options, and options given to install() since are not lost",
)
def _with_known_options(original: Original, args: argparse.Namespace) -> tuple[Any, Any]:
    _complete(args)
    if is_ours(getattr(args, "optimizer", None)):
        _check_late(args)
        if getattr(args, "yaml_cfg", None):  # then validate_args() was not called
            refuse(MUON, args)
    return original(args)  # copies all arguments that are fields


def _complete(args: argparse.Namespace) -> None:
    """Give the options in force to arguments that were parsed before ``install()``."""
    names = [PREFIX + field.name for field in fields(MuonConfig)]
    if not all(hasattr(args, name) for name in names):
        defaults = {name: (value,) for name, value in megatron_defaults().items()}
        options.supply(vars(args), defaults, "the command line is from before install()")


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Flags of Megatron and of this package whose values are not the defaults, also where Megatron has set them."""
    module = sys.modules.get("megatron.training.arguments")
    defaults = {} if module is None else _all_defaults(inspect.unwrap(module.add_megatron_arguments))
    defaults = {**defaults, **MuonConfig().as_settings()}
    values = {name: value for name, value in vars(args).items() if name in defaults and value != defaults[name]}
    return {flag_of(name): _plain(value) for name, value in sorted(values.items())}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, (list, tuple)):
        return [*map(_plain, value)]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def megatron_defaults() -> dict[str, Any]:
    """The options that Megatron-Core's command line has without this package, with their defaults.

    Empty where nothing has imported it: then no arguments were parsed by it.
    """
    module = sys.modules.get("megatron.training.arguments")
    return {} if module is None else _defaults_of(inspect.unwrap(module.add_megatron_arguments))


def _defaults_of(add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]) -> dict[str, Any]:
    return {name: value for name, value in _all_defaults(add_arguments).items() if name.startswith(PREFIX)}


@functools.cache
def _all_defaults(add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]) -> dict[str, Any]:
    return vars(add_arguments(argparse.ArgumentParser()).parse_args([]))


def _check_late(args: argparse.Namespace) -> None:
    """Refuse options given to ``install()`` after the command line was read, if it says otherwise.

    Raises:
        ConfigError: naming the first option that differs.
    """
    late = options.given_late()
    if late is None:
        return
    for field in fields(MuonConfig):
        asked, parsed = getattr(late, field.name), getattr(args, PREFIX + field.name)
        if asked != parsed:
            raise ConfigError(
                f"install(MuonConfig({field.name}={asked!r})) was called after the command line was read, which has "
                f"{flag(field.name)} {parsed or 'none'}: call it before, or give the flag."
            )

"""What a knob of :class:`megatron_muon.MuonConfig` is, and how values of it are checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from megatron_muon.choices import (
    AUTO_STEPS,
    COEFFICIENTS,
    OPTIMIZERS,
    PARAM_CHOICES,
    STEPS,
    VARIANTS,
    kind_of,
    parse_form,
    parse_param_rule,
    parse_transfer,
)

EVERY_OPTIMIZER: tuple[str, ...] = ()
"""Readers of a knob that acts with Megatron's own optimizers, too."""


def knob(
    default: Any,
    help: str,
    *,
    check: Callable[[Any], str | None],
    aliases: tuple[str, ...] = (),
    readers: tuple[str, ...] = OPTIMIZERS,
    reasons: Mapping[str, str] | None = None,
) -> Any:
    """A field of :class:`MuonConfig`.

    Args:
        default: its default value.
        help: one sentence for ``--help``.
        check: returns what is wrong with a value and how to mend it, or None.
        aliases: further option strings for the value False of a boolean (Megatron's own spelling).
        readers: optimizers that read it. With others it is refused, unless it has its default.
        reasons: why some of the others do not, where there is more to say.
    """
    metadata = {"help": help, "check": check, "aliases": aliases, "readers": readers, "reasons": reasons or {}}
    return dataclasses.field(default=default, metadata=metadata)


def one_of(*values: str, hints: dict[str, str] | None = None) -> Callable[[Any], str | None]:
    """Only these values; ``hints`` has messages for some others."""

    def check(value: Any) -> str | None:
        if value in values:
            return None
        near = difflib.get_close_matches(str(value), values, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return (hints or {}).get(str(value), f"choose one of {', '.join(values)}{meant}")

    return check


def whole(least: int, usual: str = "") -> Callable[[Any], str | None]:
    """Only whole numbers from ``least`` on."""
    problem = f"give a whole number of at least {least}{usual and f' ({usual} is usual)'}"
    return lambda value: None if type(value) is int and value >= least else problem


def number(holds: Callable[[float], bool], wanted: str) -> Callable[[Any], str | None]:
    """Only finite numbers for which ``holds`` is true; ``wanted`` describes them."""

    def check(value: Any) -> str | None:
        is_number = isinstance(value, Real) and not isinstance(value, bool)  # numpy's, too
        return None if is_number and math.isfinite(value) and holds(value) else f"give a {wanted}"

    return check


positive = number(lambda value: value > 0, "positive number")
not_negative = number(lambda value: value >= 0, "number of at least 0")
decay = number(lambda value: 0 <= value < 1, "number from 0 to below 1 (0.95 is usual)")


def text(value: Any) -> str | None:
    """Only a path, or an empty string."""
    return None if isinstance(value, str) else "give a path, or an empty string for none"


def boolean(value: Any) -> str | None:
    """Only True or False."""
    return None if isinstance(value, bool) else "give True or False"


def known_coefficients(value: Any) -> str | None:
    """Only the name of a set of coefficients."""
    from megatron_muon.orthogonalize.coefficients import CUSTOM, coefficient_types

    names = (*coefficient_types(), CUSTOM)
    return None if value in names else f"choose one of {', '.join(names)}"


def known_variant(value: Any) -> str | None:
    """Only the name of a variant, be it one that a user has registered."""
    return one_of(*VARIANTS)(value)


def coefficient_triples(value: Any) -> str | None:
    """Only a list of strings ``a,b,c``."""
    from megatron_muon.orthogonalize.coefficients import parse_triple

    if not isinstance(value, (tuple, list)) or not all(isinstance(triple, str) for triple in value):
        return "give a list of a,b,c strings"
    try:
        list(map(parse_triple, value))
    except ValueError:
        return "give three numbers a,b,c for each step, such as 3.4445,-4.775,2.0315"
    return None


def transfer_base(value: Any) -> str | None:
    """Only ``WIDTHxDEPTH``, or an empty string."""
    if value == "":
        return None
    try:
        parse_transfer(value)
    except (AttributeError, ValueError):
        return "give WIDTHxDEPTH, hidden size and layers of the model that was tuned, such as 256x4"
    return None


def param_rules(value: Any) -> str | None:
    """Only a list of strings ``GLOB=CHOICE``."""
    if not isinstance(value, (tuple, list)) or not all(isinstance(rule, str) for rule in value):
        return "give a list of GLOB=CHOICE strings"
    for rule in value:
        glob, choice = parse_param_rule(rule)
        kind, own = kind_of(choice), choice.partition(":")[2]
        problem = None
        if kind == STEPS and own != AUTO_STEPS and not (own.isascii() and own.isdigit() and int(own)):
            problem = f"give a whole number of at least 1, such as {STEPS}:7, or {STEPS}:{AUTO_STEPS}"
        elif kind == COEFFICIENTS:
            problem = known_coefficients(own)
        form = None
        try:
            form = parse_form(choice)
        except ValueError as error:
            problem = str(error)
        known = kind in (STEPS, COEFFICIENTS) or choice in PARAM_CHOICES or form is not None
        if not glob or problem or not known:
            choices = ", ".join(
                (*PARAM_CHOICES, "split(NAME ROWS, ...)", f"{STEPS}:N", f"{STEPS}:{AUTO_STEPS}", f"{COEFFICIENTS}:NAME")
            )
            return f"{rule!r}: {problem}" if problem else f"{rule!r} is not GLOB=CHOICE with a choice of {choices}"
    return None

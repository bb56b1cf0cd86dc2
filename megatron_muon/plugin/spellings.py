"""Flags that a parser does not know: those that launch scripts carry from elsewhere, and those that are misspelt.

A parser that skips what it does not know (``parse_known_args``) would lose them without a word.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import sys
from collections.abc import Collection, Sequence
from typing import Any

from megatron_muon.errors import ConfigError
from megatron_muon.plugin import options
from megatron_muon.plugin.optimizer_config import is_ours

RENAMED = {"--muon-use-nesterov": "--muon-nesterov", "--no-muon-use-nesterov": "--no-muon-nesterov"}
"""Of earlier Megatron-Core: taken as what means the same now."""

ELSEWHERE = {
    "--use-layer-wise-distributed-optimizer": "--use-distributed-optimizer, which is layer-wise with --optimizer muon",
    "--muon-matched-adamw-rms": "--muon-scale-mode spectral --muon-extra-scale-factor with its value",
    "--muon-qkv-split-mode": "--muon-qkv split, per_head or whole",
    "--apply-muon-qk-clip": "--qk-clip",
}
"""Of earlier Megatron-Core and of forks, with what to give instead."""

_OURS = ("--muon-", "--no-muon-", "--adaptive-muon-")


def watch(parser: argparse.ArgumentParser) -> None:
    """Have a parser take old names, and refuse what would be a flag of this package if it were one."""
    original = parser.parse_known_args

    @functools.wraps(original)
    def parse_known_args(args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        known = parser._option_string_actions
        given = [_renamed(word, known) for word in (sys.argv[1:] if args is None else args)]
        found, rest = original(given, namespace)
        problems = [problem for word in rest if (problem := _problem(word.partition("=")[0], known))]
        if problems and is_ours(getattr(found, "optimizer", None)):
            raise ConfigError("\n".join(problems))
        for problem in problems:
            options.say(problem)  # Megatron-Core decides whether its own optimizers train without it
        return found, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def _renamed(word: str, known: Collection[str]) -> str:
    if word not in RENAMED or word in known:
        return word
    _say_once(f"{word} is taken as {RENAMED[word]}.")
    return RENAMED[word]


@functools.cache
def _say_once(text: str) -> None:
    """The launcher parses the script's flags too, before the script does."""
    options.say(text)


def _problem(name: str, known: Collection[str]) -> str:
    """What is wrong with a word that nobody has taken; empty if it is none of ours."""
    if name in ELSEWHERE:
        return f"{name}: there is no such flag here; use {ELSEWHERE[name]}."
    usual = name.replace("_", "-")
    ours = [flag for flag in known if flag.startswith(_OURS)]
    near = difflib.get_close_matches(usual, ours, 1, cutoff=0.75 if usual.startswith(_OURS) else 0.85)
    if near:
        return f"{name}: there is no such flag; did you mean {near[0]}?"
    return f"{name}: there is no such flag; SCRIPT --help lists all." if usual.startswith(_OURS) else ""

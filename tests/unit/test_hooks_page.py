"""docs/hooks.md says of every hook why it must be, in the words of the code."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest

from megatron_muon import cpu, plugin
from megatron_muon._patching import Patches
from megatron_muon.plugin import frameworks
from tools.docs import HOOKS
from tools.upstream import page
from tools.upstream.proposals import PROPOSALS

DESCRIBED = [*plugin.describe(), *frameworks.PATCHES.describe(), *cpu.describe()]


def test_the_page_is_what_the_code_says() -> None:
    assert HOOKS.read_text(encoding="utf-8") == page.render(), "python -m tools.docs"


def test_every_hook_is_in_it_with_its_reason() -> None:
    text = page.render()
    for target, reason in DESCRIBED:
        assert f"`{target}`" in text or f"`{target.partition(':')[2]}`" in text, target
        assert reason.replace("|", "\\|") in text, target


def test_no_file_of_hooks_is_left_out() -> None:
    hooked = {target for target, _ in plugin.describe()}
    for info in pkgutil.iter_modules(plugin.__path__):
        patches = getattr(importlib.import_module(f"{plugin.__name__}.{info.name}"), "PATCHES", None)
        if isinstance(patches, Patches):
            assert {patch.target for patch in patches} <= hooked, f"plugin/__init__.py: list {info.name}"


def test_every_reason_is_a_sentence() -> None:
    short = [target for target, reason in DESCRIBED if len(reason.split()) < 3]
    assert not short


@pytest.mark.parametrize("change", PROPOSALS, ids=lambda change: change.subject)
def test_proposals_end_hooks_that_there_are(change: object) -> None:
    hooked = {target for target, _ in plugin.describe()}
    assert change.fixes and set(change.fixes) <= hooked  # type: ignore[attr-defined]


def test_the_numbers_are_those_of_the_tables() -> None:
    text = page.render()
    functions, private, hooks, ended = map(
        int,
        re.search(
            r"replaces (\d+) functions.*?, (\d+) of them private, by\n(\d+) hooks.*end it: (\d+) of", text, re.DOTALL
        ).groups(),  # type: ignore[union-attr]
    )
    rows = [line for line in text.partition("## In frameworks")[0].splitlines() if line.startswith("| `")]
    assert functions == len(rows) == len({target for target, _ in plugin.describe()})
    assert hooks == len(plugin.describe()) and 0 < private < functions
    assert ended == sum(not line.endswith("|  |") for line in rows)

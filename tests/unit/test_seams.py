"""The functions of Megatron-Core that are hooked are those that the hooks were written for.

A hook whose function has moved may still be put in place and do something else. docs/upgrading.md says what to do when
this fails.
"""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

from tools.upstream.__main__ import SEAMS, folder_of, installed, version_of
from tools.upstream.edits import find, path_of
from tools.upstream.seams import differences, fingerprints, hooked

SOURCES = installed()
HOOKED = hooked()
RECORDED = json.loads((folder_of("0.19.2") / SEAMS).read_text())


@pytest.mark.skipif(version_of(SOURCES) != "0.19.2", reason="recorded for megatron-core 0.19.2")
def test_what_is_hooked_has_not_changed() -> None:
    lines = differences(RECORDED, fingerprints(SOURCES, HOOKED))
    assert not lines, "\n".join(["hooked functions of Megatron-Core have changed (docs/upgrading.md):", *lines])


def test_every_hook_is_recorded() -> None:
    new, gone = set(HOOKED) - set(RECORDED), set(RECORDED) - set(HOOKED)
    assert not new | gone, f"python -m tools.upstream seams --write; new: {sorted(new)}, gone: {sorted(gone)}"


def altered(tree: Path, target: str) -> None:
    """Change what ``target`` does, in a copy of its file: a statement at its end."""
    path = path_of(SOURCES, target)
    (tree / path).parent.mkdir(parents=True)
    shutil.copyfile(SOURCES / path, tree / path)
    text = (tree / path).read_text()
    name = target.partition(":")[2]
    module = ast.parse(text)
    node = find(module, name) or find(module, name.rpartition(".")[0])
    if node is None:
        (tree / path).write_text(f"{text}\n{name} = {name}\n")
        return
    lines = text.splitlines(keepends=True)
    last = node.body[-1]  # type: ignore[attr-defined]
    lines.insert(last.end_lineno, f"{' ' * last.col_offset}pass  # altered\n")
    (tree / path).write_text("".join(lines))


@pytest.mark.parametrize("target", HOOKED)
def test_an_altered_function_is_named(tmp_path: Path, target: str) -> None:
    altered(tmp_path, target)
    found = fingerprints(tmp_path, [target])
    assert differences({target: RECORDED[target]}, found) == [f"{target}: source has changed"]


def test_a_signature_and_a_removal_are_named(tmp_path: Path) -> None:
    target = "megatron.training.arguments:validate_args"
    path = path_of(SOURCES, target)
    (tmp_path / path).parent.mkdir(parents=True)
    text = (SOURCES / path).read_text()
    expected = {target: RECORDED[target]}
    (tmp_path / path).write_text(text.replace("def validate_args(args, defaults={}):", "def validate_args(args):"))
    lines = differences(expected, fingerprints(tmp_path, [target]))
    assert lines == [f"{target}: signature (args), was (args, defaults={{}})"]
    other = tmp_path / "other"
    (other / path).parent.mkdir(parents=True)
    (other / path).write_text(text.replace("def validate_args(", "def check_args("))
    assert differences(expected, fingerprints(other, [target])) == [f"{target}: does not exist"]

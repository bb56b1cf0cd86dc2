"""The unit tests that the patches ship: they pass where the patches are, and each file fails where they are not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.patched import TIMEOUT_S, patched_tree, stored_patches
from tools.upstream.__main__ import folder_of, installed, version_of
from tools.upstream.edits import Change
from tools.upstream.fixes import ALONE
from tools.upstream.proposals import PROPOSALS
from tools.upstream.series import RELEASES

pytestmark = pytest.mark.skipif(version_of(installed()) != "0.19.2", reason="the patches are for megatron-core 0.19.2")


def shipped(changes: Sequence[Change]) -> dict[str, str]:
    return {path: text for change in changes for path, text in change.files.items() if path.startswith("tests/")}


def results(tree: Path, files: Sequence[str]) -> dict[str, set[str]]:
    """What came of the tests of each file, run as upstream does: without this package and its settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", "--rootdir", str(tree), *files],
        cwd=tree,
        env={**environment, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    found: dict[str, set[str]] = {}
    for outcome, file in re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+?\.py)", run.stdout, re.MULTILINE):
        found.setdefault(file, set()).add(outcome)
    assert set(found) == set(files), run.stdout + run.stderr
    return found


def test_every_fix_has_a_test() -> None:
    assert len(shipped(ALONE)) == len(ALONE) == 10


@pytest.mark.slow
def test_they_pass_with_the_patches() -> None:
    files = shipped(RELEASES["0.19.2"])
    with patched_tree() as tree:
        assert all((tree / path).read_text() == text for path, text in files.items())
        assert results(tree, list(files)) == {path: {"PASSED"} for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PROPOSALS)), ids=lambda number: PROPOSALS[number].subject)
def test_proposals_pass_by_themselves(number: int) -> None:
    [patch] = folder_of("0.19.2").glob(f"proposals/{number + 1:04d}-*.patch")
    files = shipped([PROPOSALS[number]])
    with patched_tree([patch]) as tree:
        assert results(tree, list(files)) == {path: {"PASSED"} for path in files}


@pytest.mark.slow
def test_they_fail_without() -> None:
    files = shipped(ALONE)
    with patched_tree([]) as tree:
        for path, text in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        passed = [path for path, outcomes in results(tree, list(files)).items() if "FAILED" not in outcomes]
    assert not passed


@pytest.mark.parametrize("number", range(len(ALONE)), ids=lambda number: ALONE[number].subject)
def test_each_fix_applies_to_the_release_by_itself(number: int) -> None:
    assert not ALONE[number].needs
    paths = {edit.path for edit in ALONE[number].edits}
    with patched_tree([stored_patches()[number]], paths) as tree:
        assert all((tree / path).is_file() for path in ALONE[number].files)

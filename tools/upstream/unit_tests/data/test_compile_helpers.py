"""compile_helpers() in a checkout, and in an installed wheel."""

import importlib.util
import subprocess
from types import SimpleNamespace

import pytest

from megatron.core.datasets import utils


@pytest.mark.parametrize(
    "has_makefile,has_helpers,compiles",
    [(True, True, True), (True, False, True), (False, False, True), (False, True, False)],
)
def test_what_the_wheel_ships_is_not_compiled(
    monkeypatch, tmp_path, has_makefile, has_helpers, compiles
):
    if has_makefile:
        (tmp_path / "Makefile").touch()
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_helpers else None)
    utils.compile_helpers()
    assert commands == ([["make", "-C", str(tmp_path)]] if compiles else [])

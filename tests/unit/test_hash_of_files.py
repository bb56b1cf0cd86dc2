"""The hash by which ranks compare the files of this package."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_muon.plugin import environment


def test_what_editors_leave_is_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emacs marks a file that is being edited with a link to nowhere, Jupyter keeps copies in hidden folders."""
    (tmp_path / "plugin" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "plugin" / "environment.py"))
    hash_of_files = environment._hash_of_files.__wrapped__
    before = hash_of_files()
    (tmp_path / ".#a.py").symlink_to("user@host.1")
    (tmp_path / "plugin" / ".ipynb_checkpoints" / "a-checkpoint.py").write_text("x = 2")
    assert hash_of_files() == before
    (tmp_path / "a.py").write_text("x = 2")
    assert hash_of_files() != before

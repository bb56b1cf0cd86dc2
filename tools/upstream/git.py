"""Git in a temporary folder, with the same result on every machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

AUTHOR = "megatron_muon contributors"
EMAIL = "megatron-muon@users.noreply.github.com"
DATE = "2026-11-23T00:00:00+0000"


def git(tree: Path, *arguments: str) -> str:
    """Run git in ``tree``, without anybody's settings; its output.

    Raises:
        RuntimeError: with what git says.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": AUTHOR,
        "GIT_AUTHOR_EMAIL": EMAIL,
        "GIT_AUTHOR_DATE": DATE,
        "GIT_COMMITTER_NAME": AUTHOR,
        "GIT_COMMITTER_EMAIL": EMAIL,
        "GIT_COMMITTER_DATE": DATE,
        "LC_ALL": "C",
    }
    result = subprocess.run(
        ["git", "-c", "core.autocrlf=false", "-c", "gc.auto=0", *arguments],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"git {arguments[0]}: {result.stdout}{result.stderr}")
    return result.stdout


def copy_sources(sources: Path, tree: Path, paths: Iterable[str] | None = None) -> None:
    """Copy Megatron's sources into ``tree`` and put them under git, in one commit.

    Args:
        sources: the folder that has ``megatron``.
        tree: a new folder.
        paths: which files; None for all of ``megatron/core`` and ``megatron/training``, compiled helpers included.
    """
    if paths is None:
        for package in ("core", "training"):
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(sources / "megatron" / package, tree / "megatron" / package, ignore=skip)
    else:
        for path in paths:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sources / path, tree / path)
    git(tree, "init", "--quiet")
    commit_all(tree, "Megatron-Core as released")


def commit_all(tree: Path, message: str) -> None:
    """Commit everything in ``tree``."""
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", message)

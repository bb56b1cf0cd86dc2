"""A copy of the installed Megatron-Core with the git patches of ``patches/``, and what runs on it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tools.upstream.__main__ import folder_of, installed, version_of
from tools.upstream.build import apply
from tools.upstream.git import copy_sources

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120


def stored_patches() -> list[Path]:
    """The patches for the installed version, in order."""
    return sorted(folder_of(version_of(installed())).glob("*.patch"))


@contextlib.contextmanager
def patched_tree(patches: Sequence[Path] | None = None, paths: Iterable[str] | None = None) -> Iterator[Path]:
    """The installed sources, or some of the files, with ``patches``, applied by ``git am``; all of them if None."""
    with tempfile.TemporaryDirectory(prefix="patched-") as folder:
        tree = Path(folder)
        copy_sources(installed(), tree, paths)
        apply(stored_patches() if patches is None else patches, tree)
        if paths is None:
            _copy_bytecode(tree)
        yield tree


def _copy_bytecode(tree: Path) -> None:
    """Of the files that the patches leave as they are: Python takes it where time and size of the source agree."""
    for package in ("core", "training"):
        for folder in (installed() / "megatron" / package).rglob("__pycache__"):
            shutil.copytree(folder, tree / folder.relative_to(installed()), dirs_exist_ok=True)


@functools.cache
def metadata_folder() -> Path:
    """A folder with the metadata of this package, as if it were installed: its entry points are found there."""
    folder = Path(tempfile.mkdtemp(prefix="metadata-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    line = [sys.executable, "-W", "ignore", "-c", "import setuptools; setuptools.setup()", "-q", "egg_info"]
    line += ["--egg-base", str(folder)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True, timeout=TIMEOUT_S)
    return folder


def search_path(tree: Path) -> list[str]:
    """What is put first on the path: the patched sources, the package and its metadata."""
    return [str(tree), str(ROOT), str(metadata_folder())]


def environment(tree: Path, **variables: str) -> dict[str, str]:
    """The variables of a process that runs on the patched sources."""
    ours = {"PYTHONPATH": os.pathsep.join(search_path(tree)), "MEGATRON_CORE_PLUGINS": "megatron_muon"}
    return {**os.environ, "PYTHONWARNINGS": "ignore", **ours, **variables}


def run(code: str, tree: Path, **variables: str) -> str:
    """Run ``code`` on the patched sources in a new interpreter; its output."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=environment(tree, **variables),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout

"""Makes the git patches of a released version, and applies them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.upstream.edits import Change, path_of
from tools.upstream.git import AUTHOR, EMAIL, commit_all, copy_sources, git

__all__ = ["apply", "build"]


def build(sources: Path, series: Sequence[Change]) -> dict[str, bytes]:
    """The patches of ``series``, by their file names.

    Args:
        sources: the folder that has the released ``megatron``.
        series: in the order to apply.

    Raises:
        EditError: if the sources are not those that the series is for.
    """
    with tempfile.TemporaryDirectory(prefix="upstream-") as folder:
        tree, made = Path(folder) / "tree", Path(folder) / "patches"
        copy_sources(sources, tree, _touched(sources, series))
        for change in series:
            change.apply(tree)
            commit_all(tree, f"{change.subject}\n\n{change.body}\n\nSigned-off-by: {AUTHOR} <{EMAIL}>\n")
        options = ["--zero-commit", "--no-signature", "--full-index", "--no-stat", "--no-renames", "--unified=3"]
        options += ["--no-numbered", "--filename-max-length=100"]
        git(tree, "format-patch", *options, "--output-directory", str(made), f"-{len(series)}")
        return {path.name: path.read_bytes() for path in sorted(made.iterdir())}


def apply(patches: Sequence[Path], tree: Path) -> None:
    """Apply patches with ``git am`` to a tree under git.

    Raises:
        RuntimeError: with what git says.
    """
    git(tree, "am", "--quiet", *(str(patch) for patch in patches))


def _touched(sources: Path, series: Sequence[Change]) -> set[str]:
    """The released files that the series changes."""
    return {
        path
        for change in series
        for path in (*(edit.path for edit in change.edits), *(path_of(sources, point) for point in change.points))
    }

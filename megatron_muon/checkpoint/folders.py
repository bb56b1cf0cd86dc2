"""Folders of checkpoints: which iteration is whole, and which is the newest of these."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_muon.checkpoint.errors import CheckpointError

__all__ = [
    "TRACKER",
    "check_marks",
    "folder_of",
    "forget",
    "interruption",
    "is_tracker_text",
    "is_whole",
    "iteration_of",
    "newest",
    "resolve",
    "tracked",
    "write_tracker",
]

TRACKER = "latest_checkpointed_iteration.txt"
"""Names the iteration that a run resumes from."""

_WHOLE = "metadata.json"
"""Megatron-Core writes it last."""
_INDEX = ".metadata"
_OVERWRITTEN = "being_written_over"
"""Says of a folder without marks that it once was whole; without meaning in a whole one."""
_ITERATION = re.compile(r"iter_(\d+)$")


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint was written to its end."""
    return _is_mark(folder / _WHOLE) and (folder / _INDEX).is_file()


def _is_mark(path: Path) -> bool:
    """Whether it is there with all of its contents: Megatron-Core opens the file first, and then writes it."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def check_marks(folder: Path) -> None:
    """Refuse a checkpoint that was not written to its end.

    Raises:
        CheckpointError: naming the first file that is not there.
    """
    if is_whole(folder):
        return
    name = _WHOLE if (folder / _INDEX).is_file() else _INDEX
    state = "is damaged" if (folder / name).is_file() else "is missing"
    raise CheckpointError(
        f"{folder} is not whole: {name} {state}, so its writing was interrupted, or the file was lost. Load another "
        "checkpoint (--ckpt-step)."
    )


def iteration_of(folder: Path) -> int | None:
    """From the folder's name."""
    found = _ITERATION.search(folder.name)
    return int(found.group(1)) if found else None


def folder_of(root: Path, text: str) -> Path:
    """The folder that a tracker with this text names."""
    return root / (text if text == "release" else f"iter_{int(text):07d}")


def newest(root: Path) -> int | None:
    """The last iteration that is whole."""
    whole = [iteration_of(folder) for folder in root.glob("iter_*") if is_whole(folder)]
    return max((iteration for iteration in whole if iteration is not None), default=None)


def tracked(root: Path) -> str | None:
    """What the tracker says; None if there is none, or nothing in it."""
    path = root / TRACKER
    return (path.read_text(errors="replace").strip() or None) if path.is_file() else None


def is_tracker_text(text: str | None) -> bool:
    """Whether a tracker may say this."""
    return text is not None and (text.isdecimal() or text == "release")


def write_tracker(root: Path, text: str) -> None:
    """Write the tracker so that it is the old one or the new one at any moment."""
    scratch = root / f".{TRACKER}.new"
    scratch.write_text(text)
    scratch.replace(root / TRACKER)


def forget(folder: Path) -> None:
    """Take the marks of a whole checkpoint away, before it is written over."""
    if is_whole(folder):
        (folder / _OVERWRITTEN).touch()
    for name in (_WHOLE, _INDEX):
        (folder / name).unlink(missing_ok=True)


def interruption(root: Path) -> str | None:
    """What an interrupted save has left that a run cannot resume from; None if the tracker can be followed."""
    text = tracked(root)
    if not is_tracker_text(text):
        return f"{TRACKER} does not name an iteration"
    assert text is not None
    folder = folder_of(root, text)
    if (folder / _OVERWRITTEN).is_file() and not is_whole(folder):
        return f"{folder.name}, which {TRACKER} names, was being written over"
    return None


def resolve(path: str) -> Path:
    """The folder of one iteration, from it or from the folder of a run.

    Raises:
        CheckpointError: if there is no whole checkpoint of format ``torch_dist``.
    """
    folder = Path(path)
    if is_whole(folder):
        return folder
    text = tracked(folder)
    if is_tracker_text(text):
        assert text is not None
        found = folder_of(folder, text)
        if is_whole(found):
            return found
        raise CheckpointError(f"{found} is not whole, although {TRACKER} names it. Give another iteration's folder.")
    raise CheckpointError(
        f"{folder}: no checkpoint of --ckpt-format torch_dist is there, or its writing was interrupted. Give the "
        "folder of a run (--save) or of one iteration (iter_...)."
    )

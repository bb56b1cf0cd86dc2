"""Folders of checkpoints: which iteration is whole, and which is the newest of these.

A folder is on a file system or in an object store; both are a ``Path`` here (:func:`path_of`). What is done with one is
what both can do: an object appears whole or not at all, as a file does by renaming, and a folder is its objects' names.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from megatron_muon.checkpoint.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
"""Names the iteration that a run resumes from."""

_WHOLE = "metadata.json"
"""Megatron-Core writes it last."""
_INDEX = ".metadata"
_OVERWRITTEN = "being_written_over"
"""Says of a folder without marks that it once was whole; without meaning in a whole one."""
_ITERATION = re.compile(r"iter_(\d+)$")
_URL = re.compile(r"\w+://|msc:/")
"""``Path`` leaves one slash of two, and Megatron-Core's stores take such a path."""


def path_of(folder: str | os.PathLike[str]) -> Path:
    """What Megatron-Core takes the name of a folder for.

    Args:
        folder: a local path, or a URL if object stores are enabled (``msc://PROFILE/...``).

    Returns:
        a ``Path`` for what is local; else the store's own, of which the methods that are used here do the same: to open
        and read, ``iterdir``, ``exists``, ``write_bytes``, ``unlink``. It has no renaming, and its ``is_file`` takes a
        store that does not answer for a file that is missing.

    Raises:
        CheckpointError: for a URL where object stores are not enabled, which would be a local folder of this name.
    """
    from megatron.core.msc_utils import MultiStorageClientFeature, maybe_msc

    if _URL.match(str(folder)) and not MultiStorageClientFeature.is_enabled():
        try:
            MultiStorageClientFeature.import_package()
        except RuntimeError as error:
            raise CheckpointError(f"{folder} is in an object store: {error}") from error
    found = maybe_msc.Path(str(folder))
    return found if _URL.match(str(found)) else Path(str(found))


def sizes_in(folder: Path) -> dict[str, int]:
    """The bytes of every file of a folder, by name; a store is asked once for all of them."""
    from megatron.core.msc_utils import maybe_msc

    if isinstance(folder, Path):
        return {path.name: path.stat().st_size for path in entries(folder) if path.is_file()}
    listed = maybe_msc.list(url=f"{folder}/", include_directories=True)
    return {each.key.rpartition("/")[2]: each.content_length for each in listed if each.type == "file"}


def entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing if it does not exist."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is the old one or the new one at any moment, and on disk afterwards."""
    if not isinstance(path, Path):
        path.write_bytes(content)  # a store's objects are so
        return
    scratch = path.with_name(f"{path.name}.new")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Names of files are on disk when their folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint was written to its end."""
    return _is_mark(folder / _WHOLE) and (folder / _INDEX).exists()


def _is_mark(path: Path) -> bool:
    """Whether it is there with all of its contents: Megatron-Core opens the file first, and then writes it."""
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False


def check_marks(folder: Path) -> None:
    """Refuse a checkpoint that was not written to its end.

    Raises:
        CheckpointError: naming the first file that is not there.
    """
    if is_whole(folder):
        return
    name = _WHOLE if (folder / _INDEX).exists() else _INDEX
    state = "is damaged" if (folder / name).exists() else "is missing"
    raise CheckpointError(
        f"{folder} is not whole: {name} {state}, so its writing was interrupted, or the file was lost. Load another "
        "checkpoint (--ckpt-step)."
    )


def iteration_of(folder: Path) -> int | None:
    """The iteration that the name of a folder gives; None for other names."""
    found = _ITERATION.search(folder.name)
    return int(found.group(1)) if found else None


def folder_of(root: Path, text: str) -> Path:
    """The folder that a tracker with this text names."""
    return root / (text if text == "release" else f"iter_{int(text):07d}")


def newest(root: Path) -> int | None:
    """The last iteration that is whole."""
    found = {iteration_of(folder): folder for folder in entries(root) if folder.name.startswith("iter_")}
    iterations = sorted((iteration for iteration in found if iteration is not None), reverse=True)
    return next((iteration for iteration in iterations if is_whole(found[iteration])), None)


def tracked(root: Path) -> str | None:
    """What the tracker says; None if there is none, or nothing in it."""
    try:
        return (root / TRACKER).read_text(errors="replace").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_tracker_text(text: str | None) -> bool:
    """Whether a tracker may say this."""
    return text is not None and (text.isdecimal() or text == "release")


def write_tracker(root: Path, text: str) -> None:
    """Write the file that names the iteration to resume from."""
    write_bytes(root / TRACKER, text.encode())


def forget(folder: Path) -> None:
    """Take the marks of a whole checkpoint away, before it is written over."""
    if is_whole(folder):
        (folder / _OVERWRITTEN).write_bytes(b"")
    for name in (_WHOLE, _INDEX):
        (folder / name).unlink(missing_ok=True)


def interruption(root: Path) -> str | None:
    """What an interrupted save has left that a run cannot resume from; None if the tracker can be followed."""
    text = tracked(root)
    if not is_tracker_text(text):
        return f"{TRACKER} does not name an iteration"
    assert text is not None
    folder = folder_of(root, text)
    if (folder / _OVERWRITTEN).exists() and not is_whole(folder):
        return f"{folder.name}, which {TRACKER} names, was being written over"
    return None


def resolve(path: str | os.PathLike[str]) -> Path:
    """The folder of one iteration, from it or from the folder of a run.

    Raises:
        CheckpointError: if there is no whole checkpoint of format ``torch_dist``.
    """
    folder = path_of(path)
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

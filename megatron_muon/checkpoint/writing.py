"""Write a checkpoint from parts of another: files side by side, each whole or not there.

What is to be written is a :class:`Plan`, which follows from the source alone. So do the files, and a call after one
that was killed goes on from those that are finished. The folder is a checkpoint when the last of its marks is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from megatron_muon.checkpoint import folders
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.pieces import PIECE, pieces
from megatron_muon.checkpoint.reading import COMMON, Chunk, Index
from megatron_muon.checkpoint.sources import gradients_to_average
from megatron_muon.errors import size_text

_NOTES = "being_converted.json"
"""What the folder is to become; gone when it is."""
_SMALL = 4096
"""Bytes, about, of a tensor that is one number."""
_LEAST, _MOST, _FILES = 1 << 16, 1 << 32, 64
"""Bytes of a file, and how many there are of a checkpoint between these."""
_EVERY_S = 5.0
"""Seconds between lines of progress."""


class Content(NamedTuple):
    """What is written at a place, from one of the source's.

    Attributes:
        key: in the source.
        offsets: of the part of a tensor; None for what is no tensor.
        leading: axes of length 1 to put in front.
        decay: of the moving average of which this is the estimated second moment; None to copy what is stored.
        beside: key of second moments that are there for some rows.
    """

    key: str
    offsets: tuple[int, ...] | None
    leading: int = 0
    decay: float | None = None
    beside: str | None = None


@dataclass
class Plan:
    """A checkpoint to write.

    Attributes:
        entries: key -> torch's metadata.
        places: key -> offsets (None for what is no tensor) -> what is written there; the same content is written once.
        common: what is no tensor.
        lost: what the new checkpoint cannot have, a line each.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    places: dict[str, dict[Any, Content]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def copy(self, index: Index, key: str, new: str) -> None:
        """Take what the source has, under another name."""
        self.entries[new] = index.metadata.state_dict_metadata[key]
        parts = [chunk.offsets for chunk in index.chunks(key)] if key in index.tensors else [None]
        self.places[new] = {offsets: Content(key, offsets) for offsets in parts}

    def name_twice(self, key: str, new: str) -> None:
        """Give what is there another name, too."""
        self.entries[new], self.places[new] = self.entries[key], self.places[key]

    def estimate(self, key: str, new: str, decay: float, beside: str | None = None) -> None:
        """Second moments of what has a moving average of the gradient; see :class:`Content`."""
        self.entries[new] = in_float32(self.entries[key])
        self.places[new] = {at: each._replace(decay=decay, beside=beside) for at, each in self.places[key].items()}


def in_float32(entry: Any) -> Any:
    """torch's metadata of a tensor, of one with float32 numbers."""
    return replace(entry, properties=replace(entry.properties, dtype=torch.float32))


def write(index: Index, plan: Plan, target: Path, text: str, workers: int, options: dict[str, Any]) -> None:
    """Write the checkpoint, or what is missing of it.

    Args:
        index: of the source.
        plan: what to write.
        target: folder of a run, new or left by a call that was killed.
        text: what its tracker is to say.
        workers: files that are written at once.
        options: what else the contents follow from.

    Raises:
        CheckpointError: if the folder has something else, is being written, or there is no space.
    """
    if not isinstance(target, Path):
        raise CheckpointError(f"{target}: a file is renamed when it is whole: give a local folder, and copy that.")
    notes = {"from": str(index.folder), **options, "files": _identity(index)}
    folder = folders.folder_of(target, text)
    there = (path for path in target.rglob("*") if not path.is_dir() and path != folder / f"{_NOTES}.new")
    if any(there) and not (folder / _NOTES).is_file():
        raise CheckpointError(f"{target} is not empty: give a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(index, plan, target, text, workers, folder, notes)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}. The same command goes on from here.") from error


def _write(
    index: Index, plan: Plan, target: Path, text: str, workers: int, folder: Path, notes: dict[str, Any]
) -> None:
    """What is missing in the folder of the iteration."""
    with _held(folder, notes):
        if not folders.is_whole(folder):
            if not (folder / ".metadata").is_file():
                places = _Files(index, plan, folder).write(workers)
                folders.write_bytes(folder / ".metadata", _index(index, plan, places))
            folders.write_tracker(target, text)
            for path in folder.glob("*.lengths"):
                path.unlink()
            folders.write_bytes(folder / "metadata.json", (index.folder / "metadata.json").read_bytes())
            folders.sync(target)
        (folder / _NOTES).unlink()


def _identity(index: Index) -> str:
    """A hash that changes whenever the source's files do."""
    found = hashlib.sha256((index.folder / ".metadata").read_bytes())
    for name in sorted({info.relative_path for info in index.metadata.storage_data.values()}):
        state = (index.folder / name).stat()
        found.update(f"{name} {state.st_size} {getattr(state, 'st_mtime_ns', 0)}\n".encode())
    return found.hexdigest()


@contextmanager
def _held(folder: Path, notes: dict[str, Any]) -> Iterator[None]:
    """Begin, or go on with what was begun from the same source in the same way, alone."""
    path = folder / _NOTES
    if not path.is_file():
        folders.write_bytes(path, json.dumps(notes, indent=1).encode())
    before = json.loads(path.read_bytes())
    if before != notes:
        names = [name for name in {**before, **notes} if before.get(name) != notes.get(name)]
        raise CheckpointError(
            f"{folder} was begun from {before['from']}, with "
            + ", ".join(f"{name} {before.get(name)} (now {notes.get(name)})" for name in names)
            + ": give the same again to go on, or a new folder."
        )
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{folder} is being written by another process.") from None
        yield


class _Files:
    """The files that hold the tensors of the new checkpoint."""

    def __init__(self, index: Index, plan: Plan, folder: Path) -> None:
        self._index, self._folder = index, folder
        self._chunks: dict[str, dict[Any, Chunk]] = {}
        self._common = io.BytesIO()
        torch.save([plan.common], self._common)
        contents = sorted(
            dict.fromkeys(each for parts in plan.places.values() for each in parts.values()),
            key=lambda each: (*self._where(each), each.decay is not None),
        )
        total = sum(map(self._size, contents))
        limit = min(max(total // _FILES, _LEAST), _MOST)
        self._files: list[list[Content]] = [[]]
        filled = 0
        for content in contents:
            if filled and filled + self._size(content) > limit:
                self._files.append([])
                filled = 0
            self._files[-1].append(content)
            filled += self._size(content)
        self._total, self._done, self._stopped = total, 0, False

    def write(self, workers: int) -> dict[Content | None, tuple[str, int, int]]:
        """Write what is not there yet; content (None for what is no tensor) -> file, offset and length."""
        self._check_space()
        last = time.monotonic()
        with ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(self._write, number) for number in range(len(self._files))]
            try:
                pending = set(tasks)
                while pending:
                    done, pending = wait(pending, timeout=_EVERY_S / 5, return_when=FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    if time.monotonic() - last > _EVERY_S:
                        last = time.monotonic()
                        print(
                            f"{size_text(self._done)} of {size_text(self._total)}, {len(tasks) - len(pending)} of "
                            f"{len(tasks)} files",
                            file=sys.stderr,
                            flush=True,
                        )
            finally:
                self._stopped = True
                pool.shutdown(cancel_futures=True)
        found: dict[Content | None, tuple[str, int, int]] = {}
        for number, task in enumerate(tasks):
            at = 0
            last_too = [None] if number == len(tasks) - 1 else []
            for content, length in zip([*self._files[number], *last_too], task.result(), strict=True):
                found[content] = (self._name(number), at, length)
                at += length
        return found

    def _check_space(self) -> None:
        there = sum(path.stat().st_size for path in self._folder.glob("__0_*.distcp"))
        needed, free = self._total - there + (1 << 20), shutil.disk_usage(self._folder).free
        if needed > free:
            raise CheckpointError(f"{self._folder} needs {size_text(needed)}, and {size_text(free)} are free there.")

    def _name(self, number: int) -> str:
        return f"__0_{number}.distcp"

    def _write(self, number: int) -> list[int]:
        """The lengths of what is in a file."""
        path = self._folder / self._name(number)
        notes = path.with_suffix(".lengths")
        if path.is_file() and notes.is_file():
            lengths: list[int] = json.loads(notes.read_bytes())
            if sum(lengths) == path.stat().st_size:
                self._done += sum(lengths)
                return lengths
        scratch = path.with_suffix(".new")
        with scratch.open("wb") as file:
            lengths = [self._append(content, file) for content in self._files[number]]
            if number == len(self._files) - 1:
                lengths.append(file.write(self._common.getvalue()))
            file.flush()
            os.fsync(file.fileno())
        folders.write_bytes(notes, json.dumps(lengths).encode())
        scratch.replace(path)
        folders.sync(self._folder)
        return lengths

    def _append(self, content: Content, file: IO[bytes]) -> int:
        start = file.tell()
        if content.decay is not None or content.leading:
            torch.save(self._tensor(content), file)
            self._done += file.tell() - start
            return file.tell() - start
        with self._index.open(self._info(content)) as source:
            while block := source.read(PIECE):
                if self._stopped:
                    raise InterruptedError("stopped")
                file.write(block)
                self._done += len(block)
        return file.tell() - start

    def _tensor(self, content: Content) -> torch.Tensor:
        """What is not stored as it is to be."""
        chunk = self._chunk(content.key, content.offsets)
        if content.decay is None:
            found = self._index.tensor(chunk)
        elif content.beside is None:
            boxes = pieces(chunk.box, (chunk.sizes,), PIECE // 4)
            squares = sum(self._index.read(chunk, box).double().square().sum().item() for box in boxes)
            # One number: as such it is stored, and read as a tensor of this shape.
            found = _second_moment(squares / max(1, torch.Size(chunk.sizes).numel()), content.decay).expand(chunk.sizes)
        else:
            average, found = self._index.tensor(chunk), self._index.tensor(self._chunk(content.beside, content.offsets))
            without = found == 0
            found = found.masked_fill(
                without, _second_moment(average[without].double().square().mean().item(), content.decay)
            )
        return found[(None,) * content.leading]

    def _chunk(self, key: str, offsets: tuple[int, ...] | None) -> Chunk:
        if key not in self._chunks:
            self._chunks[key] = {chunk.offsets: chunk for chunk in self._index.chunks(key)}
        return self._chunks[key][offsets]

    def _info(self, content: Content) -> Any:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        if content.offsets is None:
            return self._index.metadata.storage_data[MetadataIndex(content.key)]
        return self._chunk(content.key, content.offsets).info

    def _where(self, content: Content) -> tuple[str, int]:
        info = self._info(content)
        return info.relative_path, info.offset

    def _size(self, content: Content) -> int:
        return _SMALL if content.decay is not None and content.beside is None else int(self._info(content).length)


def _second_moment(mean_square: float, decay: float) -> torch.Tensor:
    """The estimate that loading makes as well, from the mean square of the momentum."""
    return torch.tensor(mean_square * gradients_to_average(decay), dtype=torch.float32)


def _index(index: Index, plan: Plan, files: dict[Content | None, tuple[str, int, int]]) -> bytes:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    before = index.metadata
    some = next(iter(before.storage_data.values()))
    places: dict[Any, Content | None] = {
        MetadataIndex(key) if at is None else MetadataIndex(key, torch.Size(at)): content
        for key, parts in plan.places.items()
        for at, content in parts.items()
    }
    places[MetadataIndex(COMMON)] = None
    storage = {}
    for place, content in places.items():
        name, offset, length = files[content]
        storage[place] = replace(some, relative_path=name, offset=offset, length=length, transform_descriptors=None)
    entries = {**plan.entries, COMMON: BytesStorageMetadata()}
    return pickle.dumps(Metadata(entries, before.planner_data, storage, before.storage_meta, before.version))

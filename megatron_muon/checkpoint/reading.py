"""Read single objects and tensors of a checkpoint, any part of them, without processes and in bounded memory."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from megatron_muon.checkpoint import pickles
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.folders import check_marks
from megatron_muon.checkpoint.stored import Stored, check_files, records_in

__all__ = ["BLOCK", "COMMON", "Box", "Chunk", "Index", "enable_stores", "pieces", "read_index"]

COMMON = "common_state/shard_0_1"
"""Key of what is no tensor."""

BLOCK = 1 << 22
"""Bytes that are copied, and elements of a tensor that are read, at once."""

_COMMON_FILE = "common.pt"
"""Where versions before 0.19 have it."""

type Box = tuple[tuple[int, int], ...]
"""Part of a tensor: first and last + 1 of each axis."""


@dataclass(frozen=True)
class Chunk:
    """One stored part of a tensor.

    Attributes:
        key: of the tensor.
        offsets: of the part in it.
        sizes: of the part.
        info: file, offset and length.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    info: Any

    @property
    def box(self) -> Box:
        """In the tensor."""
        return tuple((at, at + size) for at, size in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True)
class Index:
    """The index of a checkpoint.

    Attributes:
        folder: of the iteration.
        metadata: torch's.
        trust: whether pickles may run code.
    """

    folder: Path
    metadata: Any
    trust: bool = False

    @property
    def tensors(self) -> dict[str, Any]:
        """Key -> torch's ``TensorStorageMetadata``."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        return {
            key: entry
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def stored(self) -> Stored:
        """What is in it: see there.

        Raises:
            CheckpointError: if it was written by a newer version of this package, or may run code.
        """
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        folder, common = str(self.folder), self.object(COMMON)[0]
        whole = ShardedObject("", None, (1,), (0,)).unique_key  # after the key
        records = records_in(folder, common, lambda keys: [self.object(f"{key}{whole}")[0] for key in keys])
        return Stored.of_parts(folder, self.metadata, common, records)

    def chunks(self, key: str) -> Iterator[Chunk]:
        """The parts of a tensor, each once."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        for part in self.metadata.state_dict_metadata[key].chunks:
            offsets, sizes = tuple(part.offsets), tuple(part.sizes)
            yield Chunk(key, offsets, sizes, self.metadata.storage_data[MetadataIndex(key, part.offsets)])

    def object(self, key: str) -> Any:
        """What is no tensor, by its key."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        if key == COMMON and key not in self.metadata.state_dict_metadata:
            path = self.folder / _COMMON_FILE
            return [pickles.read_object(path.read_bytes(), f"{path}", self.trust)]
        return self._whole(key, self.metadata.storage_data[MetadataIndex(key)])

    def _whole(self, key: str, info: Any) -> Any:
        with self.open(info) as file:
            return pickles.read_object(file.read(), f"{self.folder}: {key}", self.trust)

    def open(self, info: Any) -> IO[bytes]:
        """The file of a place, for that place alone."""
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{self.folder / info.relative_path} is compressed, which only torch's reader reads.")
        return io.BufferedReader(_Window((self.folder / info.relative_path).open("rb"), info.offset, info.length))

    def tensor(self, chunk: Chunk) -> torch.Tensor:
        """The contents of a part."""
        found = self._whole(chunk.key, chunk.info)
        if not isinstance(found, torch.Tensor):
            raise CheckpointError(
                f"{self.folder}: {chunk.key} is damaged: {type(found).__name__} in the place of a tensor."
            )
        return found

    def read(self, chunk: Chunk, box: Box) -> torch.Tensor:
        """What a part has of a box of the tensor: few bytes more than that, if the box is one of :func:`pieces`.

        Returns:
            of the box's shape.
        """
        starts = [first - at for (first, _), at in zip(box, chunk.offsets, strict=True)]
        with self.open(chunk.info) as file:
            return _read(file, f"{self.folder}: {chunk.key}", starts, [last - first for first, last in box])


def pieces(box: Box, chunks: Sequence[tuple[int, ...]], limit: int = BLOCK) -> Iterator[Box]:
    """Divide a box so that chunks of these sizes are read for each piece in one run of at most ``limit`` elements."""
    lengths = [last - first for first, last in box]
    if all(_run(lengths, sizes) <= limit for sizes in chunks) or max(lengths, default=1) <= 1:
        yield box
        return
    axis = next(number for number, length in enumerate(lengths) if length > 1)
    first, last = box[axis]
    middle = (first + last) // 2
    for part in ((first, middle), (middle, last)):
        yield from pieces((*box[:axis], part, *box[axis + 1 :]), chunks, limit)


def _run(lengths: list[int], sizes: tuple[int, ...]) -> int:
    """Elements from the first of a box to its last in a contiguous tensor."""
    strides = [math.prod(sizes[number + 1 :]) for number in range(len(sizes))]
    return 1 + sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True))


def _read(file: IO[bytes], what: str, starts: list[int], lengths: list[int]) -> torch.Tensor:
    """A box of a tensor from what :func:`torch.save` has written: a zip file of its form and its elements."""
    if 0 in lengths:
        return torch.empty(lengths)
    try:
        archive = zipfile.ZipFile(file)
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        form = pickles.describe(archive.read(names["data.pkl"]), what)
        first = form.offset + sum(at * stride for at, stride in zip(starts, form.strides, strict=True))
        count = 1 + sum((length - 1) * stride for length, stride in zip(lengths, form.strides, strict=True))
        with archive.open(names[f"data/{form.record}"]) as stream:
            stream.seek(first * form.dtype.itemsize)
            data = bytearray(stream.read(count * form.dtype.itemsize))
        return torch.frombuffer(data, dtype=form.dtype, count=count).as_strided(lengths, form.strides)
    except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
        raise CheckpointError(f"{what} is damaged: it cannot be read ({error}).") from error


class _Window(io.RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any, /) -> int:
        view = memoryview(target).cast("B")
        count = max(0, min(len(view), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def enable_stores() -> None:
    """Let URLs name folders in object stores, as ``--enable-msc`` does in a run."""
    from megatron.core.msc_utils import MultiStorageClientFeature

    MultiStorageClientFeature.enable()


def read_index(folder: Path, trust: bool = False) -> Index:
    """Read the index of a checkpoint, and check that its files are there.

    Args:
        folder: of one iteration.
        trust: read pickles in full, which may run code.

    Raises:
        CheckpointError: if files are missing or too short, or the index may run code.
    """
    check_marks(folder)
    path = folder / ".metadata"
    metadata = pickles.read_metadata(path.read_bytes(), f"{path}", trust)
    check_files(folder, metadata)
    return Index(folder, metadata, trust)

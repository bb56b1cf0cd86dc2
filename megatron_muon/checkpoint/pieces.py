"""Boxes of stored tensors, read a few MiB at a time: torch's reader makes the whole stored part for each."""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType

from megatron_muon.checkpoint import pickles
from megatron_muon.checkpoint.errors import CheckpointError

PIECE = 1 << 24
"""Bytes that are read at once. What is stored in fewer is left to torch."""

type Box = tuple[tuple[int, int], ...]
"""Part of a tensor: first and last + 1 of each axis."""


class StoredTensor:
    """One tensor in a file that :func:`torch.save` has written: a zip file of its form and its elements.

    Args:
        file: seekable, of the tensor alone.
        what: named in messages.

    Attributes:
        form: what the file says of the tensor.

    Raises:
        CheckpointError: if it is damaged, here or when it is read.
    """

    def __init__(self, file: IO[bytes], what: str) -> None:
        self._what = what
        try:
            self._archive = zipfile.ZipFile(file)
            self._names = {name.partition("/")[2]: name for name in self._archive.namelist()}
            self.form = pickles.describe(self._archive.read(self._names["data.pkl"]), what)
        except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
            raise self._damage(error) from error

    def read(self, box: Box) -> torch.Tensor:
        """A box, of its shape: few bytes more than that, if it is one of :func:`pieces`."""
        form, lengths = self.form, [last - first for first, last in box]
        if 0 in lengths:
            return torch.empty(lengths, dtype=form.dtype)
        first = form.offset + sum(at * stride for (at, _), stride in zip(box, form.strides, strict=True))
        count = 1 + sum((length - 1) * stride for length, stride in zip(lengths, form.strides, strict=True))
        try:
            with self._archive.open(self._names[f"data/{form.record}"]) as stream:
                stream.seek(first * form.dtype.itemsize)
                data = bytearray(stream.read(count * form.dtype.itemsize))
            return torch.frombuffer(data, dtype=form.dtype, count=count).as_strided(lengths, form.strides)
        except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
            raise self._damage(error) from error

    def read_into(self, target: torch.Tensor, offsets: Sequence[int]) -> None:
        """Fill ``target``, of any dtype, device and strides, from the box of its shape at these offsets."""
        box = tuple((at, at + size) for at, size in zip(offsets, target.shape, strict=True))
        for piece in pieces(box, (self.form.sizes,), max(1, PIECE // self.form.dtype.itemsize)):
            place = (slice(first - at, last - at) for (first, last), at in zip(piece, offsets, strict=True))
            target[tuple(place)].copy_(self.read(piece))

    def _damage(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self._what} is damaged: it cannot be read ({error}).")


def pieces(box: Box, chunks: Sequence[tuple[int, ...]], limit: int) -> Iterator[Box]:
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


def part_of(file: Any, info: Any) -> IO[bytes]:
    """A part of a file, by torch's ``_StorageInfo``, as a file that closes it; torch's own cannot seek from its end."""
    return io.BufferedReader(_Window(file, info.offset, info.length))


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


def read_in_pieces(reader: FileSystemReader) -> None:
    """Let a reader read large parts in pieces, straight into what is loaded; other kinds of reader stay as they are."""
    if type(reader).read_data is not FileSystemReader.read_data:
        return
    read_whole: Callable[[Any, Any], Any] = reader.read_data

    def read_data(plan: Any, planner: Any) -> Any:
        large: list[Any] = []
        rest: list[Any] = []
        for item in plan.items:
            info = reader.storage_data[item.storage_index]
            is_plain = item.type == LoadItemType.TENSOR and not info.transform_descriptors
            (large if is_plain and info.length > PIECE else rest).append(item)
        done = read_whole(dataclasses.replace(plan, items=rest), planner)
        for item in large:
            info = reader.storage_data[item.storage_index]
            with reader.fs.create_stream(reader.fs.concat_path(reader.path, info.relative_path), "rb") as stream:
                target = planner.resolve_tensor(item).detach()
                stored = StoredTensor(part_of(stream, info), f"{info.relative_path}: {item.storage_index.fqn}")
                stored.read_into(target, item.storage_offsets)
                planner.commit_tensor(item, target)
        return done

    reader.read_data = read_data  # type: ignore[method-assign]

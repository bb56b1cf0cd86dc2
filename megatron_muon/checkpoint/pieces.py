"""Boxes of stored tensors, read a few MiB at a time: torch's reader makes the whole stored part for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import IO, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType

__all__ = ["PIECE", "read_box", "read_in_pieces"]

PIECE = 1 << 24
"""Bytes that are read at once. What is stored in fewer is left to torch."""


def read_in_pieces(reader: FileSystemReader) -> None:
    """Let a reader read large parts in pieces, straight into what is loaded; readers of other kinds stay as they are.

    Args:
        reader: of one checkpoint.
    """
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
                read_box(reader._slice_file(stream, info), item.storage_offsets, item.lengths, target)
                planner.commit_tensor(item, target)
        return done

    reader.read_data = read_data  # type: ignore[method-assign]


def read_box(file: IO[bytes], offsets: Sequence[int], sizes: Sequence[int], target: torch.Tensor) -> None:
    """Read a box of a tensor that ``torch.save`` wrote.

    Args:
        file: seekable, of the tensor alone.
        offsets: of the box in the tensor.
        sizes: of the box, and of ``target``.
        target: of any dtype, device and strides.

    Raises:
        EOFError: if the file ends before the box does.
    """
    with FakeTensorMode():  # torch gives the place in the file, and reads no numbers
        stored = torch.load(file, map_location="cpu", weights_only=True)
    start = getattr(stored.untyped_storage(), "_checkpoint_offset", None)  # torch's own, of later versions
    if start is None or not stored.is_contiguous() or tuple(target.shape) != tuple(sizes):
        file.seek(0)
        whole = torch.load(file, map_location="cpu", weights_only=True)
        target.copy_(whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))])
        return
    _read_rows(file, start + stored.storage_offset() * stored.element_size(), stored, offsets, target)


def _read_rows(file: IO[bytes], start: int, stored: torch.Tensor, offsets: Sequence[int], target: torch.Tensor) -> None:
    """Of a contiguous tensor at a byte of the file."""
    size = stored.element_size()
    if stored.dim() == 0:
        stored, offsets, target = stored.view(1), [0], target.view(1)
    row = math.prod(stored.shape[1:]) * size
    if row > PIECE:
        for number, part in enumerate(target):
            _read_rows(file, start + (offsets[0] + number) * row, stored[0], offsets[1:], part)
        return
    for first in range(0, len(target), max(1, PIECE // row)):
        part = target[first : first + max(1, PIECE // row)]
        file.seek(start + (offsets[0] + first) * row)
        content = bytearray(file.read(len(part) * row))
        if len(content) < len(part) * row:
            raise EOFError(f"{len(content)} bytes of {len(part) * row} at {start + (offsets[0] + first) * row}")
        rows = torch.frombuffer(content, dtype=stored.dtype).view(-1, *stored.shape[1:])
        inner = (slice(at, at + count) for at, count in zip(offsets[1:], part.shape[1:], strict=True))
        part.copy_(rows[(slice(None), *inner)])

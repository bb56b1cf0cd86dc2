"""Tensors in a file of one rank: written whole or not at all, and read back before anybody relies on it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from megatron_muon.errors import size_text

_PIECE = 64 << 20
"""Bytes that are on the host at a time."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file.

    Attributes:
        start: its first byte.
        shape: of the tensor.
        dtype: of the tensor.
        checksum: CRC-32 of its bytes.
    """

    start: int
    shape: torch.Size
    dtype: torch.dtype
    checksum: int

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.shape.numel() * self.dtype.itemsize


class StateFile:
    """A file with tensors, each of which can be read for itself; removed when this object is gone.

    Attributes:
        path: where it is.
    """

    def __init__(self, folder: str | os.PathLike[str], tensors: Sequence[torch.Tensor]) -> None:
        """Write a file of this rank's, wait until it is on the disk, and read it back.

        Args:
            folder: is made if it is not there.
            tensors: of any shapes, dtypes and devices; they stay as they are.

        Raises:
            OSError: naming the file, of which nothing is left: the disk is full, or has not kept what was written.
        """
        self._places: list[_Place] = []
        self._removal: Callable[[], object] | None = None
        self.path = Path(folder).absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.path, file = _file_of_ones_own(self.path)
            self._removal = weakref.finalize(self, _remove, self.path, file, os.getpid())
            for tensor in tensors:
                self._write(file, tensor)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # what is read back is the disk's, and the host's memory is free
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for number in range(len(self._places)):
                for _ in self._pieces(file, number):
                    pass
        except OSError as error:
            if self._removal is not None:
                self._removal()
            size = size_text(sum(tensor.nbytes for tensor in tensors))
            raise OSError(
                error.errno,
                f"{self.path}: {error.strerror or error}. It is to hold {size} of optimizer state, which is still "
                "where it was, nothing is lost: give sleep(to=...) a folder on a disk with room, or 'host'",
            ) from error

    def read(self, number: int, device: torch.device) -> torch.Tensor:
        """A new tensor with the bits of one that was written.

        Args:
            number: of the tensor, in the order of the constructor's.
            device: where it is to be.

        Raises:
            OSError: naming the file, if it is gone, or not what was written.
        """
        place = self._places[number]
        found = torch.empty(place.shape, dtype=place.dtype, device=device)
        flat, start = found.view(-1).view(torch.uint8), 0
        try:
            with self.path.open("rb") as file:
                for piece in self._pieces(file, number):
                    flat[start : start + len(piece)].copy_(torch.frombuffer(piece, dtype=torch.uint8))
                    start += len(piece)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.path}: {error.strerror or error}. Optimizer state that sleeps is in it: bring the file back "
                "and call wake() again, or go on from a checkpoint",
            ) from error
        return found

    def _write(self, file: IO[bytes], tensor: torch.Tensor) -> None:
        start, checksum = file.tell(), 0
        for piece in tensor.detach().contiguous().view(-1).view(torch.uint8).split(_PIECE):
            view = memoryview(piece.cpu().numpy())
            checksum = zlib.crc32(view, checksum)
            file.write(view)
        self._places.append(_Place(start, tensor.shape, tensor.dtype, checksum))

    def _pieces(self, file: IO[bytes], number: int) -> Iterator[bytearray]:
        """The bytes of a tensor; raises OSError if they are not what was written."""
        place, checksum = self._places[number], 0
        file.seek(place.start)
        left = place.nbytes
        while left:
            piece = bytearray(min(_PIECE, left))
            if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise OSError(None, "the file ends too early")
            checksum, left = zlib.crc32(piece, checksum), left - len(piece)
            yield piece
        if checksum != place.checksum:
            raise OSError(None, "the file is damaged: its checksum is not that of what was written")


def _remove(path: Path, file: IO[bytes], process: int) -> None:
    if os.getpid() == process:  # and not a copy of it that saves in the background
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a full disk did not take
            file.close()


def _file_of_ones_own(folder: Path) -> tuple[Path, IO[bytes]]:
    """An empty file of this rank's in a folder, locked for as long as it is open.

    Other runs may have the folder, too, and ranks of the same numbers. What a run that is gone has left behind is
    written over.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    for number in itertools.count():
        path = folder / f"muon-asleep-rank{rank:05}-{number}.state"
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        if _is_at(file, path):
            file.truncate(0)
            return path, file
        file.close()  # removed between the two calls
    raise AssertionError


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

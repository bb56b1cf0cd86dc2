"""Read and write single tensors of a checkpoint, without processes and in bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["Chunk", "Index", "read_index"]


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


@dataclass(frozen=True)
class Index:
    """The index of a checkpoint.

    Attributes:
        folder: of the iteration.
        metadata: torch's.
    """

    folder: Path
    metadata: Any

    @property
    def tensors(self) -> dict[str, Any]:
        """Key -> torch's ``TensorStorageMetadata``."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        return {
            key: entry
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def chunks(self, key: str) -> Iterator[Chunk]:
        """The parts of a tensor, each once."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        for part in self.metadata.state_dict_metadata[key].chunks:
            offsets, sizes = tuple(part.offsets), tuple(part.sizes)
            yield Chunk(key, offsets, sizes, self.metadata.storage_data[MetadataIndex(key, part.offsets)])

    def bytes_of(self, info: Any) -> bytes:
        """What is stored at a place."""
        with (self.folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return file.read(info.length)

    def tensor(self, chunk: Chunk) -> torch.Tensor:
        """The contents of a part."""
        found = torch.load(io.BytesIO(self.bytes_of(chunk.info)), map_location="cpu", weights_only=True)
        assert isinstance(found, torch.Tensor)
        return found

    def copy(self, info: Any, target: IO[bytes]) -> None:
        """Append what is stored at a place to a file, a few MiB at a time."""
        with (self.folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            left = info.length
            while left:
                block = file.read(min(left, 1 << 24))
                target.write(block)
                left -= len(block)


def read_index(folder: Path) -> Index:
    """Read the index of a checkpoint, and check that its files are there."""
    from megatron_muon.checkpoint.stored import read_metadata

    return Index(folder, read_metadata(folder))

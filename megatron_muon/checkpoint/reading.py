"""Read single objects and tensors of a checkpoint, any part of them, without processes and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from megatron_muon.checkpoint import pickles
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.folders import check_marks
from megatron_muon.checkpoint.pieces import Box, StoredTensor, part_of
from megatron_muon.checkpoint.stored import Stored, check_files, records_in

COMMON = "common_state/shard_0_1"
"""Key of the stored object that has everything but tensors."""

_COMMON_FILE = "common.pt"
"""Where versions before 0.19 have it."""


@dataclass(frozen=True)
class Chunk:
    """One stored part of a tensor."""

    key: str  # of the tensor
    offsets: tuple[int, ...]  # of the part in it
    sizes: tuple[int, ...]  # of the part
    info: Any  # file, offset and length

    @property
    def box(self) -> Box:
        """The part as a box of the tensor."""
        return tuple((at, at + size) for at, size in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True)
class Index:
    """The index of a checkpoint."""

    folder: Path  # of the iteration
    metadata: Any  # torch's
    trust: bool = False  # whether pickles may run code

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
        return part_of((self.folder / info.relative_path).open("rb"), info)

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
        place = tuple((first - at, last - at) for (first, last), at in zip(box, chunk.offsets, strict=True))
        with self.open(chunk.info) as file:
            return StoredTensor(file, f"{self.folder}: {chunk.key}").read(place)


def enable_stores() -> None:
    """Let URLs name folders in object stores, as ``--enable-msc`` does in a run."""
    from megatron.core.msc_utils import MultiStorageClientFeature

    MultiStorageClientFeature.enable()


def read_index(folder: Path, trust: bool = False) -> Index:
    """Read the index of a checkpoint, and check that its files are there.

    Raises:
        CheckpointError: if files are missing or too short, or the index may run code.
    """
    check_marks(folder)
    path = folder / ".metadata"
    metadata = pickles.read_metadata(path.read_bytes(), f"{path}", trust)
    check_files(folder, metadata)
    return Index(folder, metadata, trust)

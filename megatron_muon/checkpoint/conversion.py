"""``python -m megatron_muon ckpt convert``: a checkpoint of Adam for Muon, or of Muon for Adam.

Tensors are copied as they are stored, a few MiB at a time. What one optimizer has and the other calls by another name
is stored once and named twice; a second moment that Muon has not is estimated, one part of a tensor at a time.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path
from typing import IO, Any

import torch

from megatron_muon.checkpoint import folders
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.keys import PREFIX, RECORD_KEY, parse_state, without_chain
from megatron_muon.checkpoint.reading import Index, read_index
from megatron_muon.checkpoint.record import RECORD, Record
from megatron_muon.checkpoint.sources import estimated_second_moment
from megatron_muon.checkpoint.stored import Stored

__all__ = ["TARGETS", "convert"]

TARGETS = ("muon", "adam")

_FILE = "__0_0.distcp"
_COMMON = "common_state/shard_0_1"


def convert(source: Path, target: Path, to: str) -> int:
    """Write a checkpoint that runs of the other optimizer resume from.

    Args:
        source: folder of one iteration, which is only read.
        target: a new folder for a run.
        to: ``muon`` or ``adam``.

    Returns:
        its iteration.

    Raises:
        CheckpointError: if the source has not what is needed, or the target exists.
    """
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty: give a new folder.")
    stored, index = Stored.read(str(source)), read_index(source)
    if stored.buckets:
        raise CheckpointError(
            f"{source} has optimizer state in the form of the distributed optimizer's buckets, which only the same "
            "optimizer at the same layout reads. Resume it once with --dist-ckpt-optim-fully-reshardable and save."
        )
    if not any(map(parse_state, index.tensors)):
        raise CheckpointError(f"{source} has no optimizer state: there is nothing to convert.")
    iteration = stored.common.get("iteration", folders.iteration_of(source)) or 0
    folder = folders.folder_of(target, str(iteration))
    folder.mkdir(parents=True)
    with (folder / _FILE).open("wb") as file:
        _Writer(index, stored, to, file, folder).write()
    (folder / "metadata.json").write_bytes((source / "metadata.json").read_bytes())
    folders.write_tracker(target, str(iteration))
    return int(iteration)


class _Writer:
    """Writes one file and its index."""

    def __init__(self, index: Index, stored: Stored, to: str, file: IO[bytes], folder: Path) -> None:
        self.index, self.stored, self.to, self.file, self.folder = index, stored, to, file, folder
        self.entries: dict[str, Any] = {}
        self.places: dict[Any, Any] = {}

    def write(self) -> None:
        for key, entry in self.index.metadata.state_dict_metadata.items():
            if key != _COMMON and not key.startswith(RECORD_KEY):
                self._copy(key, without_chain(key), entry)
        for key in list(self.entries):
            self._name_twice(key)
        if self.to == "adam":
            for key in list(self.entries):
                self._estimate(key)
        self._write_common()
        self._write_index()

    def _copy(self, key: str, new: str, entry: Any) -> None:
        self.entries[new] = entry
        for where, info in self._stored_at(key, entry):
            start = self.file.tell()
            self.index.copy(info, self.file)
            self._place(new, where, start)

    def _stored_at(self, key: str, entry: Any) -> list[tuple[Any, Any]]:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        if key in self.index.tensors:
            return [(chunk.offsets, chunk.info) for chunk in self.index.chunks(key)]
        return [(None, self.index.metadata.storage_data[MetadataIndex(key)])]

    def _place(self, key: str, offsets: tuple[int, ...] | None, start: int) -> None:
        info = next(iter(self.index.metadata.storage_data.values()))
        self.places[key, offsets] = dataclasses.replace(
            info,
            relative_path=_FILE,
            offset=start,
            length=self.file.tell() - start,
            transform_descriptors=None,
        )

    def _name_twice(self, key: str) -> None:
        """The other name of the same thing, if nothing has it."""
        found = parse_state(key)
        other = {"param": "fp32_param", **({"exp_avg": "momentum_buffer"} if self.to == "muon" else {})}
        if self.to == "adam":
            other["momentum_buffer"] = "exp_avg"
        if found is None or found.state not in other:
            return
        new = f"{PREFIX}.{other[found.state]}.{found.weight}"
        if new not in self.entries:
            self.entries[new] = self.entries[key]
            self.places |= {(new, at): info for (name, at), info in list(self.places.items()) if name == key}

    def _estimate(self, key: str) -> None:
        """A second moment for what has only a momentum."""
        found = parse_state(key)
        if found is None or found.state != "momentum_buffer":
            return
        new = f"{PREFIX}.exp_avg_sq.{found.weight}"
        if new in self.entries:
            return
        self.entries[new] = self.entries[key]
        old = next(name for name in self.index.tensors if without_chain(name) == key)
        for chunk in self.index.chunks(old):
            start = self.file.tell()
            torch.save(estimated_second_moment(self.index.tensor(chunk), self.stored.momentum), self.file)
            self._place(new, chunk.offsets, start)

    def _write_common(self) -> None:
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        common = dict(self.stored.common)
        common["optimizer"] = {RECORD: self._record().to_plain()}
        metadata = dict(common.get("content_metadata") or {})
        common["content_metadata"] = {**metadata, "distrib_optim_sharding_type": "fully_reshardable"}
        buffer = io.BytesIO()
        torch.save([common], buffer)
        start = self.file.tell()
        self.file.write(buffer.getvalue())
        self.entries[_COMMON] = BytesStorageMetadata()
        self._place(_COMMON, None, start)

    def _record(self) -> Record:
        """For any rules: the checkpoint has the state of both optimizers."""
        before = self.stored.record
        if before is None:
            return Record(self.stored.step, [], [], {}, [], {}, converted=self.to)
        return Record(before.step, [], before.numbers, {}, before.alone, {}, before.model, converted=self.to)

    def _write_index(self) -> None:
        from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

        storage = {
            MetadataIndex(key) if at is None else MetadataIndex(key, torch.Size(at)): info
            for (key, at), info in self.places.items()
        }
        before = self.index.metadata
        metadata = Metadata(self.entries, before.planner_data, storage, before.storage_meta, before.version)
        scratch = self.folder / ".metadata.new"
        with scratch.open("wb") as file:
            pickle.dump(metadata, file)
        scratch.replace(self.folder / ".metadata")

"""What is in a checkpoint's folder."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.folders import check_marks, path_of, sizes_in
from megatron_muon.checkpoint.keys import ALONE, PREFIX, RECORD_KEY, BucketKey, is_bucket, parse_bucket, parse_state
from megatron_muon.checkpoint.param_state import Bucket
from megatron_muon.checkpoint.record import RECORD, Record, check_version
from megatron_muon.errors import sizes

_EARLIER = "Load an earlier checkpoint (--ckpt-step), and check the storage."


@dataclass(frozen=True)
class Stored:
    """The contents of a checkpoint of format ``torch_dist``.

    Attributes:
        folder: of one iteration.
        shapes: key of every tensor -> (global shape, dtype).
        common: what is no tensor.
        record: ours; None if the checkpoint is not this package's (or of a version before it).
        buckets: whether the distributed optimizer's state is there in the form of its buckets.
        records: of each optimizer in it, of which ``record`` is made.
    """

    folder: str
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    common: dict[str, Any]
    record: Record | None
    buckets: bool
    records: tuple[Record, ...] = ()

    @classmethod
    def read(cls, folder: str, ranks: Sequence[Ranks] = ()) -> Stored:
        """Read the metadata of a checkpoint; no tensors.

        Args:
            folder: of one iteration.
            ranks: those of a model, or of several, whose first alone looks at the files and reads the record: all of
                them must call this, under :meth:`Ranks.together`. Without any, this process does.

        Raises:
            CheckpointError: if it is incomplete, or newer than this package.
        """
        from megatron.core import dist_checkpointing

        metadata = read_metadata(path_of(folder), check=not ranks or any(each.is_first for each in ranks))
        common = dist_checkpointing.load_common_state_dict(folder)
        found: list[Record] = []
        for each in ranks or (Ranks(()),):
            found = each.from_first(lambda: records_in(folder, common))
        return cls.of_parts(folder, metadata, common, found)

    @classmethod
    def of_parts(cls, folder: str, metadata: Any, common: dict[str, Any], records: Sequence[Record]) -> Stored:
        """From torch's metadata, what is no tensor, and :func:`records_in`."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        shapes = {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        _check_notes(folder, metadata, common)
        record = Record.joined(records) if len(records) > 1 else next(iter(records), None)
        buckets = any(map(is_bucket, metadata.state_dict_metadata))
        return cls(folder, shapes, common, record, buckets, tuple(records))

    def of(self, weights: set[str]) -> Stored:
        """As the optimizer of these weights sees it, if several were saved together: each has made steps of its own."""
        mine = [record for record in self.records if not weights.isdisjoint(record.weights)]
        return replace(self, record=mine[0]) if len(mine) == 1 else self

    @functools.cached_property
    def prefixes(self) -> dict[str, list[str]]:
        """Of each state, all that precedes a weight in its keys, with :data:`ALONE` if weights have their own."""
        found = {(state.state, state.chain, ALONE in state.weight) for state in map(parse_state, self.shapes) if state}
        prefixes: dict[str, list[str]] = {}
        for state, chain in sorted({(state, chain) for state, chain, _ in found}):
            marks = (ALONE, "") if (state, chain, True) in found else ("",)
            prefixes.setdefault(state, []).extend(f"{chain}{PREFIX}.{state}{mark}" for mark in marks)
        return prefixes

    @property
    def momentum(self) -> float:
        """The decay of the moving averages that Muon has kept."""
        if self.record is not None:
            for numbers in self.record.numbers:
                if "momentum" in numbers:
                    return float(numbers["momentum"])
        return float(getattr(self.common.get("args"), "muon_momentum", 0.95))

    def misfits(self, tensors: Iterable[Any]) -> list[str]:
        """What is wrong with the global shapes of ``ShardedTensor``; tensors that are not there do not count."""
        found = []
        for tensor in tensors:
            there = self.shapes.get(tensor.key)
            if there is not None and there[0] != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
                found.append(
                    f"{tensor.key} has shape {sizes(there[0])} in the checkpoint and {sizes(tensor.global_shape)} here"
                )
        return found

    def bucket_key(self, bucket: Bucket, state: str) -> str | None:
        """The tensor of a bucket of the distributed optimizer, if there is exactly one that can be it."""
        found = self.bucket_keys.get((bucket.size, BucketKey(bucket.domain, bucket.buffer, bucket.number, state)), ())
        return found[0] if len(found) == 1 else None

    @functools.cached_property
    def bucket_keys(self) -> dict[tuple[int, BucketKey], list[str]]:
        """Keys of the distributed optimizer's buckets, by size and what they say."""
        found: dict[tuple[int, BucketKey], list[str]] = {}
        for key, (shape, _) in self.shapes.items():
            parts = parse_bucket(key)
            if parts is not None and len(shape) == 1:
                found.setdefault((shape[0], parts), []).append(key)
        return found

    @property
    def step(self) -> int:
        """Updates so far, from the record or from what Megatron-Core stores."""
        return self.record.step if self.record is not None else max(_steps(self.common.get("optimizer")), default=0)


def records_in(
    folder: str, common: dict[str, Any], read: Callable[[list[str]], Iterable[Any]] | None = None
) -> list[Record]:
    """The records of a checkpoint: none, one, or one for each of several optimizers.

    Args:
        folder: of one iteration.
        common: what is no tensor in it.
        read: the objects of some keys, if they are not in the folder.

    Raises:
        CheckpointError: for a form that this version does not know, or a record that is damaged.
    """
    try:
        notes = list(_notes(common))
        for note in notes:
            check_version(note)
        keys = [key for note in notes for key in note.get("keys", ())]
        plain = [note for note in notes if "keys" not in note]  # the record itself
        read = read or functools.partial(_objects, folder)
        return [Record.from_plain(each) for each in (*plain, *(read(keys) if keys else ()))]
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}.") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is damaged: the record of its optimizer state cannot be understood ({type(error).__name__}: "
            f"{error}). {_EARLIER}"
        ) from error


def _check_notes(folder: str, metadata: Any, common: Any) -> None:
    """Refuse a checkpoint of whose records the plain state does not tell: it would be read as one without any."""
    there = {key.rpartition("/")[0] for key in metadata.state_dict_metadata if key.startswith(RECORD_KEY)}
    told = {key for note in _notes(common) for key in note.get("keys", ())}
    if lost := sorted(there - told):
        raise CheckpointError(
            f"{folder} is damaged: it has the record {lost[0]}, and its plain state says nothing of it ({RECORD}). "
            f"{_EARLIER}"
        )


def has_record(common: dict[str, Any]) -> bool:
    """Whether a checkpoint has a record of ours, of any form."""
    return next(_notes(common), None) is not None


def _notes(state: Any) -> Iterator[Any]:
    """One, or one for each of several optimizers under names of the user's own."""
    if isinstance(state, dict) and RECORD in state:
        yield state[RECORD]
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ():
        yield from _notes(value)


def _objects(folder: str, keys: Iterable[str]) -> list[Any]:
    """Stored objects that are no tensors, as Megatron-Core reads the common state."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    names = [ShardedObject(key, None, (1,), (0,)).unique_key for key in keys]
    state: dict[str, Any] = {name: io.BytesIO() for name in names}
    try:
        load(state, storage_reader=_get_filesystem_reader(folder), no_dist=True)
    except (Exception, CheckpointException) as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CheckpointError(
            f"{folder} is damaged: the record of its optimizer state cannot be read ({last}). {_EARLIER}"
        ) from error
    found = []
    for name in names:
        loaded = state[name]
        if isinstance(loaded, io.BytesIO):
            loaded.seek(0)
            loaded = torch.load(loaded, weights_only=True)
        found.append(loaded[0])
    return found


def _steps(state: Any) -> list[int]:
    """Every step count in param groups, wherever Megatron-Core's wrappers put them."""
    if isinstance(state, dict):
        found = [int(value) for key, value in state.items() if key in ("step", "common_step") and _is_number(value)]
        return found + [step for value in state.values() for step in _steps(value)]
    return [step for value in state for step in _steps(value)] if isinstance(state, (list, tuple)) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def read_metadata(folder: Path, check: bool = True) -> Any:
    """Read the index of a checkpoint, and check that all of the checkpoint is there.

    Args:
        folder: of the checkpoint.
        check: whether to look at marks and files. Of many ranks the first is to: each question is one to a server that
            all of them ask.

    Returns:
        torch's ``Metadata``.

    Raises:
        CheckpointError: naming the file that is missing, too short or unreadable.
    """
    from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

    if check:
        check_marks(folder)
    try:
        metadata = _get_filesystem_reader(str(folder)).read_metadata()
    except Exception as error:  # whatever a damaged pickle makes of its reader
        raise CheckpointError(
            f"{folder} is damaged: .metadata cannot be read ({type(error).__name__}: {error}). Restore the file, or "
            "load an earlier checkpoint (--ckpt-step)."
        ) from error
    if check:
        check_files(folder, metadata)
    return metadata


def check_files(folder: Path, metadata: Any) -> None:
    """Every file is there, and as long as its index says.

    Raises:
        CheckpointError: naming the first file that is not.
    """
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    found = sizes_in(folder)
    for name, length in sorted(needed.items()):
        there = found.get(name)
        if there is None or there < length:
            state = "is missing" if there is None else f"has {there} bytes of {length}"
            raise CheckpointError(
                f"{folder} is damaged: {name} {state}. Restore the file, or load an earlier checkpoint (--ckpt-step)."
            )

"""The files of checkpoints: which are whole, what is damaged, where a run goes on that was killed while it saved."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_muon._patching import Original, Patches
from megatron_muon.agree import Ranks
from megatron_muon.checkpoint import folders
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.stored import read_metadata
from megatron_muon.plugin import options
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.within import within

PATCHES = Patches()

EARLIER = "Load an earlier checkpoint (--ckpt-step), and check the storage."
"""What messages about a damaged checkpoint advise."""


def remove_old_marks(folder: Any) -> None:
    """A checkpoint that is about to be written over counts no more. For one rank, before the others write."""
    folders.forget(folders.path_of(folder))


@PATCHES.around(
    "megatron.core.dist_checkpointing.serialization:load_common_state_dict",
    "it is read first, and what a damaged checkpoint makes of torch's readers names no file",
)
def _with_named_damage(original: Original, checkpoint_dir: Any) -> Any:
    try:
        return original(checkpoint_dir)
    except (Exception, CheckpointException) as error:
        folder = folders.path_of(checkpoint_dir)
        if not _has_data(folder):
            raise
        folders.check_marks(folder)
        read_metadata(folder, check=False)  # every rank is here, and the sizes of all files are not to blame
        raise _damage(folder, "common_state", error) from error


def _damage(folder: Path, what: str, error: BaseException) -> CheckpointError:
    """In place of what torch's readers raise."""
    return CheckpointError(f"{folder} is damaged: {what} cannot be read ({reason_of(error)}). {EARLIER}")


def reason_of(error: BaseException) -> str:
    """Torch's readers put tracebacks into their messages; the last line says most."""
    last = (str(error).strip().splitlines() or [""])[-1]
    return last if isinstance(error, CheckpointException) else f"{type(error).__name__}: {last}"


@PATCHES.around(
    "megatron.training.checkpointing:_get_checkpoint_format",
    "a checkpoint whose marks are missing is taken for another format, and the error is about that",
)
def _with_marks_checked(original: Original, checkpoint_name: Any, args: Any) -> Any:
    # Megatron-Core asks a namespace of the caller's own for neither here.
    any_format = getattr(args, "auto_detect_ckpt_format", False)
    expected = getattr(args, "ckpt_format", None) == "torch_dist" and not any_format

    def check() -> None:
        folder = folders.path_of(checkpoint_name)
        if _has_data(folder):
            folders.check_marks(folder)

    if expected and not _is_anothers(args):
        Ranks.of_world().from_first(check)  # the checkpoint is the run's
    return original(checkpoint_name, args)


@dataclass
class _Load:
    """The load in progress."""

    indices: dict[str, Any] = field(default_factory=dict)  # those that have been read, by the reader's path
    in_pieces: bool = False  # whether readers that are made now read large parts in pieces of bounded size


_LOAD: ContextVar[_Load] = ContextVar("megatron_muon_load")


@contextlib.contextmanager
def one_index() -> Iterator[None]:
    """Read the index of a checkpoint once within this context: for one load, as the next may find it written over."""
    with within(_LOAD, _Load()):
        yield


def read_in_pieces() -> None:
    """What a rank reads in the rest of this load takes the memory of its own state, and a piece of bounded size."""
    _LOAD.get().in_pieces = True


@PATCHES.around(
    "megatron.core.dist_checkpointing.strategies.torch:_get_filesystem_reader",
    "each of a load's readers unpickles the index of all ranks; torch's reads a whole stored part where some rows are "
    "needed; strict loading fails with the strides that torch 2.15 stores",
)
def _for_one_load(original: Original, *args: Any, **kwargs: Any) -> Any:
    reader, load = original(*args, **kwargs), _LOAD.get(None)
    reader.read_metadata = _without_strides(reader.read_metadata)
    if load is not None:
        reader.read_metadata = _reading_once(reader.read_metadata, str(reader.path), load.indices)
        if load.in_pieces:
            from megatron_muon.checkpoint import pieces

            pieces.read_in_pieces(reader)
    return reader


def _without_strides(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def read_metadata(*args: Any, **kwargs: Any) -> Any:
        metadata = read(*args, **kwargs)
        for entry in metadata.state_dict_metadata.values():
            vars(getattr(entry, "properties", SimpleNamespace())).pop("strides", None)
        return metadata

    return read_metadata


def _reading_once(read: Callable[..., Any], path: str, indices: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def read_metadata(*args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # torch asks for an index of one rank
            return read(*args, **kwargs)
        if path not in indices:
            indices[path] = read()
        return indices[path]

    return read_metadata


def _has_data(folder: Path) -> bool:
    """Whether there are files of format ``torch_dist`` (or ``torch_dcp``)."""
    return any(path.name.endswith(".distcp") for path in folders.entries(folder))


@PATCHES.around(
    "megatron.training.checkpointing:read_metadata",
    "the tracker is emptied before it is written: a run that is killed in between could not be resumed, and "
    "Megatron would end without an error",
)
def _with_recovery(original: Original, tracker_filename: str) -> tuple[int, bool]:
    if _is_anothers(options.training_arguments()):
        return original(tracker_filename)
    root = folders.path_of(tracker_filename).parent
    # Ranks may see a shared file system at different moments, but must decide alike.
    ranks = Ranks.of_world()
    problem = ranks.from_first(lambda: folders.interruption(root))
    if problem is None:
        return original(tracker_filename)
    iteration = ranks.from_first(lambda: folders.newest(root))
    if iteration is None:
        raise CheckpointError(
            f"{root}: {problem}, and no checkpoint of --ckpt-format torch_dist there is whole. Write the iteration "
            f"to load into {tracker_filename}, or start anew with another --load."
        )
    if ranks.is_first:
        print(
            f"megatron_muon: {root}: {problem} (its writing was interrupted); resuming from the newest whole "
            f"checkpoint, iteration {iteration}",
            flush=True,
        )
    return iteration, False


def _is_anothers(args: Any) -> bool:
    """Whether a run is of an optimizer that is not ours: then all is as ever."""
    name = getattr(args, "optimizer", None)
    return name is not None and not is_ours(name)

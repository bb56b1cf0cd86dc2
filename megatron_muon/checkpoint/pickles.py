"""Pickles of checkpoints, read without running what they name.

A pickle names classes and functions, which Python's reader imports and calls. Here only those are that Megatron-Core
and torch write into checkpoints: torch's metadata, and for all else torch's reader of weights with Megatron-Core's own
list of safe classes (enumerations, the namespace of arguments, numpy's arrays).
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron_muon.checkpoint.errors import CheckpointError

_STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"

_METADATA = {
    "builtins": "set frozenset",
    "collections": "OrderedDict defaultdict",
    "torch": "Size device strided contiguous_format preserve_format channels_last",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex "
    "StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    _STRATEGY: "MCoreMetadata MCoreSavePlan",
}
"""Module -> what a checkpoint's index names of it, beside torch's types of numbers."""


class _Refused(pickle.UnpicklingError):
    """Names what is not allowed."""


class _Restricted(pickle.Unpickler):
    """Python's reader of pickles, for an index."""

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in _METADATA.get(module, "").split():
            return getattr(importlib.import_module(module), name)
        raise _Refused(f"{module}.{name}")


class Description(NamedTuple):
    """What a tensor's pickle says of it."""

    dtype: torch.dtype  # of its elements
    record: str  # name of the storage
    offset: int  # of the first element in it
    sizes: tuple[int, ...]  # of the tensor
    strides: tuple[int, ...]  # in elements


class _Describing(_Restricted):
    """Reads a tensor's pickle and makes no tensor."""

    def persistent_load(self, saved: Any, /) -> tuple[Any, str]:
        return saved[1], str(saved[2])  # ("storage", type, name, device, elements)

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, sizes, strides, *_: Description(
                storage[0], storage[1], offset, sizes, strides
            )
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return lambda storage, offset, sizes, strides, _, __, dtype: Description(
                dtype, storage[1], offset, sizes, strides
            )
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return torch.storage._storage_type_to_dtype_map().get(name)  # asking the class for it warns
        return super().find_class(module, name)


def describe(data: bytes, what: str) -> Description:
    """What the pickle in :func:`torch.save`'s archive says of the tensor in it.

    Raises:
        CheckpointError: if it is damaged, or names what a tensor has not.
    """
    found = _named(what, lambda: _Describing(io.BytesIO(data)).load())
    if not isinstance(found, Description):
        raise CheckpointError(f"{what} is damaged: {type(found).__name__} in the place of a tensor.")
    return found


def read_metadata(data: bytes, what: str, trust: bool) -> Any:
    """Read the index of a checkpoint; everything if it is trusted, which may run code.

    Raises:
        CheckpointError: naming the first class or function that is not allowed, and the way out.
    """
    return _named(what, lambda: (pickle.Unpickler if trust else _Restricted)(io.BytesIO(data)).load())


def read_object(data: bytes, what: str, trust: bool) -> Any:
    """Read what :func:`torch.save` has written; see :func:`read_metadata`."""

    def read() -> Any:
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not trust)
        except pickle.UnpicklingError:
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)):
                raise _Refused(", ".join(sorted(names))) from None
            raise

    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return _named(what, read)


def _named(what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except _Refused as error:
        raise CheckpointError(
            f"{what} names {error}, which is not among what Megatron-Core and torch write there: to read it is to "
            "run it. Nothing was run. If you trust those who made the checkpoint, add --trust."
        ) from None
    except Exception as error:  # whatever a damaged pickle makes of its reader
        raise CheckpointError(
            f"{what} is damaged: it cannot be read ({type(error).__name__}: {error}). Restore the file, or give an "
            "earlier checkpoint."
        ) from error

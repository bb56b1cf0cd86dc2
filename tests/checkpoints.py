"""What is in checkpoints of format torch_dist, read by torch alone."""

from __future__ import annotations

import torch


def contents(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = checkpoint.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata.items()
    found = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


def differences(first: str, second: str) -> list[str]:
    """Tensors that two checkpoints do not have in common, bit for bit."""
    a, b = contents(first), contents(second)
    return sorted(a.keys() ^ b.keys()) + [key for key in a.keys() & b.keys() if not torch.equal(a[key], b[key])]

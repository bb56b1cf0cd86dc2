"""Numbers by which state is recognised: cheap, the same at every layout, bit for bit.

The fingerprint of a tensor is the sum of its elements' bits as integers, modulo 2**64. Those of shards add up to that
of the whole. A flipped bit, a shard that is missing, doubled or zero changes it; elements that change places do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

__all__ = ["fingerprints"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(tensors: Iterable[torch.Tensor]) -> list[int]:
    """One number in [0, 2**64) for each tensor.

    Waits for the device once.
    """
    sums = [_sum(tensor) for tensor in tensors]
    return [value % (1 << 64) for value in _together(sums).tolist()]


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def _together(sums: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tuple(sums)) if sums else torch.empty(0, dtype=torch.int64)

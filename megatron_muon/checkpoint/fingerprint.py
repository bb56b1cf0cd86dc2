"""Numbers by which state is recognised: cheap, the same at every layout, bit for bit.

The fingerprint of a tensor is the sum of its elements' bits as integers, modulo 2**64. Those of shards add up to that
of the whole. A flipped bit, a shard that is missing, doubled or zero changes it; elements that change places do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable

import torch

__all__ = ["added", "fingerprints"]

_MODULUS = 1 << 64

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_PIECE = 1 << 22
"""Elements that are summed at once: torch makes 8 bytes of each before it adds."""


def fingerprints(tensors: Iterable[torch.Tensor]) -> list[int]:
    """One number in [0, 2**64) for each tensor.

    Waits for each device once.
    """
    sums = [_sum(tensor) for tensor in tensors]
    places: dict[torch.device, list[int]] = defaultdict(list)
    for place, value in enumerate(sums):
        places[value.device].append(place)
    found = [0] * len(sums)
    for mine in places.values():
        for place, number in zip(mine, torch.stack([sums[place] for place in mine]).tolist(), strict=True):
            found[place] = number % _MODULUS
    return found


def added[Key: Hashable](shares: Iterable[tuple[Key, int]]) -> dict[Key, int]:
    """The numbers of each whole, in order of the keys, from those of its shards."""
    totals: dict[Key, int] = defaultdict(int)
    for key, value in shares:
        totals[key] = (totals[key] + value) % _MODULUS
    return dict(sorted(totals.items()))


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = bits.new_zeros((), dtype=torch.int64)
    for piece in bits.split(_PIECE):
        total += piece.sum(dtype=torch.int64)
    return total

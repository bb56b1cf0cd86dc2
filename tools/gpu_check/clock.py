"""Time on a device, and on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Medians of one call.

    Attributes:
        device: seconds between CUDA events around it; on CPUs those of the clock.
        host: seconds until the call has returned.
        low: the first quartile of ``device``.
        high: the third.
    """

    device: float
    host: float
    low: float
    high: float


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(works: Sequence[Callable[[], object]], device: torch.device, rounds: int = 20, warm_up: int = 3) -> Times:
    """Call several works in turn, which do the same on other inputs, so that these are not in the cache.

    Args:
        works: called ``warm_up`` times each, then until there are ``rounds`` calls of each.
        device: of all they do.
        rounds: of timed calls.
        warm_up: of calls before.
    """
    for _ in range(warm_up):
        for work in works:
            work()
    synchronize(device)
    host: list[float] = []
    pairs = []
    for _ in range(rounds):
        for work in works:
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                begin = time.perf_counter()
                work()
                host.append(time.perf_counter() - begin)
                end.record()
                pairs.append((start, end))
            else:
                begin = time.perf_counter()
                work()
                host.append(time.perf_counter() - begin)
    synchronize(device)
    seconds = [start.elapsed_time(end) / 1e3 for start, end in pairs] or host
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Times(statistics.median(seconds), statistics.median(host), low, high)


def copies(bytes_each: int, device: torch.device) -> int:
    """How many inputs of a size are several times the cache, at most 16."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return max(2, min(16, -(-4 * cache // max(1, bytes_each))))


def random(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Normal numbers, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device).to(dtype)


def device_of(name: str) -> torch.device:
    """With its number."""
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")

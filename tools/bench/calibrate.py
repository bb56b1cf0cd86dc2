"""Rates of the device that is here, as the table of ``plan --device`` has them: measured in a few seconds.

All ranks measure at once, so that what they share (cores, caches, memory) is shared as in a step, and the slowest
counts. Nothing is fitted to a step of a model: products of generic shapes, passes over memory, messages, and a step of
tiny matrices, whose time is that of starting its operations.
"""

from __future__ import annotations

import datetime
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from megatron_muon.optimizers.muon import Muon
from megatron_muon.orthogonalize.backends import choose_products
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.timing import step_times
from tools.bench.ranks import World

__all__ = ["NUMBERS", "calibrate", "multiplier"]

NUMBERS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types of numbers of products, by the names that the table has for them."""

_SHAPES = {
    "cpu": [
        *((1, size, size, size) for size in (64, 192, 320, 640)),
        *((1, 192, 640, 320), (1, 640, 192, 640), (1, 640, 1280, 192)),
        *((4, 64, 64, 64), (8, 192, 192, 192), (8, 96, 192, 320)),
    ],
    "cuda": [*((1, size, size, size) for size in (512, 1024, 2048, 4096, 8192)), (8, 1024, 1024, 2048)],
}
"""(batch, m, n, k) of the products: not those of a case."""

_PASSES = [2**power for power in range(20, 27)]
"""Bytes that a pass reads and writes."""

_MESSAGES = [2**power for power in (12, 18, 21, 24)]
"""Bytes of a buffer that is sent."""

_ROUNDS = 9


@dataclass
class _Clock:
    """Times work on all ranks.

    Attributes:
        world: the ranks.
        scale: how long a measurement may take; 1 is usual.
    """

    world: World
    scale: float

    def seconds(self, works: Sequence[Callable[[], object]], rough: Sequence[float]) -> list[float]:
        """Of one call of each, on the slowest rank: medians of rounds in which each has its turn.

        Args:
            works: what to call, the same on all ranks.
            rough: seconds that are expected, so that all ranks call as often.
        """
        # Ranks that share cores take turns of some milliseconds, many of which a measurement must see.
        shared = self.world.device.type == "cpu" and self.world.size * self.world.threads > len(os.sched_getaffinity(0))
        duration = (5e-2 if shared else 2e-3) * self.scale
        calls = [max(1, int(duration / each)) for each in rough]
        found: list[list[float]] = [[] for _ in works]
        for number in range(_ROUNDS + 1):
            for work, count, times in zip(works, calls, found, strict=True):
                self.world.barrier()
                begin = time.perf_counter()
                for _ in range(count if number else 1):  # the first round warms up
                    work()
                self.world.synchronize()
                times.append((time.perf_counter() - begin) / count)
        return self.world.slowest([statistics.median(times[1:]) for times in found])


def calibrate(world: World, numbers: Sequence[str], scale: float = 1.0) -> Rates:
    """Measure the rates of a rank while all ranks work.

    Args:
        world: the ranks; all must call this.
        numbers: types of numbers in products, of :data:`NUMBERS`.
        scale: how long it may take; 1 is a few seconds.
    """
    clock, cuda = _Clock(world, scale), world.device.type == "cuda"
    found = {"overlaps": float(cuda), "node": float(world.size), "launch": _launch(clock)}
    # On a CPU an operation that has nothing to do takes what starting it takes.
    beside = 0.0 if cuda else found["launch"]
    for name in numbers:
        start, flops = _products(clock, name)
        found |= {f"{name}.start": max(0.0, start - beside), f"{name}.flops": flops}
    found |= _passes(clock, beside)
    if world.size > 1:
        found["within.latency"], found["within.bytes"] = _messages(clock)
    where = torch.cuda.get_device_name(world.device) if cuda else f"CPU, {world.size} ranks of {world.threads} threads"
    source = f"{where}, torch {torch.__version__}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    return Rates(where, found, dict.fromkeys(found, ("measured", source)))


def _line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(seconds of nothing, size a second): the line with the least squares of relative errors."""
    rows = torch.tensor([[1.0 / t, size / t] for size, t in zip(sizes, seconds, strict=True)], dtype=torch.float64)
    start, each = torch.linalg.lstsq(rows, torch.ones(len(rows), 1, dtype=torch.float64)).solution.flatten().tolist()
    if start < 0.0 or each <= 0.0:
        return 0.0, statistics.median(size / t for size, t in zip(sizes, seconds, strict=True))
    return start, 1.0 / each


def _products(clock: _Clock, name: str) -> tuple[float, float]:
    """Seconds before a product, and operations a second of a large one."""
    device, flops, works = clock.world.device, list[float](), list[Callable[[], object]]()
    for batch, m, n, k in _SHAPES[device.type]:
        a, b = (torch.randn(batch, *shape, device=device).to(NUMBERS[name]) for shape in ((m, k), (k, n)))
        works.append(partial(multiplier(device, NUMBERS[name]), a, b))
        flops.append(2.0 * batch * m * n * k)
    rough = 2e14 if device.type == "cuda" else 1e11
    with matmul_precision("high" if name == "tf32" else "highest"):
        return _line(flops, clock.seconds(works, [each / rough for each in flops]))


def multiplier(device: torch.device, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Multiplies two batches as a step on the device does where results are not symmetric."""
    products, _ = choose_products("auto" if device.type == "cpu" else "torch", device, dtype)
    return partial(products.apply, alpha=1.0)


def _passes(clock: _Clock, beside: float) -> dict[str, float]:
    """Of elementwise passes: in memory and in the cache, with a change of type, turned, and norms in float64."""
    device = clock.world.device
    cuda = device.type == "cuda"
    sizes = [size * (16 if cuda else 1) for size in _PASSES]
    usual = sizes[3]  # as large as a batch that is iterated, or a chunk of them
    x, y = (torch.randn(sizes[-1] // 8, device=device) for _ in range(2))
    half = y.bfloat16()

    def cut(tensor: torch.Tensor, size: int, each: int) -> torch.Tensor:
        return tensor[: size // each // 128**2 * 128**2].view(-1, 128, 128)

    norm = partial(torch.linalg.vector_norm, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    works: dict[str, Callable[[], object]] = {
        "cast": partial(cut(y, usual, 10).add_, cut(half, usual, 10), alpha=0.5),
        "turn": partial(cut(y, usual, 8).copy_, cut(x, usual, 8).mT),
        "norm": partial(norm, cut(x, usual, 4)),
        "kernel": partial(torch.mul, x[:1], 0.5, out=y[:1]),
    }
    scaled: list[Callable[[], object]] = [
        partial(torch.mul, cut(x, size, 8), 0.5, out=cut(y, size, 8)) for size in sizes
    ]
    moved = [*sizes, *[usual] * len(works)]
    rough = [size / (1e12 if cuda else 2e10) for size in moved]
    seconds = clock.seconds([*scaled, *works.values()], rough)
    # Beside a load that comes and goes, what starting takes may be measured as more than all of a pass.
    rates = [size / max(each / 2, each - beside) for size, each in zip(moved, seconds, strict=True)]
    found = dict(zip(works, rates[len(sizes) :], strict=True)) | {"kernel": seconds[-1] if cuda else 0.0}
    scale = rates[: len(sizes)]
    middle = math.sqrt(scale[-1] * max(scale))
    cached = [size for size, each in zip(sizes, scale, strict=True) if each > middle]
    if cached and cached[-1] < sizes[-1]:
        inside = [each for size, each in zip(sizes, scale, strict=True) if size <= cached[-1]]
        found |= {"cache": statistics.median(inside), "cache.size": float(cached[-1])}
    return found | {"memory": scale[-1]}


def _launch(clock: _Clock) -> float:
    """Seconds of the host for an operation of a step: one of tiny matrices, which has little else to do."""
    world = clock.world
    params = [torch.nn.Parameter(torch.randn(8, 8 + 8 * (n % 4), device=world.device)) for n in range(32)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Muon(params, fp32_matmul_prec="highest", ns_backend="torch", tp_mode="blockwise")
    engine = optimizer.prepare()
    assert engine is not None, "it has matrices"
    free = Rates("", _NOTHING, {})
    operations = step_times(engine, free, {}, {}, nesterov=True).operations
    for _ in range(3):
        optimizer.step()
    found = []
    for _ in range(int(20 * clock.scale) + 3):
        world.barrier()
        begin = time.perf_counter()
        optimizer.step()
        found.append(time.perf_counter() - begin)
    return world.slowest([statistics.median(found) / operations])[0]


_NOTHING = {f"{name}.{what}": value for name in NUMBERS for what, value in (("flops", 1e30), ("start", 0.0))}
_NOTHING |= {"memory": 1e30, "kernel": 0.0, "launch": 0.0, "node": 1.0, "overlaps": 0.0}
"""Rates of a device that takes no time."""


def _messages(clock: _Clock) -> tuple[float, float]:
    """Seconds of a message over nothing, and bytes a second that a rank sends: of the collectives that a step has."""
    world, sent, works = clock.world, list[float](), list[Callable[[], object]]()
    others = (world.size - 1) / world.size
    for size in _MESSAGES:
        x, y = (torch.zeros(size, dtype=torch.uint8, device=world.device) for _ in range(2))
        whole = torch.empty(size * world.size, dtype=torch.uint8, device=world.device)
        works += [
            partial(dist.all_to_all_single, y, x),
            partial(dist.all_gather_into_tensor, whole, x),
            partial(dist.all_reduce, torch.zeros(size // 4, device=world.device)),
        ]
        sent += [others * size, (world.size - 1) * size, 2 * others * size]
    return _line(sent, clock.seconds(works, [3e-4 + each / 1e9 for each in sent]))

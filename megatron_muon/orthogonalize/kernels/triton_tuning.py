"""Which tile makes a Triton kernel fastest on a GPU: tried once for products of about one size, then read from disk."""

# Triton has no type stubs, and is not installed everywhere.
# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from triton.runtime.cache import get_cache_manager

_WARMUP_MS, _TRIAL_MS = 5, 20
"""How long a tile is tried; at least two launches, after six that find out how long one takes."""

_FILE = "tile.json"

_known: dict[tuple[Hashable, ...], Tile] = {}
"""The fastest tile of each kernel, GPU and kind of product, so far."""

_Launch = Callable[["Tile"], Any]


@dataclass(frozen=True)
class Tile:
    """A way to cut the result into tiles.

    Only what leaves the order of every sum over k as it is may differ between these: ranks that hold the same weight
    tune apart, and must still compute the same bits. The depth of a tile is therefore not tuned.

    Attributes:
        size: rows and columns of a tile, a power of two.
        warps: of each program.
        stages: of the software pipeline over k.
    """

    size: int
    warps: int
    stages: int


def fastest(
    kernel: Any,
    tiles: tuple[Tile, ...],
    kind: tuple[Hashable, ...],
    device: torch.device,
    launch: _Launch,
) -> Tile:
    """The tile with which a kernel takes the least time.

    It is tried on the device once (25 ms and eight launches for each tile, beside compilation), and written to Triton's
    cache on disk, ``TRITON_CACHE_DIR``, where other processes find it. Ranks that start together try side by side, and
    do not wait for each other: a file is replaced as a whole, and whichever is the last holds a right answer.

    Args:
        kernel: what is launched; a change of its source is another kernel.
        tiles: to choose from.
        kind: of products, in numbers and strings.
        device: where.
        launch: launches the kernel on the operands at hand by a tile. What it writes is the same for all.

    Raises:
        Exception: of the kernel, if it can be launched with none of the tiles.
    """
    place = (kernel, device, *kind)
    if place not in _known:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return tiles[0]  # nothing can be timed here; the bits are the same
        _known[place] = _remembered(kernel, tiles, kind, device, launch)
    return _known[place]


def _remembered(
    kernel: Any,
    tiles: tuple[Tile, ...],
    kind: tuple[Hashable, ...],
    device: torch.device,
    launch: _Launch,
) -> Tile:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    content = repr((triton.__version__, kernel.cache_key, name, tiles, kind))
    place = hashlib.sha256(content.encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, TypeError):  # broken, or not ours: it is written anew
        path = get_cache_manager(place).get_file(_FILE)
        if path is not None:
            return tiles[tiles.index(Tile(**json.loads(Path(path).read_text())))]
    found = _tried(tiles, launch)
    with contextlib.suppress(OSError):  # a full disk, or one that is only read: the next process tries again
        get_cache_manager(place).put(json.dumps(asdict(found)), _FILE, binary=False)
    return found


def _tried(tiles: tuple[Tile, ...], launch: _Launch) -> Tile:
    times: dict[Tile, float] = {}
    failure: Exception | None = None
    for tile in tiles:
        times[tile] = math.inf
        try:
            work = partial(launch, tile)
            times[tile] = triton.testing.do_bench(work, warmup=_WARMUP_MS, rep=_TRIAL_MS, return_mode="median")
        except Exception as error:  # as where a GPU has too little shared memory for a tile
            failure = error
    chosen = min(tiles, key=times.__getitem__)
    if failure is not None and math.isinf(times[chosen]):
        raise failure
    return chosen

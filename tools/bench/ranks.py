"""This process among those of a measurement: its device, its threads, and its process groups."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.errors import ConfigError

__all__ = ["Groups", "World", "choose_device", "cores", "groups_of", "joined"]

COLLECTIVE_TIMEOUT_S = 600
"""After which a rank that waits for another gives up."""


@dataclass(frozen=True)
class World:
    """The processes of a measurement.

    Attributes:
        rank: of this one.
        size: how many there are.
        device: of this one's tensors.
        threads: of torch in this process.
    """

    rank: int
    size: int
    device: torch.device
    threads: int

    @property
    def backend(self) -> str:
        """``gloo``, ``nccl``, or an empty string for a single process."""
        return str(dist.get_backend()) if self.size > 1 else ""

    def barrier(self) -> None:
        """Wait for all ranks, and for this one's device."""
        self.synchronize()
        if self.size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """The greatest of each over all ranks."""
        return [max(column) for column in zip(*self.gather(list(seconds)), strict=True)]

    def say(self, text: str) -> None:
        """One line of progress, from the first rank, to the error stream."""
        if self.rank == 0:
            print(f"bench: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Groups:
    """The place of this rank in a case.

    Attributes:
        tp: tensor-parallel group of dense weights; None if nothing is divided.
        expert_tp: that of experts.
        tp_rank: rank in ``tp``, else 0.
        ep_rank: which experts it has.
    """

    tp: dist.ProcessGroup | None = None
    expert_tp: dist.ProcessGroup | None = None
    tp_rank: int = 0
    ep_rank: int = 0


def groups_of(world: World, tp: int, ep: int) -> Groups:
    """Make the process groups of a case, on all ranks."""
    if tp == 1:
        return Groups(ep_rank=world.rank % ep)
    group = dist.group.WORLD
    if tp < world.size:
        group, _ = dist.new_subgroups(tp)
    return Groups(group, group if ep == 1 else None, world.rank % tp, world.rank % ep)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(option: str, ranks: int) -> str:
    """``cuda`` or ``cpu``, from ``--device``.

    Raises:
        ConfigError: if ``cuda`` is asked for and there are fewer GPUs than ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if option == "cuda" and gpus < ranks:
        raise ConfigError(f"--device cuda: torch finds {gpus} GPUs for {ranks} processes. Use --device cpu, or auto.")
    return "cuda" if option == "cuda" or (option == "auto" and gpus) else "cpu"


@contextlib.contextmanager
def joined(device: str, threads: int | None = None, store: str | None = None) -> Iterator[World]:
    """Join the process group that the environment tells of, if any, and leave it in the end.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: of torch; by default this process's share of the cores.
        store: file that the ranks meet through; by default at the launcher's address.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    where = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    threads = threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", str(size))))
    torch.set_num_threads(threads)
    if size > 1:
        meeting = None if store is None else f"file://{store}"
        backend = "nccl" if device == "cuda" else "gloo"
        limit = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        dist.init_process_group(backend, meeting, limit, size, rank)
    try:
        yield World(rank, size, where, threads)
    finally:
        if size > 1:
            dist.destroy_process_group()

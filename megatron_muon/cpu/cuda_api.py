"""What Megatron-Core calls in ``torch.cuda``, answered for the CPU.

Megatron-Core asks ``torch.cuda`` for the current device, for streams and events, for memory figures and for random
number state, without asking first whether there is a GPU. On the CPU there is one in-order "stream", so waiting and
recording have nothing to do; the generator is torch's default one; memory figures are zero.
"""

from __future__ import annotations

import contextlib
import os
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_muon._patching import Patch, replace_by

CPU = torch.device("cpu")

# Megatron-Core reads the compute capability to choose kernels and to insist on CUDA_DEVICE_MAX_CONNECTIONS=1 for
# hardware before Blackwell; 10.0 is the oldest answer for which it insists on nothing.
_CAPABILITY = (10, 0)


def _nothing(self: Any, *args: Any) -> None:
    """Nothing runs behind the caller's back."""


class Event:
    """Stands in for ``torch.cuda.Event``: the CPU works in program order, so an event has happened when recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, *args: Any) -> None:
        """Remember the time."""
        self._time = time.perf_counter()

    def query(self) -> bool:
        """Whether the recorded work is done: always."""
        return True

    wait = synchronize = _nothing

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds between two recorded events."""
        return (end_event._time - self._time) * 1000.0


class Stream:
    """Stands in for ``torch.cuda.Stream``; work "on" it runs at once, in program order."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority; there is one."""
        return (0, 0)

    wait_stream = wait_event = synchronize = _nothing

    def query(self) -> bool:
        """Whether the stream is idle: always."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record and return an event."""
        event = event or Event()
        event.record()
        return event


_STREAM = Stream()


@contextlib.contextmanager
def _no_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _current_device() -> torch.device:
    # A device, not an index: it is right wherever ``device=`` is accepted, also where no redirect reaches.
    return CPU


def _device_count() -> int:
    # Megatron-Core makes no model-parallel groups when this is 0; launchers compute ``local_rank % device_count``.
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _get_device_properties(*args: Any, **kwargs: Any) -> types.SimpleNamespace:
    major, minor = _CAPABILITY
    return types.SimpleNamespace(
        name="cpu", major=major, minor=minor, total_memory=0, multi_processor_count=os.cpu_count() or 1
    )


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Of the default generator, whatever device is asked for: the model draws from it."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """The counterpart of :func:`get_rng_state`."""
    torch.set_rng_state(new_state)


def _answer(value: Any) -> Callable[..., Any]:
    """A function that returns ``value`` whatever it is asked.

    A new one each time: torch.compile keeps a rule for each function of torch.cuda, and one function under two names
    with different rules stops it.
    """

    def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer


_FUNCTIONS: dict[str, tuple[Any, str]] = {
    "is_available": (_answer(False), "a machine that has a GPU must behave like one that has none"),
    "current_device": (_current_device, "Megatron-Core allocates on torch.cuda.current_device() everywhere"),
    "device_count": (_device_count, "with 0 devices Megatron-Core makes no model-parallel groups and seeds nothing"),
    "set_device": (_answer(None), "each rank selects its GPU by the local rank"),
    "device": (_no_context, "a context that selects a GPU"),
    "synchronize": (_answer(None), "the CPU works in program order"),
    "empty_cache": (_answer(None), "called between phases; there is no caching allocator"),
    "ipc_collect": (_answer(None), "called next to empty_cache"),
    "get_device_properties": (_get_device_properties, "asked for the compute capability and the memory size"),
    "get_device_capability": (_answer(_CAPABILITY), "asked while arguments are checked"),
    "get_device_name": (_answer("cpu"), "printed in logs"),
    "is_current_stream_capturing": (_answer(False), "asks the CUDA driver; there are no CUDA graphs"),
    "mem_get_info": (_answer((0, 0)), "asks the CUDA driver"),
    "device_memory_used": (_answer(0), "asks NVML; called by the memory report of megatron.training"),
    "reset_peak_memory_stats": (_answer(None), "asks the CUDA driver"),
    "manual_seed": (_manual_seed, "model-parallel seeding; on the CPU the model draws from the default generator"),
    "get_rng_state": (get_rng_state, "the generator the model draws from is the default one"),
    "set_rng_state": (set_rng_state, "the generator the model draws from is the default one"),
    "Stream": (Stream, "side streams of DDP, MoE and the pipeline"),
    "Event": (Event, "events of timers, MoE and the pipeline"),
    "current_stream": (_answer(_STREAM), "streams wait for the current one"),
    "default_stream": (_answer(_STREAM), "streams wait for the default one"),
    "stream": (_no_context, "work on a side stream runs at once"),
    "set_stream": (_answer(None), "there is one stream"),
}


PATCHES: list[Patch] = [
    Patch(f"torch.cuda:{name}", replace_by(value), reason, create=True, copies_in=("megatron",))
    for name, (value, reason) in _FUNCTIONS.items()
] + [
    Patch(
        "torch.cuda.random:get_rng_state",
        replace_by(get_rng_state),
        "Megatron-Core's random number tracker calls it under this name",
        copies_in=(),
    ),
    Patch(
        "torch.cuda.random:set_rng_state", replace_by(set_rng_state), "the counterpart of get_rng_state", copies_in=()
    ),
]

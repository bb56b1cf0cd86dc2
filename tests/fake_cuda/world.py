"""A rank of a world of GPUs, without any of them: fake CUDA tensors, recorded communication, a stand-in of torch.cuda.

torch's ``FakeTensorMode`` gives tensors on ``cuda`` that have shape, dtype, strides and memory of their own but no
contents, and refuses operations of tensors of different devices. :class:`World` puts around it what else a rank has.
Ranks follow one another in one process: nothing is sent, and what is received has no contents either.

    with World(rank=1, ranks=4) as world:
        tp = world.own_group([(0, 1), (2, 3)])     # all ranks make all groups, in one order
        weight = world.parameter(16, 24, dim=1)    # a shard by columns, on cuda, with a gradient
        muon = Muon([weight], tp_group=tp)
        with world.refusing(FIRST_STEP):
            muon.step()                            # documented waits
        with world.refusing(COMPARISON):
            muon.step()                            # none but the comparison of plans
    world.calls                                    # what it has communicated

What this proves: devices, dtypes, shapes, strides, order and sizes of communication, waits, buffers, bytes, kernels.
What it cannot: numbers, time, kernels of Triton and of others (they are as on a device that has none of them).
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode

from megatron_muon.orthogonalize import backends
from megatron_muon.orthogonalize.kernels import elementwise
from megatron_muon.routing.layout import WHOLE, MatrixLayout
from tests.fake_cuda.groups import Call, recorded_groups
from tests.fake_cuda.watch import Allowed, DeviceError, Watch

__all__ = ["COMPARISON", "FIRST_STEP", "Allowed", "DeviceError", "World"]


def _is_later_half(element: torch.Tensor) -> bool:
    """Whether an element comes from the second row of two: no matrix lacks its vector, each is known."""
    return 2 * element.storage_offset() * element.element_size() >= element.untyped_storage().nbytes()


COMPARISON = (
    Allowed("megatron_muon/optimizers/agreement.py:agree", "the plans of the ranks are compared: nothing differs", 0),
)
"""The wait of each step of an optimizer whose ranks nobody else makes compare (``engines.compared_elsewhere``)."""

FIRST_STEP = (
    *COMPARISON,
    Allowed(
        "megatron_muon/optimizers/sizes.py:refuse",
        "matrices of zeros are refused, once in a process: none is",
        0,
    ),
    Allowed("megatron_muon/optimizers/power.py:iterations", "all matrices have singular vectors", _is_later_half),
    Allowed("megatron_muon/optimizers/power.py:_first_vector", "noise to start from, made on the host once a shape"),
)
"""The waits of first steps, as the lines that wait say them."""

_MODE = FakeTensorMode(allow_non_fake_inputs=False)
"""One for all worlds: what the package keeps for a process (vectors of noise) meets the tensors of the next."""


class World:
    """A rank of a world.

    Attributes:
        watch: sees and refuses, see :class:`tests.fake_cuda.watch.Watch`; has the calls, waits, kernels, bytes.
        mode: torch's own mode below it.
    """

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        """
        Args:
            rank: which one this process is.
            ranks: how many there are.
        """
        self.rank, self.ranks = rank, ranks
        self.mode = _MODE
        self.watch = Watch(self.mode)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> World:
        with contextlib.ExitStack() as stack:
            stack.enter_context(recorded_groups(self.rank, self.ranks, self.watch))
            stack.enter_context(self._objects())
            stack.enter_context(_torch_cuda(self.watch))
            stack.enter_context(_without_kernels())
            # The package asks whether memory has been replaced by its address, which fake tensors have no other than 0.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            stack.enter_context(self.mode)
            stack.enter_context(self.watch)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def calls(self) -> list[Call]:
        """What the rank has communicated so far."""
        return self.watch.calls

    def refusing(self, allowed: Iterable[Allowed] = ()) -> contextlib.AbstractContextManager[None]:
        """Refuse within what a step must not do, but for some waits; see :class:`tests.fake_cuda.watch.Watch`."""
        return self.watch.refusing(allowed)

    def group(self, *ranks: int) -> dist.ProcessGroup | None:
        """A new group of some ranks; None if this rank is not in it. All ranks make all groups in one order."""
        made = dist.new_group(list(ranks))
        return made if isinstance(made, dist.ProcessGroup) else None

    def own_group(self, groups: Iterable[Iterable[int]]) -> dist.ProcessGroup:
        """Of new groups that cover the world, the one that this rank is in."""
        made = [self.group(*ranks) for ranks in groups]
        return next(group for group in made if group is not None)

    def parameter(
        self,
        *shape: int,
        dim: int | None = None,
        layout: MatrixLayout = WHOLE,
        dtype: torch.dtype = torch.float32,
        grad: bool = True,
        expert: bool = False,
    ) -> torch.nn.Parameter:
        """A weight of a layer on the device.

        Args:
            shape: of this rank's shard.
            dim: the dimension that tensor parallelism divides, as ``partition_dim`` counts it; None: whole.
            layout: its logical matrices.
            dtype: of weight and gradient.
            grad: whether it has a gradient.
            expert: whether the expert tensor-parallel group divides it.
        """
        param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda"))
        param.matrix_layout, param.expert_tp = layout, expert
        if dim is not None:
            param.tensor_model_parallel, param.partition_dim = True, dim
        if grad:
            param.grad = torch.empty_like(param)
        return param

    @contextlib.contextmanager
    def _objects(self) -> Iterator[None]:
        """Exchanges of small objects: all ranks have what this one has."""
        watch = self.watch

        def meet(kind: str, group: dist.ProcessGroup | None) -> int:
            group = dist.group.WORLD if group is None else group
            assert group is not None
            ranks = tuple(dist.get_process_group_ranks(group))
            watch.wait(f"{kind} of objects, which go through the memory of the host")
            watch.calls.append(Call(f"{kind}_object", ranks, group.rank(), (), (), torch.uint8, where=watch.place()))
            return len(ranks)

        def all_gather_object(into: list[Any], value: Any, group: Any = None) -> None:
            into[:] = [value] * meet("all_gather", group)

        def gather_object(
            value: Any, into: list[Any] | None = None, dst: Any = None, group: Any = None, group_dst: Any = None
        ) -> None:
            count = meet("gather", group)
            if into is not None:
                into[:] = [value] * count

        def broadcast_object_list(values: list[Any], src: Any = None, group: Any = None, **_: Any) -> None:
            meet("broadcast", group)

        with contextlib.ExitStack() as stack:
            for function in (all_gather_object, gather_object, broadcast_object_list):
                for module in (dist, dist.distributed_c10d):
                    stack.enter_context(patch.object(module, function.__name__, function))
            yield


class _Event:
    """A CUDA event; nothing is ever under way."""

    def __init__(self, wait: Callable[[str], Any]) -> None:
        self._wait = wait

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._wait("Event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _Stream:
    """A CUDA stream."""

    def __init__(self, wait: Callable[[str], Any]) -> None:
        self._wait = wait
        self.cuda_stream, self.device = 0, torch.device("cuda", 0)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event(self._wait)

    def synchronize(self) -> None:
        self._wait("Stream.synchronize")

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _torch_cuda(watch: Watch) -> Iterator[None]:
    """``torch.cuda`` of a GPU that is there: everything that would ask a driver, and nothing else.

    ``is_available`` stays False: by it ``FakeTensorMode`` decides whether it may touch a real device.
    """
    wait, properties = (
        watch.wait,
        types.SimpleNamespace(
            name="fake", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, gcnArchName=""
        ),
    )
    standing: dict[str, Any] = {
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "is_initialized": lambda: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "fake",
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: wait("torch.cuda.synchronize"),
        "current_stream": lambda device=None: _Stream(wait),
        "default_stream": lambda device=None: _Stream(wait),
        "Stream": lambda *args, **kwargs: _Stream(wait),
        "Event": lambda *args, **kwargs: _Event(wait),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: watch.live,
        "max_memory_allocated": lambda device=None: watch.peak,
    }
    with contextlib.ExitStack() as stack:
        for name, value in standing.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        yield


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """No kernels but torch's: others cannot be launched, nor be checked by numbers."""
    from megatron_muon.orthogonalize.kernels import triton_elementwise

    reason = "has nothing to run on: the device is fake"
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(backends, "_checked", lambda backend, *_: backends._unusable(backend, reason)))
        stack.enter_context(patch.object(triton_elementwise, "obstacle", lambda *_: reason))
        stack.enter_context(patch.object(elementwise, "_taken", set()))
        yield

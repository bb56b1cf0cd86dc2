"""Optimizer state that lives in memory of the host, and comes to the device through two windows while a step needs it.

Between steps momentum, and with ``all`` what masters have beside their bfloat16 weights, lie in pinned memory
(``--muon-offload``). A step opens them part by part (:func:`megatron_muon.optimizers.storage.opened`): a part is copied
into a window, and back when it has changed. The two windows take turns, and copies in and out run on streams of their
own, which wait for nothing but the window, and what it is copied from, to be ready: the host launches a chunk's copies
while the device is still at the products of the chunk before, so that they go on under these.

On CPUs the same copies are made from memory of the host to memory of the host, and all numbers are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_muon.engine.step import CHUNK_MB, MEBIBYTE
from megatron_muon.optimizers.forms import Form, Planes
from megatron_muon.optimizers.storage import MOMENTUM, REMAINDER, SCALE, TIES, WINDOWS, Kept

OFFLOADED = {"momentum": (MOMENTUM, SCALE), "all": (MOMENTUM, SCALE, REMAINDER, TIES)}
"""The state that lives on the host, by ``--muon-offload``."""

_ALIGNED = 256
"""Bytes at whose multiples tensors begin in a window, as in torch's own allocator."""

_CPU = torch.device("cpu")


@dataclass
class Counters:
    """What has gone through the windows of an optimizer so far.

    Attributes:
        bytes_in: copied to the device.
        bytes_out: copied back.
        parts: how many times a window was opened.
        largest: bytes of the largest window.
    """

    bytes_in: int = 0
    bytes_out: int = 0
    parts: int = 0
    largest: int = 0


@dataclass(eq=False)
class _Window:
    """Memory on the device for one part at a time.

    Attributes:
        memory: bytes; None before it is used.
        is_open: whether a step works on it.
        free: when what was in it is of no more use.
    """

    memory: torch.Tensor | None = None
    is_open: bool = False
    free: torch.cuda.Event | None = None


class Streamed(Form):
    """Numbers kept in some form, whose planes from one on are on the host."""

    def __init__(self, inner: Form, windows: Windows, first: int) -> None:
        self.name, self._inner, self._windows, self._first = inner.name, inner, windows, first

    def decode(self, planes: Planes) -> torch.Tensor:
        """See :meth:`Form.decode`."""
        return self._inner.decode(planes)

    def encode(self, values: torch.Tensor, planes: Planes) -> None:
        """See :meth:`Form.encode`."""
        self._inner.encode(values, planes)

    def decode_all(self, parts: Sequence[Planes]) -> list[torch.Tensor]:
        """See :meth:`Form.decode_all`."""
        return self._inner.decode_all(parts)

    def encode_all(self, numbers: Sequence[torch.Tensor], parts: Sequence[Planes]) -> None:
        """See :meth:`Form.encode_all`."""
        self._inner.encode_all(numbers, parts)

    @property
    def bound(self) -> int:
        """See :attr:`Form.bound`."""
        return self._windows.bound

    @contextlib.contextmanager
    def near(self, parts: Sequence[Planes], writes: bool) -> Iterator[Sequence[Planes]]:
        """See :meth:`Form.near`."""
        first = self._first
        with self._windows.opened([plane for part in parts for plane in part[first:]], writes) as found:
            each = iter(found)
            yield [[*part[:first], *(next(each) for _ in part[first:])] for part in parts]


class Windows:
    """The windows of one optimizer.

    Attributes:
        names: of the state that lives on the host.
        bound: bytes that a window has at most, unless the rows of a single weight that are under Adam have more; 0
            before there is a weight.
        counters: what has gone through them.
    """

    def __init__(self, names: Sequence[str], chunk_mb: float) -> None:
        """
        Args:
            names: of :data:`OFFLOADED`.
            chunk_mb: as of :class:`megatron_muon.engine.step.StepEngine`.
        """
        self.names, self._chunk_mb = tuple(names), chunk_mb
        self.bound, self.counters = 0, Counters()
        self._device = _CPU
        self._forms: dict[tuple[Form, int], Streamed] = {}
        self._placed: Any = WeakTensorKeyDictionary()
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None  # of copies in, and of copies out
        self._written: dict[int, torch.cuda.Event] = {}  # when a storage on the host has what it was sent last
        self.forget()

    def forget(self) -> None:
        """Give the windows' memory back, between steps."""
        self._windows = [_Window(), _Window()]  # the next one to be used is the first

    def settle(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Bring a weight's state to the host, wherever it is: it is new, loaded, or others have moved it."""
        for name in self.names:
            if (value := state.get(name)) is not None and value not in self._placed:
                state[name] = value if param.device == _CPU else to_host(value)
                self._placed[state[name]] = True

    def kept(self, kept: Kept, first: int) -> Kept:
        """Numbers whose planes from ``first`` on are on the host, if they are: where a step finds them."""
        if first and REMAINDER not in self.names:
            return kept
        if (form := self._forms.get((kept.form, first))) is None:
            form = self._forms[kept.form, first] = Streamed(kept.form, self, first)
        return Kept(form, kept.planes)

    @contextlib.contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Within, weights on a device are worked on; what has changed is on the host when it is left."""
        if device != self._device or not self.bound:
            self.forget()
            self._device = device
            self.bound = int((self._chunk_mb or CHUNK_MB[device.type]) * MEBIBYTE)
            is_gpu = device.type == "cuda"
            self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if is_gpu else None
        token = WINDOWS.set(self)
        try:
            yield
        finally:
            WINDOWS.reset(token)
            self._written.clear()
            # The host waits: whoever reads state between steps, a save or a framework, finds what the step has left.
            for stream in self._streams or ():
                stream.synchronize()

    @contextlib.contextmanager
    def opened(self, far: list[torch.Tensor], writes: bool) -> Iterator[list[torch.Tensor]]:
        """Tensors on the device in place of such on the host, copied back if they are changed."""
        window = next((each for each in self._windows if not each.is_open), None)
        assert window is not None, "a step opens three parts at a time"
        near, size = self._cut(window, far), sum(tensor.nbytes for tensor in far)
        self.counters.parts += 1
        self.counters.bytes_in += size
        self._copy_in(window, near, far)
        window.is_open = True
        self._windows = [*(each for each in self._windows if each is not window), window]
        changed: list[torch.Tensor] = []
        try:
            yield near
            changed = far if writes else []
        finally:
            window.is_open = False
            self._copy_out(window, near, changed)  # after an error, too, kernels may still be at work on the window
        self.counters.bytes_out += size if writes else 0

    def _copy_in(self, window: _Window, near: list[torch.Tensor], far: list[torch.Tensor]) -> None:
        if self._streams is None:
            _copy(near, far)
            return
        stream = self._streams[0]
        for event in (window.free, *(self._written.get(_storage(tensor)) for tensor in far)):
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            _copy(near, far)
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def _copy_out(self, window: _Window, near: list[torch.Tensor], far: list[torch.Tensor]) -> None:
        if self._streams is None:
            _copy(far, near[: len(far)])
            return
        window.free, stream = torch.cuda.current_stream(self._device).record_event(), self._streams[1]
        if not far:
            return
        stream.wait_event(window.free)
        with torch.cuda.stream(stream):
            _copy(far, near)
        window.free = stream.record_event()
        self._written |= dict.fromkeys(map(_storage, far), window.free)

    def _cut(self, window: _Window, far: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors like those on the host, in the memory of a window."""
        starts, size = [], 0
        for tensor in far:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        memory = self._memory(window, size)
        return [
            memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, far, strict=True)
        ]

    def _memory(self, window: _Window, size: int) -> torch.Tensor:
        """The memory of a window, which has ``size`` bytes at least."""
        if window.memory is None or window.memory.numel() < size:
            streams = self._streams or ()
            if window.memory is not None:
                for stream in streams:
                    window.memory.record_stream(stream)
            window.memory = None  # before there is another
            window.memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            for stream in streams[:1]:  # what had this memory before may still be at work on it
                stream.wait_stream(torch.cuda.current_stream(self._device))
        self.counters.largest = max(self.counters.largest, size)
        return window.memory


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory of the host."""
    return torch.empty_like(tensor, device=_CPU, pin_memory=True).copy_(tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for pair in zip(targets, sources, strict=True):
        for target, source in _pieces(*pair):
            target.copy_(source, non_blocking=True)


def _pieces(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views that are contiguous on the host, too, so that copies go on without the processor."""
    if one.dim() <= 2 or (one.is_contiguous() and other.is_contiguous()):
        yield one, other
        return
    for its, others in zip(one.unbind(0), other.unbind(0), strict=True):
        yield from _pieces(its, others)

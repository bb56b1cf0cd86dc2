"""Sees every operation on fake CUDA tensors, and refuses what a GPU would have to wait for, or would do wrong.

Refused, with the line that did it:

* reading a number on the host, and operations whose result's size the host must learn, unless :class:`Allowed`;
* operations of linear algebra whose outcome torch checks on the host;
* copies from the device to the host, and from pageable memory of the host to the device, which wait; a tensor of the
  host, even of one number, among the operands of an operation of the device, which is such a copy;
* using a buffer of a communication that has not been waited for: writing to what it sends, touching what it fills;
* sending what is on the host, or not contiguous.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_muon
from tests.fake_cuda.groups import Call
from tests.fake_cuda.launches import hidden_bytes, launches

__all__ = ["Allowed", "DeviceError", "Watch"]

_ROOT = Path(megatron_muon.__file__).parents[1]
_HERE = Path(__file__).parent
_IGNORED = (str(Path(torch.__file__).parent), *(str(_HERE / name) for name in ("watch.py", "groups.py", "world.py")))

_CHECKED_ON_HOST = {"_linalg_eigh", "_linalg_svd", "linalg_svd", "linalg_eig", "linalg_lstsq", "linalg_inv_ex_checked"}
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "item"}
_NO_KERNEL = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "detach", "set_"),
    *("resize_", "_unsafe_view", "record_stream"),
}


class DeviceError(AssertionError):
    """What would make the host wait, or the result wrong, on a GPU."""


@dataclass(frozen=True)
class Allowed:
    """A place where the host may wait for the device.

    Attributes:
        where: ``file.py:function``, the file from the root of the repository.
        reason: why.
        answer: what a number read there is, or a function of the fake tensor that is read.
    """

    where: str
    reason: str
    answer: Any = 0


@dataclass(frozen=True)
class _Form:
    """What an operation does, from its schema."""

    is_view: bool
    mutates: tuple[int, ...]
    reads_host: bool


@cache
def _form(func: Any) -> _Form:
    schema = func._schema
    written = tuple(
        number for number, arg in enumerate(schema.arguments) if arg.alias_info is not None and arg.alias_info.is_write
    )
    aliases = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
    tags = set(func.tags)
    name = func.overloadpacket.__name__
    waiting = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & tags
    reads = (bool(waiting) and name != "index") or name in _READS | _CHECKED_ON_HOST
    return _Form(aliases and not written, written, reads)


class Watch(TorchDispatchMode):
    """The mode above a ``FakeTensorMode``.

    Attributes:
        strict: whether host waits are refused; otherwise they are answered with zeros.
        allowed: the places where they are not refused.
        calls: what the rank has communicated.
        waits: where the host has waited, by ``file.py:function``.
        kernels: how often each operation of the device was carried out that is no view: a ``_foreach`` counts once.
        launches: kernels that these were on a GPU, see :func:`tests.fake_cuda.launches.launches`.
        live: bytes of tensors of the device that were made under the mode and are alive.
        written: the storages (``untyped_storage()._cdata``) that operations have written to.
        peak: the most that ``live`` was, with what operations took for themselves; set it to ``live`` to begin anew.
    """

    def __init__(self, mode: FakeTensorMode, device: str = "cuda") -> None:
        super().__init__()
        self._mode, self._device = mode, device
        self.strict = False
        self.allowed: dict[str, Allowed] = {}
        self.calls: list[Call] = []
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.live = self.peak = 0
        self.written: set[int] = set()
        self.seen: Callable[[Any, Any, Any], None] | None = None
        self._known: dict[int, torch.dtype] = {}
        self._pending: dict[int, tuple[Call, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]] = {}
        self._held: dict[int, list[tuple[int, int, int, bool]]] = {}

    # What torch does.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        form, name = _form(func), func.overloadpacket.__name__
        tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
        are_fake = [isinstance(tensor, FakeTensor) for tensor in tensors]
        if not any(are_fake) and torch.device(kwargs.get("device") or "cpu").type != self._device:
            with unset_fake_temporarily():  # what the host computes for itself has contents
                return func(*args, **kwargs)
        if not all(are_fake):
            args, kwargs = self._as_fake(args), self._as_fake(kwargs)
            tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
        on_device = [tensor for tensor in tensors if tensor.device.type == self._device]
        if form.reads_host and on_device:
            answer = self._host(func, on_device[0])
            if name in ("_local_scalar_dense", "item"):
                return _as(answer, on_device[0].dtype)
            if name in _READS:
                return bool(answer)
        if name in ("masked_fill", "masked_fill_") and isinstance(args[2], torch.Tensor):
            self._host(func, args[2])  # CUDA's kernel takes a number
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and on_device:
            self._check_indices(func, args[1])
        self._check_host_memory(func, name, tensors, on_device, args, kwargs)
        if self._held and not form.is_view:
            self._check_pending(func, form, args, kwargs, tensors)
        self.peak = max(self.peak, self.live + (hidden_bytes(name, args, kwargs) if on_device else 0))
        result = func(*args, **kwargs)
        found = [result] if isinstance(result, torch.Tensor) else list(_tensors((result,)))
        if not form.is_view and name not in _NO_KERNEL:
            changed = [args[number] for number in form.mutates if number < len(args)]
            self.written.update(tensor.untyped_storage()._cdata for tensor in _tensors(changed))
            its = [tensor for tensor in (*found, *_tensors(changed)) if tensor.device.type == self._device]
            if its:
                self.kernels[name] += 1
                self.launches[name] += launches(name, args, result)
        for tensor in found:
            if tensor.device.type == self._device:
                self._meet(tensor)
        if self.seen is not None:
            self.seen(func, args, result)
        return result

    def _as_fake(self, values: Any) -> Any:
        """Tensors that were made from memory of the host, past all modes, as fake ones of the host."""
        if isinstance(values, dict):
            return {key: self._as_fake(value) for key, value in values.items()}
        if isinstance(values, (list, tuple)):
            return type(values)(map(self._as_fake, values))
        if isinstance(values, torch.Tensor) and not isinstance(values, FakeTensor):
            return self._mode.from_tensor(values)
        return values

    def _check_indices(self, func: Any, indices: Any) -> None:
        for index in _tensors(indices):
            if index.dtype in (torch.bool, torch.uint8):
                self._host(func, index)
            elif index.device.type == "cpu":
                self.wait(f"{func} by indices in the memory of the host")

    def _check_host_memory(
        self, func: Any, name: str, tensors: list[torch.Tensor], on_device: list[torch.Tensor], args: Any, kwargs: Any
    ) -> None:
        target = kwargs.get("device") if name == "_to_copy" else None
        if target is not None and tensors:
            self._check_copy(tensors[0].device.type, torch.device(target).type, tensors[0], kwargs)
        elif on_device and len(on_device) != len(tensors):
            if name in ("copy_", "_foreach_copy_") and len(tensors) >= 2:
                source = next(tensor for tensor in tensors if tensor.device != tensors[0].device)
                given = {"non_blocking": args[2]} if len(args) > 2 else kwargs
                self._check_copy(source.device.type, tensors[0].device.type, source, given)
            else:
                self.wait(f"{func} of the device with a tensor of the host")

    def _check_copy(self, source: str, target: str, tensor: torch.Tensor, kwargs: Any) -> None:
        if {source, target} != {"cpu", self._device} or kwargs.get("non_blocking"):
            return  # from pageable memory the host may wait for its own copy, not for the device
        where = "to the host" if target == "cpu" else "from the host"
        self.wait(f"a copy of {tuple(tensor.shape)} {tensor.dtype} {where}, which waits (non_blocking=True does not)")

    def _host(self, func: Any, tensor: torch.Tensor) -> Any:
        allowed = self.wait(f"{func}: the host reads {tuple(tensor.shape)} {tensor.dtype}")
        answer = allowed.answer if allowed is not None else 0
        return answer(tensor) if callable(answer) else answer

    def wait(self, what: str) -> Allowed | None:
        """The host waits for the device.

        Raises:
            DeviceError: unless it is allowed there, or nothing is refused.
        """
        where = self.place()
        self.waits[where] += 1
        if self.strict and where not in self.allowed:
            raise DeviceError(f"{where}: {what}")
        return self.allowed.get(where)

    def _meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = tensor.dtype
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size

    # What ranks say to each other: tests.fake_cuda.groups.Listener.

    def started(self, call: Call, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> int:
        """A communication begins."""
        for tensor in (*reads, *writes):
            if tensor.device.type != self._device:
                raise DeviceError(f"{call.where}: {call.kind} of a tensor on {tensor.device}")
            if not tensor.is_contiguous():
                raise DeviceError(f"{call.where}: {call.kind} of {tuple(tensor.shape)} that is not contiguous")
        number = len(self.calls)
        self.calls.append(call)
        for tensors, is_written in ((reads, False), (writes, True)):
            for tensor in tensors:
                self._check_held(call.kind, tensor, is_written)
        # Kept until it is waited for, as NCCL's memory is.
        self._pending[number] = call, tuple(reads), tuple(writes)
        for tensors, is_written in ((reads, False), (writes, True)):
            for tensor in tensors:
                key, start, stop = _place(tensor)
                self._held.setdefault(key, []).append((start, stop, number, is_written))
        return number

    def waited(self, number: int) -> None:
        """A communication has been waited for."""
        if self._pending.pop(number, None) is None:
            return
        for key, held in list(self._held.items()):
            left = [each for each in held if each[2] != number]
            if left:
                self._held[key] = left
            else:
                del self._held[key]

    def check_all_waited(self) -> None:
        """Refuse communication that nobody has waited for."""
        for call, _, _ in self._pending.values():
            raise DeviceError(f"{call.where}: {call.kind} that nobody has waited for")

    def _check_pending(self, func: Any, form: _Form, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
        written = {id(t) for number in form.mutates if number < len(args) for t in _tensors((args[number],))}
        written |= {id(t) for t in _tensors((kwargs.get("out"),))}
        for tensor in tensors:
            self._check_held(str(func), tensor, id(tensor) in written)

    def _check_held(self, what: str, tensor: torch.Tensor, writes: bool) -> None:
        for start, stop, number, is_filled in self._held.get(tensor.untyped_storage()._cdata, ()):
            _, first, last = _place(tensor)
            if (writes or is_filled) and first < stop and start < last:
                call = self._pending[number][0]
                verb = "writes to" if writes else "reads"
                raise DeviceError(
                    f"{self.place()}: {what} {verb} a buffer of {call.kind} ({call.where}) before its wait"
                )

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """Of the numbers in a tensor's memory, also if it is a view of their bytes."""
        return self._known.get(tensor.untyped_storage()._cdata, tensor.dtype)

    def place(self) -> str:
        """``file.py:function`` of the innermost frame outside torch and this harness."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if not name.startswith((*_IGNORED, "<")):
                *_, within = name.split("site-packages/")  # of an environment, wherever it is
                # Of a generator or lambda the function that it is in.
                names = [each for each in frame.f_code.co_qualname.split(".") if not each.startswith("<")]
                function = names[-1] if names else "<module>"
                return f"{within.removeprefix(f'{_ROOT}/')}:{function}"
            frame = frame.f_back  # type: ignore[assignment]
        return "?"

    @contextmanager
    def refusing(self, allowed: Iterable[Allowed] = ()) -> Iterator[None]:
        """Refuse waits within, but for some, and communication that is left without a wait at the end."""
        before = self.strict, self.allowed
        self.strict, self.allowed = True, {each.where: each for each in allowed}
        try:
            yield
            self.check_all_waited()
        finally:
            self.strict, self.allowed = before


def _as(answer: Any, dtype: torch.dtype) -> Any:
    return bool(answer) if dtype == torch.bool else float(answer) if dtype.is_floating_point else int(answer)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _place(tensor: torch.Tensor) -> tuple[int, int, int]:
    """A storage, and which bytes of it a tensor may touch."""
    size, start = tensor.element_size(), tensor.storage_offset()
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    return tensor.untyped_storage()._cdata, start * size, (start + extent) * size

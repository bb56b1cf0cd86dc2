"""Optimizer state that sleeps while something else has the device: on the host, or in a file, and back bit for bit.

Nothing is changed where it lies: tensors of state are replaced by others, and master weights are given other memory. A
save that is under way in the background keeps what it has begun with.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.handled import ASLEEP, STEP, refuse_asleep
from megatron_muon.optimizers.state_files import StateFile
from megatron_muon.optimizers.windows import to_host
from megatron_muon.routing.blocks import is_dtensor

HOST = "host"
"""Where state sleeps in memory of the host; any other word is a folder."""

_CPU = torch.device("cpu")


class Entry(NamedTuple):
    """A tensor that an optimizer keeps between steps.

    Attributes:
        state: the state of its weight; None: it is a master weight, an object that others hold, too.
        key: its name.
        tensor: itself.
        device: of its weight.
        home: where it is between steps: on that device, or the host (:mod:`megatron_muon.optimizers.windows`).
    """

    state: dict[str, Any] | None
    key: str
    tensor: torch.Tensor
    device: torch.device
    home: torch.device

    @property
    def is_home(self) -> bool:
        """Whether it is where a step looks for it."""
        return self.tensor.device == self.home and self.tensor not in IN_FILES

    @property
    def is_on_device(self) -> bool:
        """Whether it is where its weight is."""
        return self.tensor.device == self.device and self.tensor not in IN_FILES

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Have another tensor, or its memory, in its place; returns what is there now."""
        if self.state is not None:
            self.state[self.key] = tensor
            return tensor
        self.tensor.grad = None  # Megatron-Core copies the gradients again before each step
        self.tensor.data = tensor
        return self.tensor


IN_FILES: Any = WeakTensorKeyDictionary()
"""Of what stands in the place of a tensor that is in a file: the file, and the tensor's number there."""


class Sleep(NamedTuple):
    """That the state of an optimizer is asleep.

    Attributes:
        where: :data:`HOST` or a folder.
        wake: brings it back, with all that was put to sleep together.
    """

    where: str
    wake: Callable[[], Any]

    def __str__(self) -> str:
        return "on the host" if self.where == HOST else f"in {self.where}"


_HOOKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers whose state dictionaries ask whether they are asleep."""


def refuse_reading(inner: torch.optim.Optimizer) -> None:
    """Refuse to read state that is in a file, or masters there; on the host they are at hand.

    Raises:
        ConfigError: naming the call that brings it back.
    """
    sleep = ASLEEP.get(inner)
    if sleep is not None and sleep.where != HOST:
        raise ConfigError(
            f"The state of {type(inner).__name__} is asleep {sleep}: call wake() of the optimizer, or "
            "megatron_muon.wake(optimizer), before it is read or saved."
        )


def _wake_to_load(inner: torch.optim.Optimizer, _: Any) -> None:
    if (sleep := ASLEEP.get(inner)) is not None:
        sleep.wake()


def entries_of(optimizer: torch.optim.Optimizer) -> list[Entry]:
    """What an optimizer of torch keeps beside the weights that it was given."""
    return [each for param, state in optimizer.state.items() for each in entries_in(optimizer, state, param.device)]


def entries_in(optimizer: torch.optim.Optimizer, state: dict[str, Any], device: torch.device) -> list[Entry]:
    """What there is in the state of a weight, which is on a device."""
    windows = getattr(optimizer, "windows", None)
    on_host = () if windows is None else windows.names
    return [
        Entry(state, key, value, device, _CPU if key in on_host else device)
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != STEP
    ]


@torch.no_grad()
def put_to_sleep(
    inners: Sequence[torch.optim.Optimizer],
    entries: Sequence[Entry],
    to: str | os.PathLike[str],
    wake: Callable[[], Any],
) -> int:
    """Move what optimizers keep away from the device; again without harm, for what has come to it meanwhile.

    Args:
        inners: the optimizers, whose steps are refused from now on.
        entries: all that they keep.
        to: :data:`HOST`, or a folder, which gets a file.
        wake: brings it back.

    Returns:
        bytes that were moved.

    Raises:
        OSError: from :class:`StateFile`; nothing has changed.
        ConfigError: if state is in DTensors.
    """
    if any(is_dtensor(entry.tensor) for entry in entries):
        raise ConfigError(
            "sleep() of an optimizer of DTensors, whose state lies where their meshes are: use fully_shard's "
            "CPUOffloadPolicy, or save and load the state."
        )
    for inner in inners:
        if (graph := getattr(inner, "graph", None)) is not None:
            graph.release()
        if (windows := getattr(inner, "windows", None)) is not None:
            windows.forget()
    files = [IN_FILES[entry.tensor][0] for entry in entries if entry.tensor in IN_FILES]
    if to == HOST:
        # On CPU processes there is nothing to free; a copy shows that nothing hangs on where state lies.
        is_known = all(inner in ASLEEP for inner in inners)
        moving = [entry for entry in entries if entry.is_on_device and not (is_known and entry.device == _CPU)]
        for entry in moving:
            is_down = entry.device.type == "cuda"
            copy = torch.empty_like(entry.tensor, device=_CPU, pin_memory=is_down)
            entry.put(copy.copy_(entry.tensor, non_blocking=is_down))
    else:
        moving = [entry for entry in entries if entry.tensor not in IN_FILES]
        if moving:
            files.append(StateFile(to, [entry.tensor for entry in moving]))
        for number, entry in enumerate(moving):
            IN_FILES[entry.put(_stand_in(entry))] = files[-1], number
    where = str(files[0].path.parent) if files else HOST
    for inner in inners:
        ASLEEP[inner] = Sleep(where, wake)
        if inner not in _HOOKED:
            _HOOKED.add(inner)
            inner.register_state_dict_pre_hook(refuse_reading)
            inner.register_load_state_dict_pre_hook(_wake_to_load)
            if not hasattr(inner, "refuse_step"):  # by which ours refuse it on all ranks at once
                inner.register_step_pre_hook(lambda its, *_: refuse_asleep(its))
    _settle()
    return sum(entry.tensor.nbytes for entry in moving)


def _stand_in(entry: Entry) -> torch.Tensor:
    """A tensor of the same shape without contents: what a step would read is refused."""
    if entry.state is not None:
        return torch.empty_like(entry.tensor, device="meta")
    # torch gives a parameter no memory of "meta"; one element stands for all.
    return torch.zeros((), dtype=entry.tensor.dtype).expand(entry.tensor.shape)


@torch.no_grad()
def awaken(inners: Sequence[torch.optim.Optimizer], entries: Sequence[Entry]) -> int:
    """Bring what optimizers keep to their weights' device, whoever has moved it away.

    Args:
        inners: the optimizers.
        entries: all that they keep.

    Returns:
        bytes that were moved.

    Raises:
        OSError: from :meth:`StateFile.read`; what was not read before it can be read later.
    """
    moving = [entry for entry in entries if not entry.is_home]
    for entry in moving:
        if (kept := IN_FILES.get(entry.tensor)) is None:
            found = entry.tensor
        else:
            found = kept[0].read(kept[1], entry.home)
            del IN_FILES[entry.tensor]
        entry.put(to_host(found) if entry.home != entry.device else found.to(entry.home))
    for inner in inners:
        ASLEEP.pop(inner, None)
    if moving:  # every load asks for it
        _settle()
    return sum(entry.tensor.nbytes for entry in moving)


def zeros_for(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Zeros in the place of a tensor in a weight's state: itself, or, of one that is in a file, another one."""
    return tensor.zero_() if IN_FILES.pop(tensor, None) is None else torch.zeros_like(tensor, device=param.device)


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # copies are under way; this is between steps
        torch.cuda.empty_cache()


def sleep(optimizer: torch.optim.Optimizer, to: str | os.PathLike[str] = HOST) -> int:
    """:func:`megatron_muon.sleep` of an optimizer of torch."""
    return put_to_sleep([optimizer], entries_of(optimizer), to, later(wake, optimizer))


def wake(optimizer: torch.optim.Optimizer) -> int:
    """:func:`megatron_muon.wake` of an optimizer of torch."""
    return awaken([optimizer], entries_of(optimizer))


def later(call: Callable[[Any], Any], subject: Any) -> Callable[[], Any]:
    """A call about something that it does not keep alive."""
    known = weakref.ref(subject)
    return lambda: None if (there := known()) is None else call(there)

"""Elementwise passes of a step over the matrices of a chunk: what is done before they are orthogonalized, and after.

By torch's own operations, each of which is a pass over memory; or by one kernel for all of them
(:mod:`megatron_muon.orthogonalize.kernels.triton_elementwise`), on GPUs where :func:`prepare` has found that it gives
the same bits, and faster. Since the bits are the same, ranks need not agree on it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from megatron_muon.orthogonalize.kernels import is_capturing
from megatron_muon.orthogonalize.kernels.gate import seconds

Rate = float | torch.Tensor
"""A learning rate, or what it comes to; as a tensor it has no dimension, and is never read by the host."""

_Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]

_TRIAL = 1 << 26
"""Elements in the trial by time: as many as a chunk has."""

_COPIED = 320 << 16
"""Elements of which copies are made at a time: as many as one launch of torch's kernels for lists of tensors takes."""

_SMALL = 1 << 20
"""Elements that a GPU adds in about the time that it takes to launch a kernel."""

_taken: set[tuple[Any, ...]] = set()
"""The passes that the kernels do: device, name of the pass, and dtypes of its tensors."""


def pack(momenta: _Tensors, grads: _Tensors, slots: _Tensors, momentum: float | None, nesterov: float) -> None:
    """Update momentum, and write what is to be orthogonalized into a batch.

    ``M <- lerp(M, G, 1 - momentum)``, then ``slot <- lerp(G, M, nesterov)``, or M itself; both are rounded to the dtype
    of M, before that of the slot.

    Args:
        momenta: of some matrices, in any shapes and strides; changed in place.
        grads: of the same shapes, read only.
        slots: of the same shapes, in a batch; filled.
        momentum: decay of the momentum; None if it has been updated already.
        nesterov: weight of the momentum in its mix with the gradient; 1 if it is taken as it is.
    """
    if _is_taken("pack", momenta, grads, slots) and _kernels().pack(momenta, grads, slots, momentum, nesterov):
        return
    if not momenta:
        return
    if grads[0].dtype != momenta[0].dtype:
        theirs, grads = grads, [torch.empty_like(grad, dtype=momenta[0].dtype) for grad in grads]
        torch._foreach_copy_(grads, theirs)  # on GPUs one launch for all
    if momentum is not None:
        torch._foreach_lerp_(momenta, grads, 1.0 - momentum)
    if nesterov == 1.0:
        torch._foreach_copy_(slots, momenta)
    elif momenta[0].is_cuda and all(slot.dtype == own.dtype for slot, own in zip(slots, momenta, strict=True)):
        torch._foreach_copy_(slots, grads)
        torch._foreach_lerp_(slots, momenta, nesterov)
    elif momenta[0].is_cuda:
        for owns, some, into in _pieces(momenta, grads, slots):
            torch._foreach_copy_(into, torch._foreach_lerp(some, owns, nesterov))
    else:  # without a copy of all of them
        for own, grad, slot in zip(momenta, grads, slots, strict=True):
            if slot.dtype == own.dtype:
                torch.lerp(grad, own, nesterov, out=slot)
            else:
                slot.copy_(torch.lerp(grad, own, nesterov))


def add(
    weights: _Tensors,
    updates: _Tensors,
    factors: Sequence[float],
    lr: Rate,
    kept: Rate | None = None,
    cautious: Rate | None = None,
) -> None:
    """Let weights decay and add their updates: ``W <- kept W - lr factor U``.

    A weight of 16 bits is rounded once: less than half a unit, by itself, would never change it.

    Args:
        weights: in any shapes and strides; changed in place.
        updates: of the same shapes; those of weights of 16 bits may be changed.
        factors: one of each update.
        lr: learning rate.
        kept: what is left of weights when they decay; None if they do not.
        cautious: how much is taken away of the elements that the update makes smaller; None if nothing is.
    """
    plain = cautious is None and not isinstance(lr, torch.Tensor) and not isinstance(kept, torch.Tensor)
    if plain and _is_taken("add", weights, updates) and _kernels().add(weights, updates, factors, lr, kept):
        return
    by_factor: dict[float, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for weight, update, factor in zip(weights, updates, factors, strict=True):
        if weight.dtype.itemsize < 4:
            _add_and_round(weight, update, -lr * factor, kept, cautious)
        else:
            by_factor[factor].append((weight, update))
    if kept is not None and by_factor:
        every = [weight for pairs in by_factor.values() for weight, _ in pairs]
        torch._foreach_mul_(every, _like(kept, every))
    for factor, pairs in by_factor.items():
        wide, theirs = zip(*pairs, strict=True)
        if cautious is not None:
            _take_from_smaller(wide, theirs, cautious)
        add_(wide, theirs, -lr * factor)


def _take_from_smaller(weights: _Tensors, updates: _Tensors, cautious: Rate) -> None:
    """``weights -= cautious weights`` where the update has their sign, so that it makes them smaller."""
    for some, theirs in _pieces(weights, updates):
        smaller = [torch.empty_like(weight) for weight in some]
        torch._foreach_copy_(smaller, theirs)
        torch._foreach_mul_(smaller, some)
        torch._foreach_sign_(smaller)  # a comparison would be a kernel for each
        torch._foreach_clamp_min_(smaller, 0.0)
        torch._foreach_mul_(smaller, some)
        add_(some, smaller, -cautious)


def add_(weights: _Tensors, updates: _Tensors, rate: Rate) -> None:
    """``weights += rate updates``, in place; the product is in the weights' dtype, whatever that of the updates is."""
    if not isinstance(rate, torch.Tensor) and not _are_many(weights, updates):
        torch._foreach_add_(weights, updates, alpha=rate)
        return
    for some, theirs in _pieces(weights, updates):
        products = [torch.empty_like(weight) for weight in some]
        torch._foreach_copy_(products, theirs)
        if isinstance(rate, torch.Tensor):
            torch._foreach_mul_(products, _like(rate, some))
        torch._foreach_add_(some, products, alpha=1.0 if isinstance(rate, torch.Tensor) else rate)


def _are_many(weights: _Tensors, updates: _Tensors) -> bool:
    """Whether converting updates first is faster: a kernel for each weight would take longer than what it does."""
    is_other = weights[0].is_cuda and weights[0].dtype != updates[0].dtype
    return is_other and sum(weight.numel() for weight in weights) < len(weights) * _SMALL


def _pieces(*tensors: _Tensors) -> Iterator[list[_Tensors]]:
    """Cut lists of tensors of the same shapes where copies of what is worked on at once would take much memory."""
    start = total = 0
    for index, tensor in enumerate(tensors[0]):
        if index > start and total + tensor.numel() > _COPIED:
            yield [some[start:index] for some in tensors]
            start, total = index, 0
        total += tensor.numel()
    if tensors[0]:
        yield [some[start:] for some in tensors]


def _like(rate: Rate, tensors: _Tensors) -> Rate:
    """A rate as a tensor in the dtype of those that it multiplies: of another, each would be multiplied by itself."""
    return rate.to(tensors[0].dtype) if isinstance(rate, torch.Tensor) else rate


def _add_and_round(
    weight: torch.Tensor, update: torch.Tensor, rate: Rate, kept: Rate | None, cautious: Rate | None
) -> None:
    """Add in the memory of the update, if that has more bits: copies of a table, which is one weight, are large."""
    smaller = None if cautious is None else weight * (weight * update > 0)
    total = update.mul_(rate) if update.dtype.itemsize >= 4 else update.float().mul_(rate)
    if smaller is not None and cautious is not None:
        add_([total], [smaller.float()], -cautious)
    if isinstance(kept, torch.Tensor):
        total.add_(weight.float() * kept)
    else:
        total.add_(weight, alpha=1.0 if kept is None else kept)
    weight.copy_(total)


def prepare(
    device: torch.device,
    dtype: torch.dtype,
    slots: Iterable[torch.dtype],
    updates: Iterable[torch.dtype],
    shapes: Iterable[tuple[int, ...]],
) -> str:
    """Compile the kernels for a device and the types of a run, and find out whether they are to be used.

    Waits for the device: for set-up, not for a step.

    Args:
        device: of everything.
        dtype: of weights, momentum and gradients.
        slots: dtypes of batches.
        updates: dtypes of updates.
        shapes: of the weights; the trial by time is of those that have most elements.

    Returns:
        One line for the report; empty where there is no choice: on CPUs.
    """
    if device.type != "cuda":
        return ""
    device = torch.empty(0, device=device).device  # with its number
    try:
        reason = _kernels().obstacle(device, dtype)
    except ImportError as error:
        reason = f"is not there ({error})"
    if reason is not None:
        return f"elementwise passes by torch: Triton {reason}"
    shape, count = max(Counter(shapes).items(), key=lambda each: each[1] * math.prod(each[0]), default=((1,), 1))
    trial = min(count, max(1, _TRIAL // max(1, math.prod(shape)))), *shape
    found = [_tried("pack", device, (dtype, dtype, slot), trial) for slot in dict.fromkeys(slots)]
    found += [_tried("add", device, (dtype, update), trial) for update in dict.fromkeys(updates)]
    return f"elementwise passes: {'; '.join(found)}"


_PASSES: dict[str, tuple[Callable[..., None], tuple[int, ...], list[tuple[Any, ...]]]] = {
    "pack": (pack, (0, 2), [(momentum, nesterov) for momentum in (0.95, None) for nesterov in (0.95, 1.0)]),
    "add": (add, (0,), [((0.2, 0.7), 0.02, 0.998), ((0.2, 0.7), 0.02, None)]),
}
"""For each pass torch's form, which of its tensors it writes, and numbers to try it with."""


@cache
def _tried(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> str:
    """Compare the kernel with torch, by bits and by time, and use it if it is as good and faster; in words."""
    (by_torch, written, numbers), by_triton = _PASSES[name], getattr(_kernels(), name)
    what = f"{name} {' and '.join(dict.fromkeys(str(dtype).removeprefix('torch.') for dtype in dtypes))} by"
    _taken.discard((device, name, dtypes))  # torch's form is what follows
    try:
        for each in numbers:
            for own, torchs in zip(_samples(device, dtypes), _samples(device, dtypes), strict=True):
                by_triton(*own, *each)
                by_torch(*torchs, *each)
                pairs = (pair for index in written for pair in zip(own[index], torchs[index], strict=True))
                if not all(torch.equal(*pair) for pair in pairs):
                    return f"{what} torch (Triton's bits differ)"
        batch = [list(torch.ones(shape, dtype=dtype, device=device)) for dtype in dtypes]
        each = numbers[0] if name == "pack" else ((1.0,) * shape[0], *numbers[0][1:])
        own_s, torch_s = (seconds(partial(work, *batch, *each), device) for work in (by_triton, by_torch))
    except Exception as error:
        return f"{what} torch (Triton fails: {str(error).strip().partition('\n')[0]})"
    if own_s < torch_s:
        _taken.add((device, name, dtypes))
    times = f"Triton {1e3 * own_s:.3g} ms, torch {1e3 * torch_s:.3g} ms for {' x '.join(map(str, shape))}"
    return f"{what} {'Triton' if own_s < torch_s else 'torch'} ({times})"


def _samples(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[list[list[torch.Tensor]]]:
    """Two tensors of each dtype: aligned; from an odd address on; and with rows that lie apart. The same each time.

    None ends where a block of the kernels does.
    """
    generator = torch.Generator().manual_seed(0)

    def random(dtype: torch.dtype, matrices: int) -> torch.Tensor:
        values = torch.randn(matrices, 8, 1040, generator=generator)
        magnitudes = torch.empty_like(values).uniform_(-42.0, 3.0, generator=generator)  # the smallest numbers, too
        return (values * 10.0**magnitudes).to(device, dtype)

    cuts: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda x: x, lambda x: x.view(-1)[1:], lambda x: x[:, 1:, 1:]]
    for cut in cuts:
        yield [[cut(random(dtype, matrices)) for matrices in (3, 1)] for dtype in dtypes]


def _is_taken(name: str, *tensors: _Tensors) -> bool:
    """Whether a pass over some tensors is the kernel's."""
    if not _taken or not tensors[0] or is_capturing(tensors[0][0].device):
        return False  # the kernel's tables are copied from the host, where a replay would find something else
    dtypes = tuple(some[0].dtype for some in tensors)
    is_uniform = all(tensor.dtype == dtype for some, dtype in zip(tensors, dtypes, strict=True) for tensor in some)
    return is_uniform and (tensors[0][0].device, name, dtypes) in _taken


@cache
def _kernels() -> Any:
    return import_module("megatron_muon.orthogonalize.kernels.triton_elementwise")

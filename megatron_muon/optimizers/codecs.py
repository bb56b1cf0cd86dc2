"""Whether Triton kernels read and keep the numbers of a form, on a GPU where they give torch's bits, and faster."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from importlib import import_module

import torch

from megatron_muon.optimizers.forms import INT8, KERNELS, REMAINDERS, Form
from megatron_muon.optimizers.storage import Kept, init_momentum, init_remainder, master_of, momentum_of
from megatron_muon.orthogonalize.kernels.gate import seconds

_FORMS: dict[str, Form] = {form.name: form for form in (REMAINDERS, INT8)}


def prepare(device: torch.device, forms: Iterable[str]) -> str:
    """Compile the kernels for a device, and find out whether they are to be used.

    Waits for the device: for set-up, not for a step.

    Args:
        device: of weights and state.
        forms: names of the forms in which a run keeps its numbers.

    Returns:
        One line for the report; empty where there is no choice: on CPUs, and of forms without kernels.
    """
    if device.type != "cuda":
        return ""
    device = torch.empty(0, device=device).device  # with its number
    return "; ".join(_tried(name, device) for name in dict.fromkeys(forms) if name in _FORMS)


@cache
def _tried(name: str, device: torch.device) -> str:
    """Compare kernels with torch, by bits and by time, and use them if they are as good and faster; in words."""
    form = _FORMS[name]
    KERNELS.pop((name, device), None)  # torch's passes are what follows
    try:
        kernels = import_module("megatron_muon.orthogonalize.kernels.triton_codecs")
        if (reason := kernels.obstacle(device)) is not None:
            return f"{name} by torch: Triton {reason}"
        numbers = _numbers(device)
        theirs, own = ([_kept(form, rows).planes for rows in numbers] for _ in range(2))
        form.encode_all(numbers, theirs)
        if not kernels.keep(name, own, numbers):
            return f"{name} by torch (Triton takes other layouts)"
        pairs = [pair for planes in zip(own, theirs, strict=True) for pair in zip(*planes, strict=True)]
        pairs += zip(kernels.read(name, theirs), form.decode_all(theirs), strict=True)
        if not all(torch.equal(*pair) for pair in pairs):
            return f"{name} by torch (Triton's bits differ)"
        own_s, torch_s = (
            seconds(partial(read, *given), device) + seconds(partial(keep, *rest), device)
            for read, given, keep, rest in (
                (kernels.read, (name, own), kernels.keep, (name, own, numbers)),
                (form.decode_all, (own,), form.encode_all, (numbers, own)),
            )
        )
    except Exception as error:
        return f"{name} by torch (Triton fails: {str(error).strip().partition(chr(10))[0]})"
    if own_s < torch_s:
        KERNELS[name, device] = kernels
    times = f"Triton {1e3 * own_s:.3g} ms, torch {1e3 * torch_s:.3g} ms"
    return f"{name} by {'Triton' if own_s < torch_s else 'torch'} ({times})"


def _kept(form: Form, rows: torch.Tensor) -> Kept:
    """Numbers of the shape of some rows: other rows lie between those of one of them."""
    wide = torch.zeros((*rows.shape[:-2], rows.size(-2) + 3, rows.size(-1)), device=rows.device)
    state: dict[str, torch.Tensor] = {}
    if form is REMAINDERS:
        weight = wide.bfloat16()
        init_remainder(weight, state)
        kept = master_of(weight, state)
    else:
        init_momentum(wide, state, form.name)
        kept = momentum_of(state)
    return Kept(form, tuple(plane[..., 2:-1, :] for plane in kept.planes))


def _numbers(device: torch.device) -> list[torch.Tensor]:
    """Numbers of all exponents, many half way between two bfloat16 ones; of several shapes. The same each time."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in ((5, 768), (3, 8, 1024), (300, 256), (1, 2048)):
        bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int()
        bits[..., ::5] &= -(1 << 15)
        rows = bits.view(torch.float32)
        found.append(torch.where(rows.isfinite(), rows, 0.5).to(device))
    return found

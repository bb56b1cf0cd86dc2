"""A step of every optimizer, variant and mode at TP 1, against the same in float64 on the CPU.

The second of two steps must not make the host wait for the device; all of it, done twice, must give the same bits.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from megatron_muon import Muon
from megatron_muon.choices import BALLS, SCALE_MODES, SECOND_MOMENTS, STIEFEL_SOLVERS, WEIGHT_DECAY_METHODS
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, MSIGN, SCALAR, STIEFEL, WHOLE, MatrixLayout, Section
from tools.gpu_check.clock import device_of
from tools.gpu_check.report import Item, Report, Setting, only_on_gpus

Shapes = Sequence[tuple[tuple[int, ...], MatrixLayout]]

BOUNDS = {"fp32": 2e-4, "fp16": 1e-2, "bf16": 6e-2}
"""Relative error of the sum of two updates, in the Frobenius norm of all weights: those of ``tools.bench``, and twice
that of float32 for two steps."""

LR = 0.02

_WAITS = "called a synchronizing CUDA operation"
"""In what torch says in the debug mode."""


def shapes(small: bool, qkv: bool = True) -> Shapes:
    """Weights of all kinds: whole, fused, in stacks, with rows of the scalar optimizer."""
    unit = 8 if small else 64
    attention = MatrixLayout("qkv", (Section("q", 2 * unit), Section("k", unit), Section("v", unit)))
    heads = MatrixLayout("qkv", tuple(dataclasses.replace(section, matrix_rows=unit) for section in attention.sections))
    gated = MatrixLayout("glu", (Section("gate", 5 * unit), Section("up", 5 * unit)))
    mixed = MatrixLayout("gdn", (Section("q", 4 * unit), Section("beta", 2, SCALAR)))
    plain: Shapes = [((4 * unit, 7 * unit), WHOLE), ((7 * unit, 4 * unit), WHOLE), ((5 * unit, 5 * unit + 1), WHOLE)]
    if not qkv:
        return plain
    return [
        *plain,
        ((12 * unit, 4 * unit), attention),
        ((8 * unit, 4 * unit), heads),
        ((10 * unit, 4 * unit), gated),
        ((3, 10 * unit, 2 * unit), gated.stack()),
        ((4 * unit + 2, 3 * unit), mixed),
    ]


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> direction of the weights, and options of :class:`Muon`."""
    plain: dict[str, dict[str, Any]] = {
        **{f"scale {mode}": {"scale_mode": mode} for mode in SCALE_MODES},
        **{f"decay {method}": {"weight_decay_method": method} for method in WEIGHT_DECAY_METHODS},
        **{method: {"variant": method} for method in SECOND_MOMENTS},
        "nesterov": {"nesterov": True},
        "polargrad": {"variant": "polargrad", "scale_mode": "none"},
        "hyperball": {"variant": "hyperball", "scale_mode": "none"},
        "spectral sphere": {"variant": "spectral_sphere"},
        "damped": {"scale_mode": "spectral_norm", "damping_depth": 2.0},
        "lion rows": {"scalar_optimizer": "lion"},
        "small chunks": {"chunk_mb": 0.05},
        "polar express": {"coefficient_type": "polar_express"},
        "8 steps": {"num_ns_steps": 8},
        "cubic5": {"coefficient_type": "cubic5"},
        "turbo": {"coefficient_type": "turbo_muon", "num_ns_steps": 4},
    }
    plain["scale moonlight_hidden"]["hidden_size"] = 256
    found = {name: (MSIGN, options) for name, options in plain.items()}
    found |= {f"ball {direction}": (direction, {}) for direction in BALLS}
    found |= {f"stiefel {solver}": (STIEFEL, {"variant": StiefelMuon(solver, 2)}) for solver in STIEFEL_SOLVERS}
    return found


NUMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {"fp32_matmul_prec": "highest", "ns_dtype": "fp32"}),
    "bf16": ("bf16", {"fp32_matmul_prec": "medium", "ns_dtype": "bf16"}),
    "fp16": ("fp16", {"fp32_matmul_prec": "medium", "ns_dtype": "fp16"}),
    "tf32": ("bf16", {"fp32_matmul_prec": "high", "ns_dtype": "fp32"}),
}
"""Name -> key of :data:`BOUNDS`, options."""

BACKENDS = ("torch", "triton", "emerging", "gram_newton_schulz")


def items(setting: Setting) -> list[Item]:
    """See :mod:`tools.gpu_check.parts`."""
    made = cases()
    found = [_item(name, setting, direction, options, "fp32") for name, (direction, options) in made.items()]
    narrow = [(kind, name) for kind in ("bf16", "fp16", "tf32") for name in ("nesterov", "normuon", "turbo")]
    found += [_item(f"{name}, {kind}", setting, MSIGN, made[name][1], kind) for kind, name in narrow]
    named = [(backend, kind) for backend in BACKENDS for kind in ("bf16", "fp16") if setting.is_gpu]
    found += [_item(f"backend {each}, {kind}", setting, MSIGN, {"ns_backend": each}, kind) for each, kind in named]
    found.append(Item("waiting would be seen", partial(_seen, setting)))
    found.append(Item("learning rate in a tensor", partial(_tensor_rate, setting)))
    found.append(Item("weights in bf16", partial(_narrow, setting)))
    return found


def _item(name: str, setting: Setting, direction: str, options: dict[str, Any], kind: str) -> Item:
    bound, numbers = NUMBERS[kind]

    def run(report: Report) -> None:
        if backend := options.get("ns_backend"):
            from tools.gpu_check.parts.kernels import DTYPES, products_of

            products_of(backend, DTYPES[kind], device_of(setting.device))  # says why it cannot be
        given = shapes(
            not setting.is_gpu, direction == MSIGN and not str(options.get("variant", "")).startswith("hyper")
        )
        _compare(report, setting, given, direction, {**options, **numbers}, BOUNDS[bound])

    return Item(name, run)


def _compare(
    report: Report,
    setting: Setting,
    given: Shapes,
    direction: str,
    options: dict[str, Any],
    bound: float,
    wrap: Callable[[float, torch.device], Any] = lambda lr, device: lr,
) -> None:
    """Two steps here, twice, and in float64 on the CPU."""
    device = device_of(setting.device)
    exact = {k: v for k, v in options.items() if k not in ("ns_dtype", "ns_backend", "fp32_matmul_prec")}
    cpu = torch.device("cpu")
    expected = _two_steps(report, given, direction, {**exact, "fp32_matmul_prec": "highest"}, cpu, torch.float64, wrap)
    found = [_two_steps(report, given, direction, options, device, torch.float32, wrap) for _ in range(2)]
    start = [weight.double() for weight in _weights(given)]
    moved = sum(float((e - s).square().sum()) for e, s in zip(expected, start, strict=True)) ** 0.5
    off = sum(float((f.double() - e).square().sum()) for f, e in zip(found[0], expected, strict=True)) ** 0.5
    report.at_most("error of two updates", off / moved if moved else float("nan"), bound)
    report.check("the same bits again", all(torch.equal(a, b) for a, b in zip(*found, strict=True)))


def _weights(given: Shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) * 0.1 for shape, _ in given]


def _gradients(given: Shapes, step: int) -> list[torch.Tensor]:
    """float32 on the CPU, with rows of unlike sizes."""
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(shape, generator=generator) * torch.linspace(0.5, 2.0, shape[-2])[:, None] for shape, _ in given
    ]


def parameters(given: Shapes, direction: str, device: torch.device, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The same weights each time, without gradients."""
    params: list[torch.nn.Parameter] = []
    weights = _weights(given)
    if direction == STIEFEL:
        weights = [_orthonormal(weight) for weight in weights]
    for weight, (_, layout) in zip(weights, given, strict=True):
        params.append(torch.nn.Parameter(weight.to(device, dtype)))
        setattr(params[-1], LAYOUT_ATTRIBUTE, dataclasses.replace(layout, direction=direction))
    return params


def _two_steps(
    report: Report,
    given: Shapes,
    direction: str,
    options: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    wrap: Callable[[float, torch.device], Any],
) -> list[torch.Tensor]:
    """The weights after two steps, on the CPU."""
    params = parameters(given, direction, device, dtype)
    options = {"nesterov": False, **options}
    optimizer = Muon(params, lr=wrap(LR, device), momentum=0.9, weight_decay=0.1, **options)
    for step in range(2):
        for param, grad in zip(params, _gradients(given, step), strict=True):
            param.grad = grad.to(device, dtype)
        if device.type == "cuda" and step:
            _without_waiting(report, optimizer)
        else:
            optimizer.step()
    return [param.detach().cpu() for param in params]


def _without_waiting(report: Report, optimizer: Muon) -> None:
    """A step in which torch refuses to let the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        if _WAITS not in str(error):
            raise
        where = [line.strip() for line in traceback.format_exc().splitlines() if "megatron_muon" in line]
        report.check("the host waits for nothing", False, " < ".join(reversed(where))[:800])
    else:
        report.check("the host waits for nothing", True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _seen(setting: Setting, report: Report) -> None:
    """The checks of waiting, of which the others have one each, can fail."""
    only_on_gpus(setting)
    x = torch.ones(2, device=device_of(setting.device))
    reads: dict[str, Callable[[], object]] = {
        "item": x[0].item,
        "tolist": x.tolist,
        "nonzero": x.nonzero,
        "cpu": x.cpu,
    }
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, read in reads.items():
            try:
                read()
            except RuntimeError as error:
                report.check(f"{name} is refused", _WAITS in str(error), str(error))
            else:
                report.check(f"{name} is refused", False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _orthonormal(weight: torch.Tensor) -> torch.Tensor:
    """A point on the manifold near a matrix."""
    u, _, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u @ v).float()


def _tensor_rate(setting: Setting, report: Report) -> None:
    """Not read by the host."""

    def wrap(lr: float, device: torch.device) -> torch.Tensor:
        return torch.tensor(lr, device=device)

    options = {**NUMBERS["fp32"][1], "nesterov": True}
    _compare(report, setting, shapes(not setting.is_gpu), MSIGN, options, BOUNDS["fp32"], wrap)


def _narrow(setting: Setting, report: Report) -> None:
    """Weights of 16 bits are rounded once: the error is at most that of rounding each of two updates."""
    device = device_of(setting.device)
    given = shapes(not setting.is_gpu)
    options = {**NUMBERS["bf16"][1], "nesterov": True}
    keep: Callable[[float, torch.device], Any] = lambda lr, device: lr  # noqa: E731
    exact = {"fp32_matmul_prec": "highest", "nesterov": True}
    expected = _two_steps(report, given, MSIGN, exact, torch.device("cpu"), torch.float64, keep)
    found = [_two_steps(report, given, MSIGN, options, device, torch.bfloat16, keep) for _ in range(2)]
    off = max(float((f.double() - e).abs().max() / e.abs().max()) for f, e in zip(found[0], expected, strict=True))
    report.at_most("largest error, as a share of the largest weight", off, 0.05)
    report.check("the same bits again", all(torch.equal(a, b) for a, b in zip(*found, strict=True)))

"""Rates of the machine: copies, products of each dtype, launches."""

from __future__ import annotations

from functools import partial

import torch

from tools.gpu_check.clock import copies, device_of, random, timed
from tools.gpu_check.report import Item, Report, Setting, only_on_gpus


def items(setting: Setting) -> list[Item]:
    """See :mod:`tools.gpu_check.parts`."""
    return [
        Item("device", lambda report: _device(setting, report)),
        Item("copy", lambda report: _copy(setting, report)),
        Item("products", lambda report: _products(setting, report)),
        Item("launches", lambda report: _launches(setting, report)),
    ]


def _device(setting: Setting, report: Report) -> None:
    if not setting.is_gpu:
        report.row("device", name="cpu", threads=torch.get_num_threads())
        return
    report.check(
        "torch finds a GPU", torch.cuda.is_available(), f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    )
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        report.row(
            "device",
            name=found.name,
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            gib=round(found.total_memory / 2**30, 1),
            l2_mib=getattr(found, "L2_cache_size", 0) >> 20,
            cuda=str(torch.version.cuda),
        )


def copy_rate(device: torch.device, elements: int) -> float:
    """Bytes a second that a copy on a device reads and writes."""
    x = random((elements,), device)
    targets = [torch.full_like(x, float("nan")) for _ in range(2)]
    found = timed([partial(y.copy_, x) for y in targets], device)
    assert all(bool(torch.equal(x, y)) for y in targets), "a copy differs"
    return 8 * elements / found.device


def _copy(setting: Setting, report: Report) -> None:
    device = device_of(setting.device)
    elements = 1 << (29 if setting.is_gpu else 20)
    rate = copy_rate(device, elements)
    report.row("copy", gib=4 * elements / 2**30, gb_s=rate / 1e9)
    report.check("a copy is as its source", True)


def product_rate(device: torch.device, size: int, dtype: torch.dtype, precision: str = "highest") -> float:
    """Operations a second of square products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        sets = copies(3 * size * size * dtype.itemsize, device)
        pairs = [[random((size, size), device, dtype, 2 * each + i) for i in range(2)] for each in range(sets)]
        outs = [torch.full_like(a, float("nan")) for a, _ in pairs]
        works = [partial(torch.mm, a, b, out=out) for (a, b), out in zip(pairs, outs, strict=True)]
        found = timed(works, device, rounds=10)
        assert all(bool(torch.isfinite(out).all()) for out in outs), "a product is not finite"
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / found.device


KINDS = (
    ("bf16", torch.bfloat16, "highest"),
    ("fp16", torch.float16, "highest"),
    ("tf32", torch.float32, "high"),
    ("fp32", torch.float32, "highest"),
    ("fp64", torch.float64, "highest"),
)


def _products(setting: Setting, report: Report) -> None:
    device = device_of(setting.device)
    for size in (2048, 4096, 8192) if setting.is_gpu else (128,):
        found = {name: product_rate(device, size, dtype, how) / 1e12 for name, dtype, how in KINDS}
        report.row("products, Tflop/s", rows=size, **found)


def _launches(setting: Setting, report: Report) -> None:
    """What a small kernel takes the device and the host."""
    only_on_gpus(setting)
    device = device_of(setting.device)
    x = random((256,), device)

    def many() -> None:
        for _ in range(1000):
            x.mul_(1.0)

    found = timed([many], device, rounds=10)
    report.row("launches", device_us=found.device * 1e3, host_us=found.host * 1e3)
    report.check("launches were timed", found.device > 0)

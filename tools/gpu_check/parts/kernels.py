"""Every implementation of the products against float64, and what it takes; ``tests/gpu`` has the same cases."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from megatron_muon.errors import sizes
from megatron_muon.orthogonalize import iteration
from megatron_muon.orthogonalize.backends import _CPU_BLOCK_ROWS, _KERNELS, candidates, choose_products, report
from megatron_muon.orthogonalize.gram import gram_iteration, prescale
from megatron_muon.orthogonalize.kernels import elementwise
from megatron_muon.orthogonalize.kernels.gate import Size, Trial, examine
from megatron_muon.orthogonalize.newton_schulz import standard_iteration
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts
from tools.gpu_check.clock import copies, device_of, random, timed
from tools.gpu_check.parts.rates import copy_rate, product_rate
from tools.gpu_check.report import Item, NotRunError, Report, Setting

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

SIZES = (
    Size(1, 256, 256),
    Size(1, 1024, 4096),
    Size(1, 1024, 4096, tall=True),
    Size(8, 512, 1408),
    Size(2, 2048, 5632),
    Size(64, 128, 768),  # a head each: fewer rows than any kernel takes
    Size(5, 1000, 1001),
    Size(5, 1001, 1000),
    Size(3, 2040, 2056, tall=True),
    Size(1, 300, 70),
)
SMALL = (Size(2, 264, 296, tall=True), Size(3, 130, 131))
"""For CPUs."""

ITERATED = ((2, 512, 1408), (1, 1024, 1024), (3, 301, 515))
RAGGED = ((2, 130, 190),)

TIMED = ((1, 1024, 4096), (1, 2048, 2048), (1, 4096, 4096), (1, 8192, 8192), (8, 2048, 768), (32, 768, 2048))
"""(matrices, rows, columns) whose Gram matrices are timed."""


def items(setting: Setting) -> list[Item]:
    """See :mod:`tools.gpu_check.parts`."""
    device = device_of(setting.device)
    found = []
    for backend in _KERNELS if setting.is_gpu else ("torch",):
        for name, dtype in DTYPES.items():
            found.append(Item(f"{backend} {name}", _case(products, backend, dtype, device)))
    for name, dtype in DTYPES.items():
        found.append(Item(f"auto {name}", _case(auto, dtype, device)))
    for name, dtype in DTYPES.items():
        found.append(Item(f"tiles {name}", _case(tiles, dtype, device)))
    found.append(Item("tuning", _case(tuning, torch.bfloat16, device)))
    found += [Item(f"offsets of {which}", _case(offsets, which, device)) for which in OFFSETS]
    found += [Item(f"elementwise {name}", _case(passes, DTYPES[name], device)) for name in ("fp32", "bf16")]
    found.append(Item("other forms", _case(other_forms, device)))
    found.append(Item("elementwise rate", _case(elementwise_rate, device)))
    found += [Item(f"rates {name}", _case(rates, name, device)) for name in ("fp16", "bf16")]
    return found


def _case(work: Callable[..., None], *arguments: Any) -> Callable[[Report], None]:
    def run(report: Report) -> None:
        if arguments[-1].type == "cpu" and work not in (products, auto):
            raise NotRunError("it needs a GPU")
        with precision("high"):
            work(*arguments, report)

    return run


@contextmanager
def precision(name: str) -> Iterator[None]:
    """torch's float32 products for the time being."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def products_of(backend: str, dtype: torch.dtype, device: torch.device) -> TorchProducts:
    """The implementation, not yet checked.

    Raises:
        NotRunError: where it cannot run.
    """
    if backend == "torch":
        return BlockProducts(_CPU_BLOCK_ROWS[dtype]) if device.type == "cpu" else TorchProducts()
    module_name, class_name = _KERNELS[backend]
    try:
        module = import_module(f"megatron_muon.orthogonalize.kernels.{module_name}")
    except ImportError as error:
        raise NotRunError(f"{backend} is not installed: {error}") from None
    reason = module.obstacle(device, dtype)
    if reason is not None:
        raise NotRunError(f"{backend} {reason}")
    return getattr(module, class_name)()


def products(backend: str, dtype: torch.dtype, device: torch.device, found: Report) -> None:
    """The gate at many sizes, the choice by name, and whole iterations."""
    own = products_of(backend, dtype, device)
    verdict = examine(own, device, dtype, SMALL if device.type == "cpu" else SIZES)
    found.check("products of many sizes", verdict.failure is None, str(verdict))
    if backend != "torch":
        for float32 in ("highest", "high"):
            with precision(float32):
                begin = time.perf_counter()
                chosen, line = choose_products(backend, device, dtype)
                seconds = time.perf_counter() - begin
                found.row("check at set-up", backend=backend, dtype=_name(dtype), float32=float32, s=seconds)
                passed = type(chosen) is type(own) and "9 products checked" in line and str(device) in line
                found.check(f"chosen by name, float32 {float32}", passed, line)
    every = itertools.product(RAGGED if device.type == "cpu" else ITERATED, (False, True), ("quintic", "cubic5"))
    for shape, gram, name in every:
        # Gram Newton-Schulz is refused in bfloat16, standard Newton-Schulz in float16.
        if dtype != (torch.bfloat16 if gram else torch.float16):
            errors = iteration_errors(own, name, shape, gram, dtype, device)
            form = f"{'Gram' if gram else 'standard'} {name} of {sizes(shape)}"
            found.at_most(f"{form}, as a multiple of torch's error", errors[1] / errors[0], 2.0)


def iteration_errors(
    own: TorchProducts, name: str, shape: tuple[int, ...], gram: bool, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """Relative errors of an iteration by torch and by ``own``, against float64."""
    steps = iteration(name, 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    exact = standard_iteration(x, steps)
    scale = prescale(dtype, shape[1]) if gram else 1.0
    errors = []
    for products in (TorchProducts(), own):
        y = (x * scale).to(dtype)
        y = gram_iteration(y, steps, (2,), products, scale) if gram else standard_iteration(y, steps, products)
        errors.append(float((y.double() - exact).norm() / exact.norm()))
    return errors


def auto(dtype: torch.dtype, device: torch.device, found: Report) -> None:
    """``auto`` takes the fastest of those that pass, and says what it found."""
    shape = (4, 130, 260) if device.type == "cpu" else (4, 1024, 2048)
    trial = Trial(shape, lambda products, x: products.quadratic(products.gram(x), 2.0, 3.0))
    begin = time.perf_counter()
    each = candidates("auto", device, dtype, trial)
    seconds = time.perf_counter() - begin
    line = report(each[0], each, device, dtype, trial)
    found.row("choice at set-up", dtype=_name(dtype), chosen=each[0].backend, s=seconds, found=line)
    found.check("the fastest first", [c.seconds for c in each] == sorted(c.seconds for c in each), line)
    if device.type == "cuda":
        found.check("all are looked at", {c.backend for c in each} == {"torch", *_KERNELS}, line)
        usable = [c for c in each if c.products is not None]
        found.check("all that can be used are timed", all(c.seconds > 0 for c in usable) or len(usable) == 1, line)


def tiles(dtype: torch.dtype, device: torch.device, found: Report) -> None:
    """All tiles give the same bits: ranks that hold the same weight tune apart; what they choose must not show."""
    products_of("triton", dtype, device)
    from megatron_muon.orthogonalize.kernels.triton_symmetric import TILES, UNALIGNED, symmetric_product

    all_tiles = (*TILES, UNALIGNED)
    for shape in ((2, 704, 912), (2, 700, 901)):  # read 16 bytes at a time, and element by element
        x = random(shape, device, dtype)
        r = TorchProducts().gram(x)
        r = r.tril() + r.tril(-1).mT
        for operands in ((x, x.mT, None), (x.mT.contiguous().mT, x.mT, None), (r, r.mT, r)):
            results = [symmetric_product(*operands, alpha=0.7, beta=-1.3, tile=tile) for tile in all_tiles]
            same = [torch.equal(results[0], result) for result in results[1:]]
            what = f"{sizes(operands[0].shape)}{', with a summand' if operands[2] is not None else ''}"
            found.check(f"bits of {len(all_tiles)} tiles, {what}", all(same), f"equal to the first: {same}")
            found.check(f"symmetric bits, {what}", torch.equal(results[0], results[0].mT))
            own = symmetric_product(*operands, alpha=0.7, beta=-1.3)
            found.check(f"bits of the tile that is chosen, {what}", torch.equal(own, results[0]))


def tuning(dtype: torch.dtype, device: torch.device, found: Report) -> None:
    """Tiles are tried in bounded time, and found on disk by a process that starts later."""
    products_of("triton", dtype, device)
    from megatron_muon.orthogonalize.kernels import triton_tuning
    from megatron_muon.orthogonalize.kernels.triton_symmetric import symmetric_product

    x = random((1, 2048, 4096), device, dtype)
    known, before = dict(triton_tuning._known), os.environ.get("TRITON_CACHE_DIR")

    def seconds() -> float:
        triton_tuning._known.clear()
        begin = time.perf_counter()
        symmetric_product(x, x.mT)
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            compiled_s = seconds()  # compiles, too
            files = list(Path(folder).glob("*/tile.json"))
            found.check("one file", len(files) == 1, f"{len(files)} files")
            for file in files:
                file.unlink()
            tried_s, read_s = seconds(), seconds()
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before
            triton_tuning._known.update(known)
    found.row("tuning", dtype=_name(dtype), compiled_s=compiled_s, tried_s=tried_s, read_s=read_s)
    found.at_most("seconds of trials, once compiled", tried_s, 1.0)
    found.at_most("seconds where the choice is read", read_s, tried_s / 2)


OFFSETS = {"operands": (9, 256, 2**20), "result": (1, 47_000, 64)}
"""Shapes of more than 2^31 elements."""


def offsets(which: str, device: torch.device, found: Report) -> None:
    """Products of matrices beyond 2^31 elements."""
    batch, p, k = shape = OFFSETS[which]
    products_of("triton", torch.float16, device)
    from megatron_muon.orthogonalize.kernels.triton_symmetric import symmetric_product

    needed = 2 * (2 * batch * p * k + 2 * batch * p * p)
    if torch.cuda.mem_get_info()[0] < needed:
        raise NotRunError(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    # Small whole numbers in few places: every sum is exact in float16.
    x = torch.zeros(shape, dtype=torch.float16, device=device)
    x[..., :16] = torch.randint(-2, 3, (batch, p, 16), device=device).half()
    x[..., -16:] = torch.randint(-2, 3, (batch, p, 16), device=device).half()
    result = symmetric_product(x, x.mT)
    for rows in (slice(0, 128), slice(p - 128, p)):
        for index in (0, batch - 1):
            ends = torch.cat([x[index, :, :16], x[index, :, -16:]], dim=1).float()
            expected = ends[rows] @ ends.mT
            where = f"rows {rows.start} to {rows.stop} of matrix {index}"
            found.check(where, torch.equal(result[index, rows].float(), expected))
            found.check(f"columns, as {where}", torch.equal(result[index, :, rows].float(), expected.mT))


def passes(dtype: torch.dtype, device: torch.device, found: Report) -> None:
    """Elementwise kernels give torch's bits, and wait for nothing."""
    from megatron_muon.orthogonalize.kernels import triton_elementwise

    reason = triton_elementwise.obstacle(device, dtype)
    if reason is not None:
        raise NotRunError(f"Triton {reason}")
    begin = time.perf_counter()
    kinds = dict.fromkeys((dtype, torch.bfloat16))
    text = elementwise.prepare(device, dtype, kinds, kinds, [(768, 2048)] * 42)
    found.row("elementwise passes", dtype=_name(dtype), set_up_s=time.perf_counter() - begin, found=text)
    found.check("torch's bits", text.count(" ms for 42 x 768 x 2048)") == 2 * len(kinds), text)
    momenta, grads, slots = (list(random((8, 256, 512), device, dtype, seed)) for seed in range(3))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = triton_elementwise.pack(momenta, grads, slots, 0.95, 0.95)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found.check("pack waits for nothing", bool(taken))


def other_forms(device: torch.device, found: Report) -> None:
    """Kernels that read and keep masters as remainders, and int8 momentum, give torch's bits."""
    from megatron_muon.optimizers import codecs
    from megatron_muon.orthogonalize.kernels import triton_codecs

    reason = triton_codecs.obstacle(device)
    if reason is not None:
        raise NotRunError(f"Triton {reason}")
    for name in ("remainder", "int8"):
        text = codecs.prepare(device, (name,))
        found.row("other forms", found=text)
        found.check(f"torch's bits of {name}", text.endswith(" ms)"), text)


def elementwise_rate(device: torch.device, found: Report) -> None:
    """Bytes a second of packing and adding, by what a step uses, as a share of a copy's."""
    copied = copy_rate(device, 1 << 28)
    shape = (42, 768, 2048)
    elements, factors = math.prod(shape), [0.2] * shape[0]
    for slot in (torch.float32, torch.bfloat16):
        line = elementwise.prepare(device, torch.float32, (slot,), (slot,), [shape[1:]] * shape[0])
        found.check(f"prepared with {_name(slot)}", bool(line), line)
        packs, adds = [], []
        for number in range(copies(10 * elements, device)):
            own, grads, slots = (
                list(random(shape, device, kind, 3 * number + i))
                for i, kind in enumerate((torch.float32, torch.float32, slot))
            )
            packs.append(partial(elementwise.pack, own, grads, slots, 0.95, 0.95))
            adds.append(partial(elementwise.add, own, slots, factors, 0.02, 0.998))
        # Momentum read and written, gradient read, slot written; weight read and written, update read.
        for name, works, size in (("pack", packs, 12 + slot.itemsize), ("add", adds, 8 + slot.itemsize)):
            times = timed(works, device)
            rate, what = size * elements / times.device, f"{name} with {_name(slot)}"
            numbers = {"gb_s": rate / 1e9, "of_a_copy": rate / copied, "host_us": 1e6 * times.host}
            found.row("elementwise rates", what=what, **numbers)
            found.target("elementwise", rate / copied, what)


def rates(name: str, device: torch.device, found: Report) -> None:
    """Symmetric products, in operations that are needed, beside cuBLAS' square product of the same dtype."""
    dtype = DTYPES[name]
    cublas = product_rate(device, 8192, dtype)
    table = "rates of Gram products, Tflop/s needed"
    found.row(table, dtype=name, shape="cuBLAS, 8192 x 8192 x 8192", torch=cublas / 1e12)
    for count, p, q in TIMED:
        sets = copies(count * p * (p + q) * 2, device)
        inputs = [random((count, p, q), device, dtype, each) for each in range(sets)]
        columns: dict[str, float | str] = {}
        for backend in ("torch", *_KERNELS):
            try:
                own = products_of(backend, dtype, device)
            except NotRunError as error:
                found.left_out(backend, str(error))
                continue
            begin = time.perf_counter()
            own.gram(inputs[0])
            torch.cuda.synchronize()
            first = time.perf_counter() - begin
            times = timed([partial(own.gram, x) for x in inputs], device)
            columns[backend] = count * p * (p + 1) * q / times.device / 1e12
            columns[f"{backend} first, s"] = first
        found.row(table, dtype=name, shape=f"{count} x {p} x {q}", **columns)
        if "triton" in columns and count * p * p * q >= 4096**3:
            found.target("kernel rate", 1e12 * float(columns["triton"]) / cublas, f"{count} x {p} x {q} {name}, triton")


def _name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]

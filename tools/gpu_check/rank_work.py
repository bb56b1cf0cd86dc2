"""What ranks do that need no Megatron: collectives on tensors of the device, and steps of divided weights."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.exchange import Members
from megatron_muon.engine.modes import EXACT
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, WHOLE, MatrixLayout, Section

LR = 0.02

_MESSAGE_S = 20
"""After which a message that a backend cannot send is given up: long before its item is."""

UNIT = {"cuda": 64, "cpu": 8}


def _device(name: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def collectives(device: str) -> dict[str, str]:
    """Name of each collective that the package uses -> what is wrong with it; empty: nothing."""
    where, rank, ranks = _device(device), dist.get_rank(), dist.get_world_size()
    group, found = dist.group.WORLD, {}

    def of(number: int, size: int = 1000, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(size, generator=generator).to(where, dtype)

    def all_to_all() -> bool:
        # From rank a to rank b go 100 (a + 1) + 10 b elements, as bytes.
        sizes = [[100 * (a + 1) + 10 * b for b in range(ranks)] for a in range(ranks)]
        pieces = [[of(10 * a + b, sizes[a][b]) for b in range(ranks)] for a in range(ranks)]
        send = torch.cat(pieces[rank])
        received = torch.full((sum(sizes[a][rank] for a in range(ranks)),), float("nan"), device=where)
        work = dist.all_to_all_single(
            received.view(torch.uint8),
            send.view(torch.uint8),
            [4 * sizes[a][rank] for a in range(ranks)],
            [4 * size for size in sizes[rank]],
            group=group,
            async_op=True,
        )
        assert work is not None
        work.wait()
        return torch.equal(received, torch.cat([pieces[a][rank] for a in range(ranks)]))

    def all_gather() -> bool:
        received = torch.full((ranks, 1000), float("nan"), device=where)
        bytes_ = received.view(torch.uint8).view(-1), of(rank).view(torch.uint8)
        work = dist.all_gather_into_tensor(*bytes_, group=group, async_op=True)
        assert work is not None
        work.wait()
        return torch.equal(received, torch.stack([of(each) for each in range(ranks)]))

    def all_gather_list() -> bool:
        parts = [torch.full((1000,), float("nan"), device=where) for _ in range(ranks)]
        dist.all_gather(parts, of(rank), group=group)
        return all(torch.equal(part, of(each)) for each, part in enumerate(parts))

    def all_reduce(dtype: torch.dtype) -> bool:
        tensor = of(rank, dtype=dtype)
        work = dist.all_reduce(tensor, group=group, async_op=True)
        assert work is not None
        work.wait()
        expected = torch.stack([of(each, dtype=dtype).double() for each in range(ranks)]).sum(0)
        off, largest = (float(x.abs().max()) for x in (tensor.double() - expected, expected))
        return off <= 4 * torch.finfo(dtype).eps * largest

    def objects() -> bool:
        values: list[Any] = [None] * ranks
        dist.all_gather_object(values, {"rank": rank}, group=group)
        return values == [{"rank": each} for each in range(ranks)]

    works: dict[str, Callable[[], bool]] = {
        "all_to_all_single of bytes": all_to_all,
        "all_gather_into_tensor of bytes": all_gather,
        "all_gather": all_gather_list,
        "all_reduce of float32": functools.partial(all_reduce, torch.float32),
        "all_reduce of bfloat16": functools.partial(all_reduce, torch.bfloat16),
        "all_gather_object": objects,
    }
    for name, work in works.items():
        try:
            found[name] = "" if work() else "wrong values"
        except Exception as error:  # alike on all ranks
            found[name] = f"{type(error).__name__}: {error}"[:500]
    return found


def point_to_point(device: str) -> bool:
    """Messages of some ranks to each other, as the first ones of a group: whether their sum is right."""
    from megatron_muon.engine.exchange import Counters, Exchange

    where, rank, ranks = _device(device), dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(ranks)), timeout=timedelta(seconds=_MESSAGE_S))
    assert isinstance(group, dist.ProcessGroup)
    members = Members(Exchange(group, Counters()), list(range(ranks)))
    given = [torch.full((2, 3, 5), float(each + 1), device=where) for each in range(ranks)]
    return bool(torch.equal(members.sum(given[rank]), torch.stack(given).sum(0)))


Weights = list[tuple[tuple[int, int], MatrixLayout, int | None]]


def weights(unit: int, ranks: int) -> Weights:
    """Whole shape, layout and divided dimension of weights of all kinds."""
    attention = MatrixLayout("qkv", (Section("q", 2 * unit), Section("k", unit), Section("v", unit)))
    heads = MatrixLayout("qkv", tuple(dataclasses.replace(each, matrix_rows=unit) for each in attention.sections))
    gated = MatrixLayout("glu", (Section("gate", 5 * unit), Section("up", 5 * unit)))
    return [
        ((4 * unit, 8 * unit), WHOLE, 1),
        ((8 * unit, 4 * unit), WHOLE, 0),
        ((5 * unit, 5 * unit + 1), WHOLE, None),
        ((4 * unit * ranks, 4 * unit), attention, 0),
        ((8 * unit * ranks, 4 * unit), heads, 0),
        ((10 * unit * ranks, 4 * unit), gated, 0),
        ((4 * unit, 10 * unit), WHOLE, 1),
    ]


def modes(device: str, refuses_waits: bool) -> dict[str, dict[str, Any]]:
    """Three steps of divided weights, by mode and numbers: error, against float64 on the CPU in one piece; seconds of
    the last; what made the host wait in the second.

    Args:
        device: ``cpu`` or ``cuda``.
        refuses_waits: whether the host may not wait in the second.
    """
    # Gram mode is refused in bfloat16: not accurate.
    pairs = [(mode, kind) for kind in ("fp32", "bf16") for mode in EXACT if (mode, kind) != ("gram", "bf16")]
    return {f"{mode}, {kind}": _mode(device, mode, kind, refuses_waits) for mode, kind in pairs}


def _mode(device: str, tp_mode: str, kind: str, refuses_waits: bool) -> dict[str, Any]:
    where, rank, ranks = _device(device), dist.get_rank(), dist.get_world_size()
    given = weights(UNIT[device], ranks)
    precision = {"fp32": "highest", "bf16": "medium"}[kind]
    start = [_random(shape, number).mul_(0.1) for number, (shape, _, _) in enumerate(given)]
    exact = _stepped(given, start, torch.device("cpu"), torch.float64, None, fp32_matmul_prec="highest")[0]
    group, options = dist.group.WORLD, {"tp_mode": tp_mode, "fp32_matmul_prec": precision}
    found, seconds, waits = _stepped(
        given, start, where, torch.float32, group, refuses_waits=refuses_waits, ns_dtype=kind, **options
    )
    off = moved = 0.0
    for (_, _, dim), begin, whole, part in zip(given, start, exact, found, strict=True):
        own, first = (_cut(x.double(), dim, ranks, rank) for x in (whole, begin))
        off += float((part.double() - own).square().sum())
        moved += float((own - first).square().sum())
    return {"error": (off / moved) ** 0.5, "seconds": seconds, "waits": waits}


def _random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _cut(x: torch.Tensor, dim: int | None, ranks: int, rank: int) -> torch.Tensor:
    return x if dim is None else x.chunk(ranks, dim=dim)[rank].contiguous()


def _stepped(
    given: Weights,
    start: list[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    group: Any,
    refuses_waits: bool = False,
    **options: Any,
) -> tuple[list[torch.Tensor], float, str]:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if group else (1, 0)
    params = []
    for begin, (_, layout, dim) in zip(start, given, strict=True):
        params.append(torch.nn.Parameter(_cut(begin, dim, ranks, rank).to(device, dtype)))
        setattr(params[-1], LAYOUT_ATTRIBUTE, layout)
        attributes = {"tensor_model_parallel": dim is not None and ranks > 1, "partition_dim": dim or 0}
        vars(params[-1]).update(attributes)
    optimizer = Muon(params, lr=LR, momentum=0.9, weight_decay=0.1, nesterov=True, tp_group=group, **options)
    waits, seconds = "", 0.0
    for step in range(3):
        for number, (param, (shape, _, dim)) in enumerate(zip(params, given, strict=True)):
            grad = _cut(_random(shape, 1000 * (step + 1) + number), dim, ranks, rank)
            param.grad = grad.to(device, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin_s = time.perf_counter()
        if refuses_waits and step == 1:
            waits = _without_waiting(optimizer)
        else:
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin_s
    return [param.detach().cpu() for param in params], seconds, waits


def _without_waiting(optimizer: Muon) -> str:
    """What made the host wait in a step; empty: nothing."""
    before = optimizer.engines.compared_elsewhere
    optimizer.engines.compared_elsewhere = True  # as Megatron-Core's optimizers are
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        optimizer.engines.compared_elsewhere = before
    return ""

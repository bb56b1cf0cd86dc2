"""The step as a CUDA graph: captured, replayed while learning rates change, and compared with the step as it is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_muon import Muon
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.graph import capture, cuda_graph
from megatron_muon.routing.layout import MSIGN
from tests.recorded import recorded
from tools.bench.contestants import HYPERPARAMETERS, MOMENTUM
from tools.bench.forms import FUSED, Tensors
from tools.bench.ranks import Groups
from tools.gpu_check.clock import device_of, synchronize
from tools.gpu_check.loopback import loopback
from tools.gpu_check.models import case_of
from tools.gpu_check.parts.steps import cases, parameters, shapes
from tools.gpu_check.report import Item, Report, Setting

WARMUP, STEPS, NEVER = 2, 7, 10**9

SHARE = "llama3_70b"


def items(setting: Setting) -> list[Item]:
    """See :mod:`tools.gpu_check.parts`."""
    found = [Item(name, partial(_replays, setting, name), 30.0) for name in cases()]
    return [*found, Item(f"host time on {SHARE} at TP 8", partial(_host, setting), 60.0)]


def _how(setting: Setting) -> Callable[..., Any]:
    """On CPUs, where nothing can be captured, the operations of the work are done again."""
    return cuda_graph if setting.is_gpu else recorded()


def _trained(setting: Setting, name: str, warmup: int | None) -> tuple[list[torch.Tensor], bool]:
    """Weights after some steps, each with another learning rate, and whether the last was a replay."""
    direction, options = cases()[name]
    device = device_of(setting.device)
    given = shapes(not setting.is_gpu, direction == MSIGN and options.get("variant") != "hyperball")
    params = parameters(given, direction, device, torch.float32)
    precision = {"fp32_matmul_prec": "highest", "ns_dtype": "fp32"}
    optimizer = Muon(params, momentum=0.9, weight_decay=0.1, **{**options, **precision})
    graph = None if warmup is None else capture(optimizer, warmup, how=_how(setting))
    for param in params:
        param.grad = torch.empty_like(param)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(50 + step)
        for param in params:
            assert param.grad is not None
            param.grad.copy_(torch.randn(param.shape, generator=generator))
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1.2 + math.sin(step))
        optimizer.step()
    return [param.detach().cpu() for param in params], graph is not None and graph.is_captured


def _replays(setting: Setting, name: str, report: Report) -> None:
    try:
        found, is_captured = _trained(setting, name, WARMUP)
    except ConfigError as error:
        report.left_out(name, f"refused: {error}")
        return
    report.check("captured", is_captured)
    anew, _ = _trained(setting, name, NEVER)
    report.check(
        "bits of steps that are not captured", all(torch.equal(a, b) for a, b in zip(found, anew, strict=True))
    )
    plain, _ = _trained(setting, name, None)
    pairs = list(zip(found, plain, strict=True))
    off = sum(float((a - b).double().square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    # A learning rate on the device is rounded in another place; iterations in float32 amplify that.
    report.at_most("difference to an optimizer without a graph", (off / size) ** 0.5, 1e-3)


def _host(setting: Setting, report: Report) -> None:
    """What the host does in a step, as it is and as a graph, on one rank's share without communication."""
    device = device_of(setting.device)
    case = case_of(SHARE, 8, small=not setting.is_gpu)
    times = {}
    with loopback(8) as group:
        groups = Groups(group, group, 0, 0)
        for name, warmup in (("as it is", None), ("captured", WARMUP)):
            tensors = Tensors(case, groups, device, [FUSED])
            params = [entry.parameter() for entry in tensors.entries[FUSED]]
            optimizer = Muon(params, **HYPERPARAMETERS, **MOMENTUM, tp_group=group)
            optimizer.engines.compared_elsewhere = True  # as Megatron-Core's optimizers are
            # Messages to itself are copies, which can be captured; other backends than NCCL are refused by default.
            graph = None if warmup is None else capture(optimizer, warmup, how=_how(setting))
            host, whole = [], []
            for _ in range(WARMUP + 2 + 20):
                synchronize(device)
                begin = time.perf_counter()
                optimizer.step()
                host.append(time.perf_counter() - begin)
                synchronize(device)
                whole.append(time.perf_counter() - begin)
            if graph is not None:
                report.check("captured", graph.is_captured)
            times[name] = statistics.median(host[-20:])
            weights = len(params)
            report.row(
                "host time of a step",
                weights=weights,
                step=name,
                host_ms=1e3 * times[name],
                whole_ms=1e3 * statistics.median(whole[-20:]),
            )
            del tensors, params, optimizer, graph
    if setting.is_gpu:
        report.target("graph host", 1e3 * times["captured"], f"{weights} weights of {SHARE} at TP 8")

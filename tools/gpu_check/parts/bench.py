"""Steps on the weights of a rank of six models at TP 1, 2, 4 and 8, without the time of communication."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.engines import DENSE, EXPERT
from megatron_muon.optimizers.muon import Muon
from megatron_muon.orthogonalize import iteration
from megatron_muon.orthogonalize.kernels import emerging
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.planning.memory import memory_of_step
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.timing import step_times
from tools.bench import contestants as known
from tools.bench.accuracy import Reference, update_errors
from tools.bench.calibrate import NUMBERS, calibrate
from tools.bench.contestants import (
    ADAMW,
    HYPERPARAMETERS,
    MOMENTUM,
    OURS,
    UPSTREAM_DUPLICATED,
    UPSTREAM_FP32,
    Contestant,
)
from tools.bench.forms import FUSED, LOGICAL, Tensors
from tools.bench.measure import _engine_of
from tools.bench.observe import counted_products
from tools.bench.ranks import Groups, World
from tools.gpu_check.clock import device_of, synchronize
from tools.gpu_check.loopback import loopback
from tools.gpu_check.models import LAYERS, SIZES, case_of
from tools.gpu_check.parts.rates import product_rate
from tools.gpu_check.report import Item, NotRunError, Report, Setting, need

PEERS = ("emerging symmetric", "gram-newton-schulz")
"""Measured by themselves: they compile and tune for each shape, or may not be there."""

PEER_MODELS = ("llama3_8b", "llama3_70b")

ROUNDS = {"cuda": (5, 15), "cpu": (2, 2)}
"""The fewest and the most timed rounds."""

ROUNDS_S = 2.5
"""About so many seconds of timed rounds."""


def items(setting: Setting) -> list[Item]:
    """See :mod:`tools.gpu_check.parts`."""
    found = [
        Item(f"{model}, TP {tp}", partial(_model, setting, model, tp), 60.0)
        for tp in SIZES
        for model in LAYERS
        if setting.is_gpu or (model, tp) in _ON_CPU
    ]
    models = PEER_MODELS if setting.is_gpu else PEER_MODELS[:1]
    pairs = [(peer, model) for peer in PEERS for model in models]
    return found + [Item(f"{model}, {peer}", partial(_peer, setting, model, peer), 80.0) for peer, model in pairs]


_ON_CPU = (*((model, 1) for model in LAYERS), ("llama3_8b", 8), ("qwen3_30b_a3b", 2), ("deepseek_v3", 4))
"""What is run there: enough to see every line."""


def _model(setting: Setting, model: str, tp: int, report: Report) -> None:
    need("megatron.core", "megatron.training", "emerging_optimizers")
    _measure(setting, model, tp, _contestants(tp), report)


def _peer(setting: Setting, model: str, peer: str, report: Report) -> None:
    need("megatron.core", "megatron.training", "emerging_optimizers")
    if peer == PEERS[1]:
        need("gram_newton_schulz")
    elif reason := emerging.obstacle(device_of(setting.device), torch.bfloat16):  # it would go on without its kernel
        raise NotRunError(f"emerging-optimizers' symmetric kernel {reason}")
    own = _contestants(1)[0]
    _measure(setting, model, 1, [own, _emerging_symmetric() if peer == PEERS[0] else _gram_newton_schulz()], report)


def _contestants(tp: int) -> list[Contestant]:
    """Ours as it is without flags, and in bfloat16; Megatron-Core's exact modes; others where nothing is divided."""
    found = [_ours("", OURS), _ours("bf16", f"{OURS}, bf16")]
    for each in known.contestants("bf16", tp):
        if each.name == ADAMW:
            found.append(dataclasses.replace(each, name=f"{ADAMW}, fused", make=_fused_adamw))
        elif each.package != "megatron-muon" and each.exact and each.name != UPSTREAM_FP32:
            found.append(each)
    return found


def _fused_adamw(params: list[torch.nn.Parameter], groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **HYPERPARAMETERS, fused=True)


def _ours(dtype: str, name: str) -> Contestant:
    def make(params: list[torch.nn.Parameter], groups: Groups) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"ns_dtype": dtype} if dtype else {}
        return Muon(
            params, **HYPERPARAMETERS, **MOMENTUM, **options, tp_group=groups.tp, expert_tp_group=groups.expert_tp
        )

    return Contestant(name, "megatron-muon", FUSED, make, "auto", dtype or "bf16", "quintic")


def _emerging_symmetric() -> Contestant:
    def make(params: list[torch.nn.Parameter], groups: Groups) -> torch.optim.Optimizer:
        from emerging_optimizers.orthogonalized_optimizers import Muon as Theirs

        return Theirs(params, **HYPERPARAMETERS, **MOMENTUM, fp32_matmul_prec="medium", use_syrk=True)

    return Contestant(
        "emerging_optimizers Muon, symmetric", "emerging-optimizers", LOGICAL, make, "", "bf16", "quintic"
    )


def _gram_newton_schulz() -> Contestant:
    def make(params: list[torch.nn.Parameter], groups: Groups) -> torch.optim.Optimizer:
        theirs = import_module("gram_newton_schulz.muon.muon").Muon
        steps = [list(each) for each in iteration("quintic", 5).coefficients]
        return theirs(params, **HYPERPARAMETERS, **MOMENTUM, adjust_lr=None, ns_coefficients=steps)

    note = "not scaled"
    return Contestant(
        "gram-newton-schulz Muon", "gram-newton-schulz", LOGICAL, make, "", "fp16", "quintic", "none", note=note
    )


@dataclasses.dataclass
class _Runner:
    contestant: Contestant
    optimizer: torch.optim.Optimizer
    errors: Any = None
    peak: int = 0
    needed: int = 0
    kernels: int | None = None
    first_s: float = 0.0
    device_s: list[float] = dataclasses.field(default_factory=list)
    host_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.device_s)


def _measure(setting: Setting, model: str, tp: int, each: list[Contestant], report: Report) -> None:
    device = device_of(setting.device)
    case = case_of(model, tp, small=not setting.is_gpu)
    gc.collect()  # what an item that failed has left
    if setting.is_gpu:
        torch.cuda.empty_cache()
    with loopback(tp) as group:
        groups = Groups(group, group if case.ep == 1 else None, 0, 0)
        tensors = Tensors(case, groups, device, known.forms_of([each]))
        world = World(0, 1, device, torch.get_num_threads())
        runners = []
        for contestant in each:
            params = [entry.parameter() for entry in tensors.entries[contestant.form]]
            runners.append(_Runner(contestant, contestant.make(params, groups)))
        _first_steps(runners, tensors, world, tp)
        for runner in runners:
            _look(runner, device)
        _rounds(setting, runners, device)
        _say(setting, report, model, tp, runners, device, case.local_elements)
        _foretold(setting, report, f"{model}, TP {tp}", runners[0], device)
    del runners, tensors, world, groups, group
    gc.collect()


def _first_steps(runners: list[_Runner], tensors: Tensors, world: World, tp: int) -> None:
    """In one process against the exact updates; of several ranks the updates mean nothing."""
    reference = Reference(tensors)
    for runner in runners:
        begin = time.perf_counter()
        if tp == 1 and runner.contestant.polynomial == "quintic":
            entries = tensors.entries[runner.contestant.form]
            runner.optimizer.step()  # compiles and tunes; momentum does not count in the next
            synchronize(world.device)
            runner.first_s = time.perf_counter() - begin
            runner.errors = update_errors(runner.contestant, runner.optimizer, entries, reference, world)
        else:
            runner.optimizer.step()
            synchronize(world.device)
            runner.first_s = time.perf_counter() - begin


def _look(runner: _Runner, device: torch.device) -> None:
    """Memory and launches of a step, and the operations that ours needs."""
    engine = _engine_of(runner.optimizer)
    if engine is not None:
        with counted_products(engine) as counted:
            runner.optimizer.step()
        runner.needed = counted.needed
    if device.type != "cuda":
        runner.optimizer.step()
        return
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.optimizer.step()
    synchronize(device)
    runner.peak = torch.cuda.max_memory_allocated(device) - before
    runner.kernels = kernels_of(runner.optimizer.step)


def kernels_of(work: Callable[[], object]) -> int | None:
    """How many kernels and copies the device does; None where torch's profiler cannot tell."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        # The name that torch gives to each optimizer's step is on the device's line of time, too, and is no kernel.
        events = (each for each in profiler.events() if not each.is_user_annotation)
        return sum(1 for event in events if event.device_type.name == "CUDA")
    except RuntimeError:
        return None


def _rounds(setting: Setting, runners: list[_Runner], device: torch.device) -> None:
    """In turn, so that a device whose speed drifts treats all alike."""
    least, most = ROUNDS[setting.device]
    begin, number = time.perf_counter(), 0
    while number < least or (number < most and time.perf_counter() - begin < ROUNDS_S):
        number += 1
        for runner in runners:
            synchronize(device)
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
            clock = time.perf_counter()
            runner.optimizer.step()
            runner.host_s.append(time.perf_counter() - clock)
            if device.type == "cuda":
                end.record()
                end.synchronize()
                runner.device_s.append(start.elapsed_time(end) / 1e3)
            else:
                runner.device_s.append(runner.host_s[-1])


@cache
def _rates(device: torch.device) -> Rates:
    """Of the device, as ``tools.rates`` measures them; messages take no time, as there are no others."""
    world = World(0, 1, device, torch.get_num_threads())
    found = calibrate(world, [*NUMBERS] if device.type == "cuda" else ["float32", "bfloat16"])
    return dataclasses.replace(found, numbers={**found.numbers, "within.bytes": math.inf, "within.latency": 0.0})


def _planned(optimizer: Muon, engine: StepEngine, device: torch.device) -> float:
    """Seconds of a step by the model of ``plan --device``."""
    alone, spans = dict.fromkeys((DENSE, EXPERT), 0), dict.fromkeys((DENSE, EXPERT), 1)
    with matmul_precision(optimizer.config.fp32_matmul_prec):
        return step_times(engine, _rates(device), alone, spans, nesterov=MOMENTUM["nesterov"]).seconds


_GEMM = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _say(
    setting: Setting, report: Report, model: str, tp: int, runners: list[_Runner], device: torch.device, elements: int
) -> None:
    upstream = next((each for each in runners if each.contestant.name == UPSTREAM_DUPLICATED), None)
    of = f"{model}, TP {tp}"
    for runner in runners:
        name, engine = runner.contestant.name, _engine_of(runner.optimizer)
        columns: dict[str, Any] = {"model": model, "tp": tp, "optimizer": name, "ms": 1e3 * runner.seconds}
        columns["quartiles"] = " to ".join(f"{1e3 * each:.3g}" for each in _quartiles(runner.device_s))
        columns |= {"host_ms": 1e3 * statistics.median(runner.host_s), "first_s": runner.first_s}
        if upstream is not None and runner is not upstream:
            columns["of_duplicated"] = runner.seconds / upstream.seconds
        if runner.errors is not None:
            columns |= {"error": runner.errors.worst, "mean_error": runner.errors.mean}
        if engine is not None and runner.needed:
            dtype = _iteration_dtype(engine)
            rate = product_rate(device, 8192 if setting.is_gpu else 256, dtype)
            columns |= {"numbers": _GEMM[dtype], "of_cublas": runner.needed / runner.seconds / rate}
        if runner.kernels is not None:
            columns["kernels"] = runner.kernels
        if setting.is_gpu:
            columns["peak_mib"] = runner.peak / 2**20
        report.row(f"steps of a rank, {elements / 1e6:.0f} M elements of {model} at TP {tp}", **columns)
        if setting.is_gpu and name == OURS:
            report.target("rate", columns["of_cublas"], of)
    own = runners[0]
    if upstream is None:
        report.check("both were timed", all(each.seconds > 0 for each in runners))
        return
    if tp > 1:
        report.check("all were timed", all(each.seconds > 0 for each in runners))
        return
    for runner in runners:
        errors = runner.errors
        if errors is not None and errors.bound is not None:
            report.at_most(f"error of {runner.contestant.name}", errors.worst, errors.bound)
    if setting.is_gpu:  # small matrices on a CPU tell nothing of it
        report.target("error", own.errors.mean / upstream.errors.mean, of)
        report.target("upstream", own.seconds / upstream.seconds, of)


def _foretold(setting: Setting, report: Report, of: str, runner: _Runner, device: torch.device) -> None:
    """What the plan says of the time and the memory of a step; after all else, which is kept if this fails."""
    optimizer, engine = runner.optimizer, _engine_of(runner.optimizer)
    if engine is None:
        return
    assert isinstance(optimizer, Muon)
    planned = _planned(optimizer, engine, device)
    columns = {"of": of, "ms": 1e3 * runner.seconds, "plan_ms": 1e3 * planned}
    with matmul_precision(optimizer.config.fp32_matmul_prec):
        peak = memory_of_step(engine, dict.fromkeys((DENSE, EXPERT), 0), nesterov=MOMENTUM["nesterov"]).peak
    columns |= {"peak_mib": runner.peak / 2**20, "plan_mib": peak / 2**20}
    report.row("what the plan says of a step", **columns)
    if setting.is_gpu:
        report.target("plan memory", abs(peak / runner.peak - 1.0), of)
        report.target("plan time", abs(planned / runner.seconds - 1.0), of)


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def _iteration_dtype(engine: StepEngine) -> torch.dtype:
    return engine.orthogonalizer.dtype

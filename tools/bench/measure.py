"""One case after the other, on the ranks that are there."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.engine.describe import iteration_of
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.engines import DENSE, EXPERT
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.timing import Times, step_times
from tools.bench import document
from tools.bench.accuracy import Reference, check, update_errors
from tools.bench.calibrate import calibrate
from tools.bench.cases import Case
from tools.bench.contestants import MOMENTUM, PRECISIONS, Contestant, contestants, forms_of
from tools.bench.forms import Tensors
from tools.bench.found import Measured, Rate, Traffic
from tools.bench.observe import Observer, counted_products
from tools.bench.ranks import World, groups_of
from tools.bench.rounds import Gemm, Plan, round_count, timed_rounds

__all__ = ["WARM_UP", "Settings", "measure"]

WARM_UP = 3
"""Steps before the timed ones: one whose update is checked, one that is observed, and a plain one that tells how many
rounds there is time for, if their number is not given."""

GEMM = "GEMM"

_DIGEST = 33
"""Bytes of a rank in that message."""

_NUMBERS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What holds for all cases.

    Attributes:
        dtypes: of Newton-Schulz.
        plan: how many rounds.
        gemm_size: rows of the square product that gives the machine's rate.
        threads: of torch in each process; None for its share of the cores.
        coefficients: further sets that ours is measured with.
        calibration: how long the rates of the device may take to measure; 1 is a few seconds.
    """

    dtypes: tuple[str, ...]
    plan: Plan
    gemm_size: int
    threads: int | None = None
    calibration: float = 1.0
    coefficients: tuple[str, ...] = ()


def measure(
    cases: Sequence[Case], settings: Settings, world: World, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Measure cases that all ranks of ``world`` take part in.

    Args:
        cases: each with as many ranks as there are.
        settings: of the measurement.
        world: of all ranks; all must call this.
        done: is called with the entry of each case and dtype, on all ranks.

    Returns:
        The entries of ``cases`` in the document.

    Raises:
        ConfigError: for weights that cannot be given to an optimizer at this layout.
        WrongUpdateError: if the update of an optimizer is wrong.
    """
    # Megatron-Core warns that it cannot find its rank where there is one process.
    warnings.filterwarnings("ignore", "Could not determine rank")
    return [entry for case in cases for entry in _measure_case(case, settings, world, done)]


def _measure_case(
    case: Case, settings: Settings, world: World, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """All dtypes of a case, on the same tensors, which are gone before the next case has its own."""
    lists = {dtype: contestants(dtype, case.tp, settings.coefficients) for dtype in settings.dtypes}
    tensors = Tensors(case, groups_of(world, case.tp, case.ep), world.device, forms_of(lists.values()))
    reference = Reference(tensors)
    found = []
    for dtype, each in lists.items():
        found.append(_Measurement(tensors, reference, dtype, each, settings, world).run())
        done(found[-1])
        gc.collect()
    return found


class _Measurement:
    """One case in one dtype."""

    def __init__(
        self,
        tensors: Tensors,
        reference: Reference,
        dtype: str,
        each: list[Contestant],
        settings: Settings,
        world: World,
    ) -> None:
        self.tensors, self.reference, self.dtype = tensors, reference, dtype
        self.settings, self.world = settings, world
        self.runners = [Measured(contestant, self._build(contestant)) for contestant in each]

    def run(self) -> dict[str, Any]:
        """Check, observe, warm up and time."""
        case, world = self.tensors.case, self.world
        begin = time.perf_counter()
        world.say(f"{case.label}, {self.dtype}: checking the updates of {len(self.runners)} optimizers")
        for runner in self.runners:
            entries = self.tensors.entries[runner.contestant.form]
            runner.errors = update_errors(runner.contestant, runner.optimizer, entries, self.reference, world)
            check(runner.contestant, runner.errors)
        for runner in self.runners:
            runner.traffic = world.gather(self._observe(runner))
        gemm = Gemm(world, _DTYPES[self.dtype], self.settings.gemm_size)
        steps: dict[str, Callable[[], object]] = {GEMM: gemm}
        steps |= {runner.contestant.name: runner.optimizer.step for runner in self.runners}
        rounds = self.settings.plan.steps
        if rounds is None:
            once = timed_rounds(world, steps, WARM_UP - 2)
            rounds = round_count(self.settings.plan, sum(seconds[-1] for seconds in once.values()))
        world.say(f"{case.label}, {self.dtype}: {rounds} rounds")
        rates = calibrate(world, [_NUMBERS[self.dtype]], self.settings.calibration)
        for runner in self.runners:
            runner.predicted = self._predicted(runner, rates)
        times = timed_rounds(world, steps, rounds)
        for runner in self.runners:
            runner.seconds = times[runner.contestant.name]
        rate = Rate(self.settings.gemm_size, self.dtype, gemm.flops, times[GEMM])
        return document.of_case(case, self.dtype, world, self.runners, rate, rates, time.perf_counter() - begin)

    def _build(self, contestant: Contestant) -> torch.optim.Optimizer:
        params = [entry.parameter() for entry in self.tensors.entries[contestant.form]]
        return contestant.make(params, self.tensors.groups)

    def _predicted(self, runner: Measured, rates: Rates) -> Times | None:
        """How long the slowest rank's step takes by the rates: ``plan``'s model, of the engine's plan alone."""
        engine, world, place = _engine_of(runner.optimizer), self.world, self.tensors.groups.tp_rank
        if engine is None:
            return None
        ranks, nesterov = {DENSE: place, EXPERT: place}, MOMENTUM["nesterov"]
        with matmul_precision(PRECISIONS[self.dtype]):
            mine = step_times(engine, rates, ranks, dict.fromkeys(ranks, 1), nesterov=nesterov)
        if self.tensors.groups.tp is not None:  # they compare first what they are about to do
            mine.within += rates.message_seconds("within", _DIGEST)
        return max(world.gather(mine), key=lambda times: times.seconds)

    def _observe(self, runner: Measured) -> Traffic:
        """One step under the observer; all ranks do it together."""
        world, optimizer = self.world, runner.optimizer
        world.barrier()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        before = torch.cuda.memory_allocated(world.device) if world.device.type == "cuda" else 0
        engine = _engine_of(optimizer)
        observer = Observer()
        if engine is None:
            with observer:
                optimizer.step()
            flops, needed = sum(observer.flops.values()), 0
        else:
            engine.counters.reset()
            with observer, counted_products(engine) as counted:
                optimizer.step()
            flops, needed = engine.counters.flops, counted.needed
            runner.method = _method(engine)
            _check_counters(engine, observer, self.tensors.groups.tp is not None and bool(engine.groups))
        peak = observer.peak
        if world.device.type == "cuda":
            world.synchronize()
            peak = torch.cuda.max_memory_allocated(world.device) - before
        # Triton's kernels are not seen, but our engine does what it is asked.
        products = observer.product_dtype or (runner.contestant.dtype if engine is not None else "")
        return Traffic(peak, products, observer.collectives, observer.bytes, flops, needed)


def _engine_of(optimizer: torch.optim.Optimizer) -> StepEngine | None:
    """That of our optimizer; None for others."""
    prepare = getattr(optimizer, "prepare", None)
    engine = prepare() if callable(prepare) else None
    return engine if isinstance(engine, StepEngine) else None


def _check_counters(engine: StepEngine, observer: Observer, compares: bool) -> None:
    """Our own count of what is sent must be what is seen: the document shows one number for all optimizers.

    Outside Megatron-Core our step begins with a message that is not the engine's: ranks that divide weights compare
    what they are about to do (:func:`megatron_muon.optimizers.agreement.agree`).
    """
    counters = engine.counters
    collectives = counters.collectives + compares
    sent = counters.bytes + compares * _DIGEST * (dist.get_world_size() - 1 if compares else 0)
    if (collectives, round(sent)) != (observer.collectives, round(observer.bytes)):
        raise RuntimeError(
            f"our step counts {collectives} collectives and {sent:.0f} bytes, but "
            f"{observer.collectives} and {observer.bytes:.0f} were seen: one of the counts is wrong"
        )


def _method(engine: StepEngine) -> dict[str, Any]:
    """Which iteration and which exchange for which shapes."""
    shapes: dict[str, Any] = {}
    for chunk in engine.plan.chunks:
        for batch in chunk.batches:
            p, q = sorted((batch.key.m, batch.key.n))
            method = iteration_of(chunk.mode, engine.orthogonalizer, batch.key)
            entry = shapes.setdefault(f"{p} x {q}", {}).setdefault(chunk.mode, {"method": method, "matrices": 0})
            entry["matrices"] += batch.count
    return {"products": engine.orthogonalizer.products.name, "shapes": shapes}

"""How long a step takes by a table of rates: units, the operations that are counted, messages, and the table itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megatron_muon import Muon, MuonConfig
from megatron_muon.engine.modes import LENT, LOCAL, SPLIT
from megatron_muon.engine.plan import Peers, Weight
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.engines import DATA, DENSE, WIDE
from megatron_muon.orthogonalize.products import BlockProducts
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.planning.rates import KINDS, Rates, devices
from megatron_muon.planning.steps import StepPlanner
from megatron_muon.planning.timing import Clock, Times, step_times
from megatron_muon.routing.layout import STIEFEL, WHOLE, MatrixLayout, Section
from tools.rates import merged

FREE = {"memory": math.inf, "kernel": 0.0, "launch": 0.0, "node": 8.0, "overlaps": 0.0}
FREE |= {f"{numbers}.flops": math.inf for numbers in ("float32", "bfloat16")}
FREE |= {f"{numbers}.start": 0.0 for numbers in ("float32", "bfloat16")}
FREE |= {f"{link}.{what}": value for link in ("within", "between") for what, value in
         (("bytes", math.inf), ("latency", 0.0))}  # fmt: skip
QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))


def rates_of(**numbers: float) -> Rates:
    """Of a device on which all but some things take no time."""
    own = FREE | {name.replace("_", "."): value for name, value in numbers.items()}
    return Rates("a device", own, dict.fromkeys(own, ("assumed", "a test")))


def test_a_product_takes_the_greater_of_operations_and_bytes() -> None:
    rates = rates_of(float32_flops=1e12, float32_start=1e-5, memory=1e9, bfloat16_flops=2e12)
    # 5 products of 10 x 30 and 30 x 20: 0.06 us of operations, 22 us of bytes
    assert rates.product_seconds("float32", 5, 10, 20, 30) == pytest.approx(1e-5 + 4 * 5 * 1100 / 1e9)
    large = rates.product_seconds("bfloat16", 1, 8192, 8192, 8192)
    assert large == pytest.approx(2 * 8192**3 / 2e12)
    assert rates.product_seconds("bfloat16", 1, 8192, 8192, 8192, share=0.75) == pytest.approx(0.75 * large)
    assert rates.product_seconds("float16", 1, 8192, 8192, 8192) == large  # has no rate of its own
    assert rates.product_seconds("float32", 1, 0, 8, 8) == 0.0


def test_passes_and_messages() -> None:
    rates = rates_of(memory=100.0, cache=400.0, cache_size=1000.0, norm=50.0, kernel=2.0)
    assert [rates.pass_seconds(size) for size in (1000, 2000)] == [2.0 + 2.5, 2.0 + 20.0]
    assert [rates.pass_seconds(1000, what) for what in ("norm", "turn")] == [22.0, 4.5]
    rates = rates_of(within_bytes=10.0, within_latency=1.0, between_bytes=2.0, between_latency=3.0)
    assert [rates.message_seconds(link, 20) for link in ("within", "between")] == [3.0, 13.0]


@pytest.mark.parametrize("device", sorted(devices()))
def test_the_table(device: str) -> None:
    """Every rate is a positive number with its source; larger products take longer, and never beat the rate."""
    rates = Rates.of(device)
    assert Rates.read(rates.entry()) == rates
    for name, value in rates.numbers.items():
        kind, source = rates.sources[name]
        assert math.isfinite(value) and value > 0.0 and kind in KINDS and source, name
        assert kind != "measured" or source.startswith("one H200")
    for numbers in ("bfloat16", "float16", "tf32", "float32"):
        seconds = [rates.product_seconds(numbers, 1, size, size, size) for size in (128, 512, 2048, 8192)]
        assert seconds == sorted(seconds)
        own = "bfloat16" if numbers == "float16" else numbers
        assert 2 * 8192**3 / seconds[-1] < rates.numbers[f"{own}.flops"]
    assert rates.product_seconds("bfloat16", 1, 8192, 8192, 8192) < rates.product_seconds("tf32", 1, 8192, 8192, 8192)
    # Few rows: bytes, not operations.
    thin = rates.product_seconds("bfloat16", 1, 8, 8192, 8192) - rates.numbers["bfloat16.start"]
    assert thin == pytest.approx(2 * (8 * 8192 * 2 + 8192**2) / rates.numbers["memory"])


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"--device h300: the table of rates has a100, h100, h200, b200\. .*tools\.rates"
    ):
        Rates.of("h300")
    with pytest.raises(ConfigError, match=r"a device: its rates have no products of float64"):
        rates_of().product_seconds("float64", 1, 2, 2, 2)


def test_bytes_of_passes() -> None:
    """Worked out by hand: what is read and what is written, each once; looking at a tensor in another way is free."""
    x, y, half = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bfloat16)
    size = 2 * 8 * 8 * 4
    works: list[tuple[Callable[[], object], float, float]] = [  # bytes, of them those of a kind of their own
        (lambda: x.mul_(2.0), 2 * size, 0.0),
        (lambda: x * 2.0, 2 * size, 0.0),
        (lambda: torch.mul(x, 2.0, out=y), 2 * size, 0.0),
        (lambda: y.copy_(x), 2 * size, 0.0),
        (lambda: y.lerp_(x, 0.5), 3 * size, 0.0),
        (lambda: torch._foreach_lerp_([x, x], [y, y], 0.5), 6 * size, 0.0),
        (lambda: torch._foreach_copy_([x], [y]), 2 * size, 0.0),
        (lambda: (x.mT[:, 1:].view_as(x.mT[:, 1:]), x.split(1), x.new_empty(9)), 0.0, 0.0),
        (lambda: torch.baddbmm(x, y, y), 2 * size, 0.0),  # the product apart
        (lambda: y.copy_(x.mT), 0.0, 2 * size),
        (lambda: y.copy_(half), 0.0, 1.5 * size),
        (lambda: torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64), 0.0, size),
    ]
    for number, (work, plain, special) in enumerate(works):
        clock = Clock(rates_of(memory=1.0, norm=1e3, turn=1e3, cast=1e3))
        with clock:
            work()
        products = 6 * size / 2 if number == 8 else 0.0  # their bytes, at the same rate
        assert clock.finish().seconds == pytest.approx(plain + special / 1e3 + products), number


@pytest.mark.parametrize("ns_dtype", ["fp32", "bf16"])
def test_what_is_counted_is_what_a_step_does(ns_dtype: str) -> None:
    """Operations, number of products, bytes of passes: of a real step under the clock, and of its rehearsal."""
    numbers = {"fp32": "float32", "bf16": "bfloat16"}[ns_dtype]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(64, 96)] * 3 + [(320, 256), (16, 32), (64, 32)]]
    params[-1].matrix_layout = QKV  # type: ignore[attr-defined]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Muon(params, ns_dtype=ns_dtype, nesterov=True)
    # oneDNN's float32 products are made under a switch that the clock of a real step would take for TF32's.
    optimizer.engines.products["cpu", torch.float32] = BlockProducts(64)
    optimizer.step()
    engine = optimizer.prepare()
    assert engine is not None
    for kind in (f"{numbers}_flops", f"{numbers}_start", "memory", "norm", "turn"):
        clock = Clock(rates_of(**{kind: 1.0}))
        engine.counters.reset()
        with clock:
            optimizer.step()
        seen = clock.finish()
        with matmul_precision(optimizer.config.fp32_matmul_prec):
            told = step_times(engine, clock.rates, {}, {}, nesterov=True)
        assert told.seconds == seen.seconds, kind
        # copies that turn matrices: symmetric products by blocks, of float32 on CPUs
        assert (told.seconds > 0) == (kind != "turn" or ns_dtype == "fp32")
        if kind == f"{numbers}_flops":
            assert told.products == told.seconds == engine.counters.flops
        assert told.operations == pytest.approx(seen.operations, rel=0.1)


def times_of(weights: list[Weight], mode: str, rates: Rates, spans: int, **options: object) -> Times:
    """Of the first rank, in bfloat16 unless options say otherwise."""
    planner = StepPlanner(MuonConfig(**{"fp32_matmul_prec": "medium", **options}))
    return planner.step(weights).times(mode, {DENSE: 0}, {DENSE: spans}, rates)


def divided(count: int) -> list[Weight]:
    return [Weight((512, 512), WHOLE, -1, DENSE, 2)] * count


def test_messages_take_the_link_that_the_group_reaches_over() -> None:
    rates = rates_of(within_bytes=1e9, between_bytes=1e8)
    within, between = (times_of(divided(4), "duplicated", rates, spans) for spans in (8, 9))
    sent = 4 * 512 * 512 * 2
    assert (within.within, within.between) == (pytest.approx(sent / 1e9), 0.0)
    assert (between.within, between.between) == (0.0, pytest.approx(sent / 1e8))
    latency = rates_of(within_latency=1.0)
    assert times_of(divided(4), "owner", latency, 2).within == 2.0
    assert times_of(divided(4), "distributed", latency, 2).within == 6.0


def test_messages_are_under_way_while_others_are_computed() -> None:
    """Two chunks of 32 matrices: only the first message there and the last one back are waited for."""
    slow = {"within_bytes": 1e9, "bfloat16_flops": 1e12}
    alone, beside = (
        times_of(divided(64), "owner", rates_of(**slow, overlaps=value), 2, chunk_mb=16.0) for value in (0.0, 1.0)
    )
    assert alone.products == beside.products
    assert 0.2 * alone.within < beside.within < 0.8 * alone.within
    assert beside.seconds < alone.seconds


def test_the_host_is_waited_for_where_it_is_slower_than_the_device() -> None:
    alone, beside = (times_of(divided(2), "duplicated", rates_of(launch=1.0, kernel=0.25, overlaps=value), 2)
                     for value in (0.0, 1.0))  # fmt: skip
    assert alone.launches == alone.operations == beside.operations
    assert beside.seconds == pytest.approx(beside.operations) and alone.seconds == alone.operations + alone.passes


def test_kernels_that_are_named_compute_symmetric_results_once() -> None:
    weights, rates = [Weight((1024, 1024), WHOLE)], rates_of(bfloat16_flops=1.0)
    torch_s, kernel = (times_of(weights, "auto", rates, 1, ns_backend=name).products for name in ("torch", "triton"))
    n = 1024
    assert torch_s == 5 * 6 * n**3
    assert kernel == pytest.approx(5 * (2 * n * (n + 1) * n + 2 * n**3))


def test_solvers_on_the_manifold_are_products_and_messages() -> None:
    weights = [Weight((64, 32), MatrixLayout("stiefel", direction=STIEFEL), -1, DENSE, 2)]
    planner = StepPlanner(MuonConfig())
    step, ranks = planner.step(weights), {DENSE: 0}
    cost = step.cost("auto", ranks)
    assert cost.flops > 0 and cost.collectives == 2
    rates = rates_of(float32_flops=2.0, within_latency=1.0, within_bytes=4.0)
    times = step.times("auto", ranks, {DENSE: 2}, rates)
    assert (times.products, times.within) == (cost.flops / 2.0, pytest.approx(2.0 + cost.bytes / 4.0))


@pytest.mark.parametrize("count", [8, 1])
def test_ranks_that_orthogonalize_for_one_another(count: int) -> None:
    """One rank holds all: both compute, and wait for messages between them; a single matrix is split among them."""
    peers = Peers(DATA, 2, 0, WIDE)
    weights = [Weight((8192, 8192), WHOLE, peers=peers)] * count
    steps = StepPlanner(MuonConfig(fp32_matmul_prec="medium")).steps(weights, 2)
    spans = dict.fromkeys((DENSE, DATA, WIDE), 16)
    rates = rates_of(bfloat16_flops=1e12, between_latency=1e-3)
    found = [step.times("auto", {DENSE: 0, DATA: rank, WIDE: rank}, spans, rates) for rank, step in enumerate(steps)]
    modes = {chunk.mode for chunk in steps[0].engine("auto").plan.chunks}
    assert modes == ({LENT, LOCAL} if count > 1 else {SPLIT})
    assert all(times.products > 0 and times.between >= 2e-3 for times in found)
    assert sum(times.products for times in found) == pytest.approx(count * 5 * 6 * 8192**3 / 1e12)


def test_what_a_machine_cannot_measure_stays_as_it_was() -> None:
    known, found = Rates.of("h200"), rates_of(memory=5.0)
    found = Rates(found.name, {"memory": 5.0, "node": 1.0}, dict.fromkeys(("memory", "node"), ("measured", "here")))
    entry = merged("H200", found, known)
    assert (entry.numbers["memory"], entry.sources["memory"]) == (5.0, ("measured", "here"))
    assert entry.numbers["node"] == 8.0
    assert entry.numbers["between.bytes"] == known.numbers["between.bytes"]


def test_messages_of_one_link_follow_one_another() -> None:
    clock = Clock(rates_of(within_bytes=1.0, between_bytes=1.0, overlaps=1.0))
    assert [clock.sent(link, 5.0) for link in ("within", "within", "between")] == [5.0, 10.0, 5.0]
    clock.wait("within", 10.0)
    clock.wait("between", 5.0)
    assert (clock.times.within, clock.times.between) == (10.0, 0.0)

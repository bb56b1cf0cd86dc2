"""No step of any mode, type of numbers, rule or variant waits for the device, mixes devices, or sends what it must not.

Each case takes two steps. The first has documented waits, of :data:`tests.fake_cuda.world.FIRST_STEP`; the second has
none. This covers what a step does on CUDA, and not what it computes: numbers are compared on CPUs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.choices import TP_MODES, Budget
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.fading import EVERY
from megatron_muon.optimizers.probe import Probe
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.routing.layout import MSIGN, STIEFEL, WHOLE
from tests.fake_cuda.cases import ELEMENTWISE, EVERYTHING, FEW, MEASURED, NUMBERS, SOLVED, Shards, weights
from tests.fake_cuda.world import COMPARISON, FIRST_STEP, Allowed, World
from tests.pairwise import pairwise

FITTING = tuple(each for each in EVERYTHING if each[0] != (20, 12))
"""Those that ``blockwise`` takes: no shard cuts periods."""

RATE = Allowed("megatron_muon/optimizers/groups.py:check_numbers", "a rate is checked when it is given: it is 0.1", 1)
EIGH = Allowed("megatron_muon/optimizers/stiefel_solvers.py:fixed_point", "torch.linalg.eigh looks for its failure")


def two_steps(
    shards: Shards = EVERYTHING,
    direction: str = MSIGN,
    dtype: torch.dtype = torch.float32,
    always: tuple[Allowed, ...] = (),
    probe: Probe | None = None,
    **options: Any,
) -> World:
    """Of one of two ranks; checks what has travelled. The second is measured, if there is a probe."""
    with World(1, 2) as world:
        params = weights(world, shards, direction, dtype=dtype)
        if "lr" in options:
            options["lr"] = torch.full((), 0.1, device="cuda")
            world.watch.allowed[RATE.where] = RATE
        muon = Muon(params, tp_group=dist.group.WORLD, num_ns_steps=2, **options)
        muon.probe = probe
        if probe is not None:
            probe.is_next_due = True
        with world.refusing([*FIRST_STEP, *always]):
            muon.step()
        muon.engines.compared_elsewhere = True  # as Megatron-Core's optimizers are, which compare gradients themselves
        first = len(world.calls)
        world.watch.written.clear()
        if probe is not None:
            probe.is_due = True
        with world.refusing(always):
            muon.step()
            assert probe is None or probe.take()
        assert {param.untyped_storage()._cdata for param in params} <= world.watch.written, "not updated"
        for state in muon.state.values():
            assert all(value.is_cuda for value in state.values() if isinstance(value, torch.Tensor))
        check_calls(world, first, [*muon.engines])
    return world


def check_calls(world: World, first: int, engines: list[StepEngine]) -> None:
    """Ranks send the dtypes that their plans say, and sums in float32 at least; both steps send the same."""
    planned = {
        dtype
        for engine in engines
        for dtype in (engine.wire.dtype, engine.wire.back, engine.wire.gram, engine.local_dtype)
    }
    for call in world.calls[first:]:
        if call.kind == "all_reduce":
            assert call.dtype.itemsize >= 4, f"sums of {call.dtype}"
        else:
            assert call.dtype in planned, f"{call.kind} of {call.dtype}"


def test_momentum_that_may_have_faded() -> None:
    """Looked at every 64 updates: by one more message, of those that have parts of rows, and nothing for the host."""
    with World(1, 2) as world:
        muon = Muon(weights(world, EVERYTHING, MSIGN), tp_group=dist.group.WORLD, num_ns_steps=2)
        with world.refusing(FIRST_STEP):
            muon.step()
        muon.engines.compared_elsewhere = True
        before = [len(world.calls)]
        for updates in (EVERY - 1, EVERY):
            for state in muon.state.values():
                state["step"] = updates
            with world.refusing(()):
                muon.step()
            before.append(len(world.calls))
    first, usual, looked = before
    assert looked - usual == usual - first + 1 and world.calls[usual].kind == "all_reduce"


@pytest.mark.parametrize(
    "mode,numbers,chunk_mb,dtype", pairwise(TP_MODES, NUMBERS, (0.0, 1e-6), ("float32", "bfloat16"))
)
def test_modes_and_numbers(mode: str, numbers: tuple[str, str], chunk_mb: float, dtype: str) -> None:
    ns_dtype, wire = numbers
    if (mode, ns_dtype) == ("gram", "bf16"):
        ns_dtype = "fp16"  # that is refused: it has not the bits
    shards = FITTING if mode == "blockwise" else EVERYTHING
    numbers_of = {"ns_dtype": ns_dtype, "tp_wire_dtype": wire}
    world = two_steps(shards, tp_mode=mode, chunk_mb=chunk_mb, dtype=getattr(torch, dtype), **numbers_of)
    assert (len(world.calls) > 1) == (mode != "blockwise")
    # Whatever the plan says: results come back, and polynomials travel, no wider than the iteration has rounded them.
    if mode in ("owner", "gram"):
        kind, which = ("all_to_all", min) if mode == "owner" else ("all_gather", max)
        sizes = {call.dtype.itemsize for call in world.calls if call.kind == kind}
        assert which(sizes) <= (4 if ns_dtype == "fp32" else 2), sizes


@pytest.mark.parametrize(
    ("form", "name"),
    [pytest.param("auto", "spectral_sphere", marks=pytest.mark.slow), ("bf16", "normuon"), ("int8", "none")],
)
def test_numbers_in_other_forms(form: str, name: str) -> None:
    """Masters as remainders, read and kept without a look at what is in them."""
    two_steps(dtype=torch.bfloat16, master="remainder", momentum_dtype=form, variant=name, nesterov=True)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rules(name: str) -> None:
    two_steps(tp_mode="owner", **ELEMENTWISE[name])


def test_steps_that_are_to_be_measured() -> None:
    """In steps that do not measure nobody waits."""
    budget = Budget("auto", measured="all")
    shards = [(shape, dim, dataclasses.replace(layout, budget=budget)) for shape, dim, layout in EVERYTHING]
    two_steps(tuple(each for each in shards if each[2].has_matrices))


MODES_OF_MEASURED = TP_MODES[1:]


@pytest.mark.parametrize(
    "name,mode",
    [
        pytest.param(name, mode, marks=() if number % 3 == place % 3 else pytest.mark.slow)
        for place, name in enumerate(MEASURED)
        for number, mode in enumerate(MODES_OF_MEASURED)
    ],
)
def test_measured_rules(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one mode or two, with parts of matrices: the others are slow."""
    direction, options = MEASURED[name]
    shards = tuple(each for each in FEW if mode != "blockwise" or each in FITTING)
    two_steps(shards, direction, tp_mode=mode, ns_dtype="fp16", **options)


PROBED = [
    ("none", "owner"),
    pytest.param("normuon", "distributed", marks=pytest.mark.slow),
    pytest.param("sphere", "gram", marks=pytest.mark.slow),
    ("row_norm", "auto"),
]


@pytest.mark.parametrize("name,mode", PROBED)
def test_steps_with_a_probe(name: str, mode: str) -> None:
    """Neither what is measured of a step, nor the numbers that are made of it, is waited for."""
    direction, options = {"none": (MSIGN, {}), **MEASURED}[name]
    two_steps(FEW, direction, tp_mode=mode, ns_dtype="fp16", probe=Probe(), **options)


@pytest.mark.parametrize("name", SOLVED)
def test_manifolds(name: str) -> None:
    direction, options = SOLVED[name]
    always = (EIGH,) if name == "fixed_point" else ()
    probe = Probe() if name == "admm" else None
    two_steps(FEW[1:], direction, always=always, probe=probe, **options)


def test_rates_of_both_kinds_on_manifolds() -> None:
    """Numbers and tensors in one batch: a number that is made a tensor on the device by a copy would wait for it."""
    with World() as world:
        world.watch.allowed[RATE.where] = RATE
        params = weights(world, (((16, 12), None, WHOLE),) * 3, STIEFEL)
        rates: list[float | torch.Tensor] = [0.1, 0.2, torch.full((), 0.1, device="cuda")]
        groups = [{"params": [param], "lr": rate} for param, rate in zip(params, rates, strict=True)]
        muon = Muon(groups, variant=StiefelMuon("admm", 1))
        rate = Allowed(
            "megatron_muon/optimizers/stiefel.py:_stays", "at rate 0 no weight is brought onto the manifold", 0
        )
        with world.refusing([rate]):
            muon.step()


def test_the_comparison_of_plans_waits_once() -> None:
    """However many groups there are: for what they have gathered, and not for the digests that each sends."""
    with World(0, 4) as world:
        pair = world.own_group([(0, 1), (2, 3)])
        params = [world.parameter(16, 12, dim=1), world.parameter(16, 12, dim=1, expert=True)]
        muon = Muon(params, tp_group=dist.group.WORLD, expert_tp_group=pair)
        with world.refusing(COMPARISON):
            muon.step()
    # One number of each group: real tensors copy them together.
    assert sum(world.watch.waits.values()) == 2


def test_the_first_steps_wait_where_they_are_said_to() -> None:
    """No entry of the list is a dead one."""
    waits = {where for name in ("hyperball", "sphere") for where in waits_of(name)}
    assert waits == {each.where for each in FIRST_STEP}


def waits_of(name: str) -> list[str]:
    direction, options = MEASURED[name]
    from megatron_muon.optimizers import power

    power._first_vector.cache_clear()
    return list(two_steps(FEW, direction, **options).watch.waits)

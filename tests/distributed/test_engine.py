"""Steps of the engine on ranks: what is sent, what is refused, what is kept in memory, and that nothing waits."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import ConfigError, Muon
from megatron_muon.engine.modes import EXACT, MODES
from megatron_muon.orthogonalize import iteration
from megatron_muon.orthogonalize.gram import prescale
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts
from megatron_muon.orthogonalize.scale import scale_factor
from megatron_muon.routing.layout import SCALAR, WHOLE, MatrixLayout, Section
from tests.pool import RankPool
from tests.reference import orthogonalized
from tools.splitting import merge, split

QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))
HEADS = MatrixLayout("qkv", (Section("q", 8, matrix_rows=4), Section("k", 4, matrix_rows=4), Section("v", 4)))
GATED = MatrixLayout("gdn", (Section("q", 6), Section("beta", 2, SCALAR)))
SETS = ("quintic", "cubic5", "turbo_muon")
PLAIN = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "scale_mode": "none"}
"""With these and weights of zero, minus the weight is the orthogonalized gradient."""
# float64: sums in another order, amplified by the slope of the iteration (about 500 a step at 0).
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Given:
    """A weight: its whole shape, the divided dimension of its matrices (None: none), its layout, and its group."""

    shape: tuple[int, ...]
    dim: int | None = 0
    layout: MatrixLayout = WHOLE
    expert: bool = False

    def cut(self, whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        if self.dim is None:
            return whole.clone()
        return whole.chunk(group.size(), dim=self.dim - 2)[group.rank()].clone()

    def parameter(self, group: dist.ProcessGroup, whole: torch.Tensor) -> torch.nn.Parameter:
        param = torch.nn.Parameter(self.cut(whole, group))
        param.matrix_layout, param.expert_tp = self.layout, self.expert
        if self.dim is not None:
            param.tensor_model_parallel, param.partition_dim = True, self.dim
        return param


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


MIXED = (
    *[Given((16, 24), 1)] * 3,
    *[Given((24, 16), 0)] * 2,
    Given((16, 24), 0),
    Given((32, 12), 0, QKV),
    Given((16, 16), 1),
    Given((12, 20), None),
)


# What is sent.


def directions(given: tuple[Given, ...], modes: list[str], wires: list[str]) -> dict[tuple[str, str], list]:
    """What one step makes of gradients that bfloat16 holds exactly, on this rank, in float32, by mode and wire."""
    group, found = dist.group.WORLD, {}
    for mode, wire in itertools.product(modes, wires):
        params = [each.parameter(group, torch.zeros(each.shape)) for each in given]
        for seed, (param, each) in enumerate(zip(params, given, strict=True)):
            gradient = random(each.shape, seed, torch.float32).bfloat16().float()
            param.grad = each.cut(gradient, group)
        Muon(params, tp_group=group, tp_mode=mode, ns_dtype="fp32", tp_wire_dtype=wire, **PLAIN).step()
        found[mode, wire] = [-param.detach() for param in params]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_float32_wire_gives_the_bits_of_duplicated(pool: RankPool, world_size: int) -> None:
    """The owner has the very matrices that every rank has in ``duplicated``, only fewer in a batch.

    Two ranks own three each of the last weight's six heads, of which some lie in pairs: these are not packed in order.
    Products of so small matrices are rounded otherwise in another number of them.
    """
    given = (*MIXED, Given((32, 12), 1, HEADS))
    for rank in pool.run(directions, world_size, given, ["owner", "duplicated"], ["fp32"]):
        *pairs, heads = zip(rank["owner", "fp32"], rank["duplicated", "fp32"], strict=True)
        assert all(torch.equal(owner, duplicated) for owner, duplicated in pairs)
        torch.testing.assert_close(*heads, rtol=0, atol=3e-5)


def test_bfloat16_wire_rounds_what_is_sent_and_nothing_else(pool: RankPool) -> None:
    """The gradients lose nothing on their way; results come back from their owners with half a unit of bfloat16.

    The norm of a bfloat16 matrix is summed in another order: a rounding of float32, times the slope of the iteration.
    """
    for rank in pool.run(directions, 2, MIXED, ["owner", "duplicated"], ["bf16", "fp32"]):
        for index, given in enumerate(MIXED):
            expected, owner = rank["owner", "fp32"][index], rank["owner", "bf16"][index]
            torch.testing.assert_close(rank["duplicated", "bf16"][index], expected, rtol=0, atol=3e-5)
            if given.dim is None:
                assert torch.equal(owner, expected), "nothing was sent"
            else:
                torch.testing.assert_close(owner, expected, rtol=2.0**-8, atol=3e-5)
                assert torch.equal(owner, owner.bfloat16().float()) and not torch.equal(owner, expected)


Way = tuple[str, str, str, str]
"""Mode, wire, numbers of the iteration, and coefficients."""


def scaled(ways: list[Way]) -> list[tuple[Way, float]]:
    """The ways and factors (NaN: in one entry) that change bits of other weights' updates, or of all."""
    group, found = dist.group.WORLD, list[tuple[Way, float]]()
    gradients = [random(each.shape, seed, torch.float32) for seed, each in enumerate(MIXED)]

    def after(way: Way, factor: float) -> list[torch.Tensor]:
        mode, wire, dtype, coefficients = way
        params = [each.parameter(group, torch.zeros(each.shape)) for each in MIXED]
        for param, each, gradient in zip(params, MIXED, gradients, strict=True):
            param.grad = each.cut(gradient, group) * (1.0 if math.isnan(factor) else factor)
        if math.isnan(factor) and group.rank() == 1:
            params[1].grad[2, 3] = factor
        numbers = {"ns_dtype": dtype, "tp_wire_dtype": wire, "coefficient_type": coefficients}
        Muon(params, tp_group=group, tp_mode=mode, **numbers, **PLAIN).step()
        assert not math.isnan(factor) or params.pop(1).isnan().all()
        return [param.detach() for param in params]

    for way in ways:
        usual = after(way, 1.0)
        for factor in (2.0**-100, 2.0**100, math.nan):
            same = map(torch.equal, after(way, factor), usual[:1] + usual[2:] if math.isnan(factor) else usual)
            found += [] if all(same) else [(way, factor)]
    return found


def test_neither_scale_nor_a_nan_changes_bits_elsewhere(pool: RankPool) -> None:
    """1e-30 to 1e30, as sent in either type of numbers, normalized by sums over the ranks, in each iteration.

    The NaN is on one rank, in a weight of which there are others of the same shape.
    """
    every = itertools.product(EXACT, ["fp32", "bf16"], ["fp32", "bf16", "fp16"])
    sets = ("quintic", "turbo_muon", "cubic5")
    numbered = ((*way, sets[(index + index // 3) % 3]) for index, way in enumerate(every))
    ways = [way for way in numbered if way[:3:2] != ("gram", "bf16")]  # there is no such iteration
    assert pool.run(scaled, 2, ways) == [[], []]


def copied_step() -> tuple[bool, str]:
    """Whether a copy of an optimizer of shards steps as the original does; and what pickle says of it."""
    group = dist.group.WORLD
    param = Given((16, 24), 1, QKV).parameter(group, random((16, 24), 1))
    original = Muon([param], tp_group=group)
    copied = copy.deepcopy(original)
    (other,) = copied.param_groups[0]["params"]
    param.grad, other.grad = param.detach().clone(), param.detach().clone()
    original.step(), copied.step()
    with pytest.raises(ConfigError) as refusal:
        pickle.dumps(original)
    return torch.equal(param, other), str(refusal.value)


def test_copies_of_optimizers_of_shards(pool: RankPool) -> None:
    for same, refusal in pool.run(copied_step, 2):
        assert same and "process groups do not leave their process" in refusal


class Counted(TorchProducts):
    """Counts products of either iteration alone: ``a X + Z X`` of the standard one, ``Q X`` of Gram Newton-Schulz."""

    standard = gram_iteration = 0

    def multiply_add(self, x: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        self.standard += x.size(0)
        return super().multiply_add(x, z, a, b)

    def apply(self, q: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
        self.gram_iteration += x.size(0)
        return super().apply(q, x, alpha)


def reported_and_done() -> dict[str, tuple[str, int, int]]:
    """The report's line, and how many matrices went through each iteration on this rank, by mode."""
    group, found = dist.group.WORLD, {}
    for mode in EXACT:
        params = [Given((16, 64), 1).parameter(group, random((16, 64), 1)) for _ in range(2)]
        params += [Given((16, 16), 1).parameter(group, random((16, 16), 2)) for _ in range(2)]
        for param in params:
            param.grad = param.detach().clone()
        optimizer = Muon(params, tp_group=group, tp_mode=mode, ns_dtype="fp32")
        engine, products = optimizer.prepare(), Counted()
        engine.orthogonalizer.products = products
        optimizer.step()
        found[mode] = engine.describe()[1], products.standard // 5, products.gram_iteration // 2
    return found


def test_report_names_the_iterations_that_run(pool: RankPool) -> None:
    """Whatever is cheaper for the whole matrix: ``distributed`` has none but the standard one, ``gram`` only Gram."""
    standard, gram = "standard Newton-Schulz, float32", "Gram Newton-Schulz, float32, restarts 2"
    for rank in pool.run(reported_and_done, 2):
        assert rank["distributed"] == (f"iteration: 4 {standard}", 4, 0)
        assert rank["gram"] == (f"iteration: 4 {gram}", 0, 4)
        assert rank["duplicated"] == (f"iteration: 2 {gram}, 2 {standard}", 2, 2)
        assert rank["owner"] == (f"iteration: 2 {gram}, 2 {standard}", 1, 1), "each rank owns one of both shapes"


def compiled_in_step() -> dict[str, tuple[int, set[Any], int]]:
    """What ``prepare`` has products built for, what the first step needs beside that, and messages of the former."""
    group, found, needed = dist.group.WORLD, {}, set()

    def recorded(name: str) -> Callable[..., torch.Tensor]:
        plain = getattr(BlockProducts, name)

        def record(self: BlockProducts, x: torch.Tensor, *args: Any) -> torch.Tensor:
            needed.add((name, x.shape, x.stride()))
            return plain(self, x, *args)

        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockProducts, "compiles", True)
        for name in ("gram", "quadratic", "commuting"):
            patch.setattr(BlockProducts, name, recorded(name))
        for mode in EXACT:
            shapes = (((16, 32), 1), ((32, 16), 0), ((16, 8), 1), ((40, 24), None))
            params = [Given(*shape).parameter(group, random(shape[0], 1)) for shape in shapes for _ in range(5)]
            optimizer = Muon(params, tp_group=group, tp_mode=mode, ns_dtype="fp32", chunk_mb=0.01)
            needed.clear()
            engine = optimizer.prepare()
            built, sent = set(needed), engine.counters.collectives
            for param in params:
                param.grad = param.detach().clone()
            optimizer.step()
            found[mode] = len(built), needed - built, sent
    return found


def test_products_are_built_before_the_first_step(pool: RankPool) -> None:
    for rank in pool.run(compiled_in_step, 2):
        for mode, (built, later, sent) in rank.items():
            assert built > 3 and not later and not sent, mode


def errors_in_float16(shape: tuple[int, int]) -> dict[str, float]:
    """Relative errors of the update of one matrix, on this rank, by mode."""
    group, found = dist.group.WORLD, {}
    gradient = random(shape, 1, torch.float32)
    exact = Given(shape, 1).cut(orthogonalized(gradient, iteration("quintic", 5).coefficients), group)
    for mode in EXACT:
        param = Given(shape, 1).parameter(group, torch.zeros(shape))
        param.grad = Given(shape, 1).cut(gradient, group)
        Muon([param], tp_group=group, tp_mode=mode, ns_dtype="fp16", **PLAIN).step()
        found[mode] = float((-param.detach() - exact).norm() / exact.norm())
    return found


def test_float16_is_as_exact_in_every_mode(pool: RankPool) -> None:
    """Matrices so large that they are scaled before Gram matrices are taken, which must not show in the result.

    Newton-Schulz in float16 errs by a thousandth here; what is sent is rounded to bfloat16, by 2^-9.
    """
    assert prescale(torch.float16, 128) > 1.0
    for errors in pool.run(errors_in_float16, 2, (128, 256)):
        assert all(error < 2.0**-8 for error in errors.values()), errors


# What is refused.


DIFFERENCES = ("shape", "number", "mode", "coefficients", "gradient")


def errors_of_different_plans() -> list[tuple[str, float]]:
    return [error_of_different_plans(difference) for difference in DIFFERENCES]


def error_of_different_plans(difference: str) -> tuple[str, float]:
    """The message on this rank, and the seconds until it came."""
    group = dist.group.WORLD
    odd = dist.get_rank() == 1
    rows = 24 if odd and difference == "shape" else 16
    given = [Given((rows, 24), 1)] * (3 if odd and difference == "number" else 2)
    params = [each.parameter(group, random(each.shape, 1)) for each in given]
    for param in params:
        param.grad = torch.ones_like(param)
    if odd and difference == "gradient":
        params[0].grad = None
    mode = "duplicated" if odd and difference == "mode" else "owner"
    steps = 6 if odd and difference == "coefficients" else 5
    optimizer = Muon(params, tp_group=group, tp_mode=mode, num_ns_steps=steps)
    before, start = [param.detach().clone() for param in params], time.monotonic()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    seconds = time.monotonic() - start
    assert all(torch.equal(param, its) for param, its in zip(params, before, strict=True))
    return str(error.value), seconds


_OPTIONS = {
    "mode": "tp_mode is owner on ranks [0] and duplicated on ranks [1] of the tensor-parallel group",
    "coefficients": "num_ns_steps is 5 on ranks [0] and 6 on ranks [1] of the tensor-parallel group",
}


def test_ranks_with_different_plans_stop_at_once(pool: RankPool) -> None:
    for rank, results in enumerate(pool.run(errors_of_different_plans, 2)):
        for difference, (message, seconds) in zip(DIFFERENCES, results, strict=True):
            if difference == "gradient":
                expected = (
                    "a weight of 16 x 12 on this rank has a gradient on ranks [0] of the tensor-parallel group and"
                )
                assert expected in message and "none on ranks [1]" in message
            elif difference in _OPTIONS:
                assert _OPTIONS[difference] in message
            else:
                expected = f"the ranks of the tensor-parallel group plan different steps (rank {rank} has"
                assert expected in message and "--muon-ns-backend" in message, difference
            assert seconds < 30, difference  # collectives would time out after 60


# Parameters of many kinds in one optimizer.


def errors_of_mixed_groups() -> dict[tuple[str, bool], float]:
    """In each mode, with and without Nesterov momentum, squares and balanced rows."""
    experts = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    return {key: error_of_mixed_groups(*key, experts) for key in itertools.product(EXACT, SETS)}


def error_of_mixed_groups(mode: str, name: str, expert_group: dist.ProcessGroup) -> float:
    """The largest difference from the formula, applied to whole weights in float64."""
    group, nesterov = dist.group.WORLD, name != "quintic"
    given = (
        *MIXED,
        *[Given((16, 12), 1, expert=True)] * 3,
        Given((3, 8, 12), 0, WHOLE.stack(), expert=True),
        Given((16, 24), 1),
    )
    late = len(given) - 1  # gets its first gradient in the second step
    groups = [expert_group if each.expert else group for each in given]
    wholes = [random(each.shape, 100 + index) for index, each in enumerate(given)]
    buffers = [torch.zeros_like(whole) for whole in wholes]
    params = [each.parameter(its, whole) for each, its, whole in zip(given, groups, wholes, strict=True)]
    settings = [(0.1, 0.8, 0.3), (0.02, 0.5, 0.0)]
    param_groups = [
        {"params": params[number::2], "lr": lr, "momentum": momentum, "weight_decay": decay}
        for number, (lr, momentum, decay) in enumerate(settings)
    ]
    optimizer = Muon(
        param_groups, nesterov=nesterov, fp32_matmul_prec="highest", tp_mode=mode, tp_group=group,
        expert_tp_group=expert_group, coefficient_type=name,
    )  # fmt: skip
    for step in range(3):
        for index, each in enumerate(given):
            if index == late and step == 0:
                continue
            gradient = random(each.shape, 1000 * step + index)
            params[index].grad = each.cut(gradient, groups[index])
            lr, momentum, decay = settings[index % 2]
            buffers[index] = momentum * buffers[index] + (1 - momentum) * gradient
            u = momentum * buffers[index] + (1 - momentum) * gradient if nesterov else buffers[index]
            wholes[index] = (1 - lr * decay) * wholes[index] - lr * direction(each.layout, u, name)
        optimizer.step()
    errors = [
        (param.detach() - each.cut(whole, its)).abs().max()
        for param, each, whole, its in zip(params, given, wholes, groups, strict=True)
    ]
    return torch.stack(errors).max().item()  # NaN, if there is one: Python's max may pass over it


def direction(layout: MatrixLayout, u: torch.Tensor, name: str) -> torch.Tensor:
    """Scaled and orthogonalized by singular values, matrix by matrix."""
    if layout.stacked:
        return torch.stack([direction(WHOLE, each, name) for each in u])
    steps = iteration(name, 5)
    blocks = [
        orthogonalized(block, steps.coefficients, steps.balanced) * scale_factor("spectral", *block.shape)
        for block in split(layout, u)
    ]
    return merge(layout, blocks)


def test_groups_of_parameters_and_of_ranks_together(pool: RankPool) -> None:
    """Dense over four ranks, experts over pairs, two parameter groups, and a parameter without a gradient at first."""
    for errors in pool.run(errors_of_mixed_groups, 4):
        assert len(errors) == len(SETS) * len(EXACT)
        assert all(error < TOLERANCE for error in errors.values()), errors


def steps_of_some_ranks() -> list[tuple[bool, int]]:
    """In two modes. Ranks 2 and 3, a pipeline stage without matrices, have an empty parameter group."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    return [steps_of_a_rank(mode, pair) for mode in ("auto", "owner")]


def steps_of_a_rank(mode: str, pair: dist.ProcessGroup) -> tuple[bool, int]:
    """Whether a weight without a gradient is left alone, and how many weights have state."""
    given = [] if dist.get_rank() >= 2 else [Given((16, 24), 1)] * 3
    params = [each.parameter(pair, random(each.shape, 1)) for each in given]
    frozen = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([{"params": params}, {"params": [frozen]}], tp_group=pair, tp_mode=mode)
    empty = Muon([{"params": []}], tp_group=pair, tp_mode=mode)
    assert empty.prepare() is None
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        empty.step()
    return bool((frozen == 1).all()) and frozen not in optimizer.state, len(optimizer.state)


def test_ranks_without_parameters_or_gradients_do_nothing(pool: RankPool) -> None:
    results = pool.run(steps_of_some_ranks, 4)
    assert results == [[(True, 3)] * 2, [(True, 3)] * 2, [(True, 0)] * 2, [(True, 0)] * 2]


# In bfloat16 gram is refused.
NUMBERS_AND_MODES = [
    (dtype, mode) for dtype in ("fp32", "bf16", "fp16") for mode in MODES if (dtype, mode) != ("bf16", "gram")
]

# Replicas.


def weights_of_replicas() -> list[torch.Tensor]:
    """All weights of this rank after three steps. Ranks 0 and 2, and 1 and 3, hold the same shards."""
    pair, found = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2], []
    for dtype, mode in NUMBERS_AND_MODES:
        params = [each.parameter(pair, random(each.shape, 1, torch.float32)) for each in MIXED]
        optimizer = Muon(params, tp_group=pair, tp_mode=mode, chunk_mb=0.003, ns_dtype=dtype)
        for step in range(3):
            for index, (param, each) in enumerate(zip(params, MIXED, strict=True)):
                param.grad = each.cut(random(each.shape, 10 * step + index, torch.float32), pair)
            optimizer.step()
        found += [param.detach() for param in params]
    return found


def test_replicas_stay_equal_bit_by_bit(pool: RankPool) -> None:
    """Shards over the other pair of ranks; and whole weights over all ranks, that each updates by itself."""
    ranks = pool.run(weights_of_replicas, 4)
    for index in range(len(NUMBERS_AND_MODES) * len(MIXED)):
        assert torch.equal(ranks[0][index], ranks[2][index])
        assert torch.equal(ranks[1][index], ranks[3][index])
        if MIXED[index % len(MIXED)].dim is None:
            assert torch.equal(ranks[0][index], ranks[1][index])

"""What ``auto`` chooses from: of published models each alternative is needed somewhere, and ``duplicated`` nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

from megatron_muon.engine import choose, costs
from megatron_muon.engine.choose import choose_plan
from megatron_muon.engine.modes import AUTO, DISTRIBUTED, DUPLICATED, GRAM, OWNER, Machine, Sizes
from megatron_muon.engine.plan import Plan, Weight
from megatron_muon.engine.planner import Policy, make_plan
from megatron_muon.engine.prediction import predict
from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.routing.layout import WHOLE

GPU = Machine.of("cuda")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ITERATIONS = {dtype: Orthogonalizer(iteration("quintic", 5), dtype) for dtype in (FP32, BF16, FP16)}

# (m, n) of the logical matrices of one layer, and the dimension that tensor parallelism divides.
MODELS = {
    "llama3_8b": [(4096, 4096, -1), (4096, 4096, -2), (1024, 4096, -2), (14336, 4096, -2), (4096, 14336, -1)],
    "llama3_70b": [(8192, 8192, -1), (8192, 8192, -2), (1024, 8192, -2), (28672, 8192, -2), (8192, 28672, -1)],
    "nemotron_h_8b": [(4096, 8192, -1), (21504, 4096, -2), (4096, 21504, -1)],
    "qwen3_30b_a3b": [(2048, 4096, -1), (4096, 2048, -2), (512, 2048, -2), (768, 2048, -2), (2048, 768, -1)],
    "qwen3_next_80b_a3b": [(2048, 4096, -1), (512, 2048, -2), (2048, 512, -1)],
    "deepseek_v3": [(7168, 16384, -1), (1536, 7168, -2), (576, 7168, -2), (2048, 7168, -2), (7168, 18432, -1)],
}


def weights_of(matrices: Sequence[tuple[int, int, int]], ranks: int) -> list[Weight]:
    shapes = [((m, n // ranks) if dim == -1 else (m // ranks, n), dim) for m, n, dim in matrices]
    return [Weight(shape, WHOLE, dim, "tp", ranks) for shape, dim in shapes]


def seconds(plan: Plan, dtype: torch.dtype, ranks: int) -> float:
    """Of the busiest rank."""
    sizes = Sizes(*[dtype.itemsize] * 3)
    return max(predict(plan, ITERATIONS[dtype], sizes, {"tp": rank}).seconds(GPU) for rank in range(ranks))


def policy(mode: str, dtype: torch.dtype) -> Policy:
    return Policy(mode, Sizes(*[dtype.itemsize] * 3), 256 << 20, GPU)


def planned(weights: list[Weight], mode: str, dtype: torch.dtype) -> Plan:
    if mode == AUTO:
        return choose_plan(weights, policy(AUTO, dtype), ITERATIONS[dtype])
    return make_plan(weights, policy(mode, dtype), ITERATIONS[dtype])


NEMOTRON = MODELS["nemotron_h_8b"]
NEEDED = [
    (costs, "ALTERNATIVES", OWNER, [(14336, 4096, -2)] * 9, 8, BF16, 1.1),
    (costs, "ALTERNATIVES", GRAM, NEMOTRON[:2] * 3, 4, FP32, 1.04),
    (costs, "ALTERNATIVES", DISTRIBUTED, NEMOTRON[1:2], 8, BF16, 3.0),
    (choose, "WHOLE_PLANS", AUTO, NEMOTRON[1:2], 8, BF16, 3.0),
    (choose, "WHOLE_PLANS", OWNER, NEMOTRON * 9, 8, FP32, 1.01),
    (choose, "WHOLE_PLANS", GRAM, NEMOTRON, 8, FP16, 1.2),
]
"""Where, by which name, what ``duplicated`` replaces, for which matrices, ranks and numbers, how many times longer they
then take at least."""


@pytest.mark.parametrize(("module", "name", "left_out", "matrices", "ranks", "dtype", "longer"), NEEDED)
def test_each_alternative_is_needed_somewhere(
    module: ModuleType,
    name: str,
    left_out: str,
    matrices: list[tuple[int, int, int]],
    ranks: int,
    dtype: torch.dtype,
    longer: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = weights_of(matrices, ranks)
    with_all = seconds(planned(weights, AUTO, dtype), dtype, ranks)
    assert left_out in getattr(module, name)
    others = tuple(DUPLICATED if mode == left_out else mode for mode in getattr(module, name))
    monkeypatch.setattr(module, name, others)
    assert seconds(planned(weights, AUTO, dtype), dtype, ranks) >= longer * with_all


@pytest.mark.parametrize("dtype", ITERATIONS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_duplicated_is_never_better_by_more_than_a_message(model: str, dtype: torch.dtype) -> None:
    """Whole layers, and single matrices: data-parallel ranks may own no more than one."""
    layer = MODELS[model]
    for ranks in (2, 4, 8):
        for matrices in (layer, *([each] for each in layer)):
            weights = weights_of(matrices, ranks)
            taken, other = (seconds(planned(weights, mode, dtype), dtype, ranks) for mode in (AUTO, DUPLICATED))
            assert taken <= other + 1.1 * GPU.latency, (matrices, ranks)

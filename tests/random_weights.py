"""Random weights and their plans: what must hold for any weights is checked on these."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine.modes import DISTRIBUTED, DUPLICATED, GRAM, LOCAL, MODES, OWNER, Machine, Sizes
from megatron_muon.engine.plan import Batch, Chunk, Plan, Weight
from megatron_muon.engine.planner import Policy, make_plan
from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import BlockProducts
from megatron_muon.routing.layout import SCALAR, WHOLE, Budget, MatrixLayout, Section

BUDGETED = MuonConfig().iteration
FLOAT32 = Orthogonalizer(iteration("quintic", 5), torch.float32, products=BlockProducts(8), budgeted=BUDGETED)
BFLOAT16 = Orthogonalizer(iteration("quintic", 5), torch.bfloat16, budgeted=BUDGETED)
SIZES = Sizes(4, 4, 4)
CPU = Machine.of("cpu")
EXACT = (OWNER, GRAM, DUPLICATED, DISTRIBUTED)
PLENTY = 1 << 28
RANKS = (1, 2, 4, 8)
BUDGETS = (None, None, Budget(4), Budget(coefficients="turbo_muon"), Budget(1, "simple"), Budget(coefficients="cubic5"))
SEEDS = range(8)


def plan_of(
    weights: list[Weight],
    mode: str = "auto",
    chunk_bytes: int = PLENTY,
    iteration: Orthogonalizer = FLOAT32,
    machine: Machine = CPU,
) -> Plan:
    return make_plan(weights, Policy(mode, SIZES, chunk_bytes, machine), iteration)


def random_layout(pick: random.Random) -> MatrixLayout:
    """No sections, or some, of names that may come twice, with heads or not, with rows of the scalar rule or not."""
    if pick.random() < 0.3:
        return WHOLE
    head = pick.choice([0, 2, 2, 3])
    treatment = {
        "a": ("orthogonalize", head),
        "b": ("orthogonalize", pick.choice([0, head])),
        "c": ("orthogonalize", head),
        "gate": (SCALAR, 0),
    }
    sections = []
    for _ in range(pick.randrange(1, 5)):
        name = pick.choice(list(treatment))
        rule, m = treatment[name]
        sections.append(Section(name, pick.randrange(1, 4) * (m or 1), rule, m))
    return MatrixLayout("random", tuple(sections))


def random_weight(pick: random.Random, ranks: int) -> Weight:
    """Whole, or cut by rows or columns, by whole periods or through them; some are stacks of experts."""
    layout, periods, columns = random_layout(pick), pick.randrange(1, 5), pick.randrange(1, 12)
    heads = any(section.matrix_rows for section in layout.sections)
    stack = pick.choice([(), (), (), (1,), (3,)])
    layout = layout.stack() if stack else layout
    rows, dim = layout.period * periods, pick.choice([0, -1, -2, -2]) if ranks > 1 else 0
    if dim == -2 and not (heads and stack) and pick.random() < 0.8:
        # Whole periods over all ranks, and in most cases not on each.
        fitting = [part for part in range(1, 3 * layout.period) if part * ranks % layout.period == 0]
        rows = pick.choice([part for part in fitting if part % layout.period] or fitting)
    group = pick.choice(["tp", "expert tp"]) if dim else ""
    return Weight((*stack, rows, columns), layout, dim, group, ranks if dim else 1)


def random_weights(seed: int, ranks: int) -> list[Weight]:
    """Some of them several times, as the layers of a model, of which some may have a budget of their own."""
    pick = random.Random(seed * 31 + ranks)
    different = [random_weight(pick, ranks) for _ in range(pick.randrange(1, 7))]
    repeated = [weight for weight in different for _ in range(pick.choice([1, 1, 2, 5]))]
    return [with_budget(weight, pick.choice(BUDGETS)) for weight in repeated]


def with_budget(weight: Weight, budget: Budget | None) -> Weight:
    return replace(weight, layout=replace(weight.layout, budget=budget))


def modes_for(weights: list[Weight]) -> list[str]:
    """All; without ``blockwise``, which refuses them, for shards that cut periods."""
    return [mode for mode in MODES if mode != "blockwise" or not any(weight.is_broken for weight in weights)]


def random_plans(seed: int, ranks: int) -> Iterator[tuple[Plan, int]]:
    """In each mode with several bounds of chunks."""
    weights = random_weights(seed, ranks)
    for mode in modes_for(weights):
        for bound in (1, 900, PLENTY):
            yield plan_of(weights, mode, bound), bound


def batches_of(plan: Plan) -> Iterator[tuple[Chunk, Batch]]:
    for chunk in plan.chunks:
        for batch in chunk.batches:
            yield chunk, batch


def per_rank(weight: Weight, chunk: Chunk) -> bool:
    """Whether an item is about the matrices of one rank's shard, and not about those of the whole weight."""
    return chunk.mode == LOCAL and weight.dim != 0

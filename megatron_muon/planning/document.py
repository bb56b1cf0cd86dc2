"""The plan as plain data, for ``--json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine import MODES
from megatron_muon.engine.modes import BLOCKWISE
from megatron_muon.engine.prediction import Choice
from megatron_muon.planning.accounts import MUON, OTHERS
from megatron_muon.planning.cost import RankLoad
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.survey import Plan, StagePlan
from megatron_muon.planning.timing import Times
from megatron_muon.routing.layout import SCALAR
from megatron_muon.routing.report import Route


def to_document(plan: Plan, durations: Durations | None = None) -> dict[str, Any]:
    """Everything in ``plan``, of types that JSON has; docs/plan.md explains each entry."""
    return {
        "device": None if durations is None else _device(durations),
        "layout": {**asdict(plan.layout), "data": plan.layout.data, "expert_data": plan.layout.expert_data},
        "layer_wise": plan.layer_wise,
        "total_parameters": plan.total_parameters,
        "by_optimizer": by_optimizer(plan.routes, plan.options),
        "multi_token_prediction": {
            "total_parameters": sum(route.numel for route in plan.mtp_routes),
            "by_optimizer": by_optimizer(plan.mtp_routes, plan.options),
        },
        "classes": [_class(route, count, plan) for route, count in Counter([*plan.routes, *plan.mtp_routes]).items()],
        "stages": [
            {
                "stage": stage.number,
                "parameters": stage.parameters,
                "padding": stage.padding,
                **_figures(stage.loads, plan.options.tp_mode),
            }
            for stage in plan.stages
        ],
        "all_ranks": _figures(plan.loads, plan.options.tp_mode),
        "fullest_rank": _fullest(plan.fullest),
        "newton_schulz": _iteration(plan),
        "tensor_parallel_modes": {mode: _mode(plan, mode) for mode in MODES},
        "blockwise_period": _period(plan),
        "modes_not_possible": plan.refusals,
        "auto": [_choice(choice, count) for choice, count in sorted(plan.choices.items())],
        "step": {
            "tokens": plan.step.tokens,
            "active_parameters": plan.step.active_parameters,
            "model_flops": plan.step.model_flops,
            "model_flops_per_rank": plan.step.model_flops / plan.layout.world,
            "optimizer_share": optimizer_share(plan, plan.options.tp_mode),
        },
        "left_out": plan.left_out,
        "notes": plan.notes,
    }


def by_optimizer(routes: Iterable[Route], options: MuonConfig) -> dict[str, int]:
    """Parameters that each optimizer's rule updates; rows of Muon's weights under the scalar rule count as scalar."""
    routes = list(routes)
    scalar = sum(route.scalar_numel for route in routes)
    return {"muon": sum(route.numel for route in routes) - scalar, options.scalar_optimizer: scalar}


def over_ranks(loads: Sequence[RankLoad], value: Callable[[RankLoad], float]) -> dict[str, float]:
    """Mean and greatest of a value over all ranks."""
    ranks = sum(load.ranks for load in loads)
    return {"mean": sum(value(load) * load.ranks for load in loads) / ranks, "max": max(value(load) for load in loads)}


def work_in(mode: str, what: str = "flops") -> Callable[[RankLoad], float]:
    """Of a rank in a tensor-parallel mode, for :func:`over_ranks`.

    Args:
        mode: of tensor parallelism.
        what: ``flops`` of Newton-Schulz, ``bytes`` that it sends to others, or ``collectives``.
    """
    return lambda load: getattr(load.work[mode], what)


@dataclass(frozen=True)
class Durations:
    """How long a step takes on a device.

    Attributes:
        rates: of the device.
        modes: for each mode of tensor parallelism the times of the rank that has most to do.
        left_out: what of the step is not timed.
    """

    rates: Rates
    modes: dict[str, Times]
    left_out: list[str]

    @classmethod
    def of(cls, plan: Plan, rates: Rates) -> Durations:
        """Those of a plan. The busiest rank is the one with most operations, or with most operations and bytes."""
        flops = rates.numbers["bfloat16.flops"]  # how much more of one than of the other: types of numbers matter less
        near, far = (rates.numbers[f"{link}.bytes"] for link in ("within", "between"))

        def rough(load: RankLoad, mode: str) -> float:
            lent, work = load.lent_bytes[mode], load.work[mode]
            return work.flops / flops + (work.bytes - lent) / near + lent / far

        found = {}
        for mode in possible_modes(plan):
            computes = max(plan.loads, key=lambda load: load.work[mode].flops)
            sends = max(plan.loads, key=lambda load: rough(load, mode))
            busy = [computes] if computes is sends else [computes, sends]
            found[mode] = max((load.times(mode, plan.layout, rates) for load in busy), key=lambda times: times.seconds)
        varies = plan.optimizer.removeprefix("dist_") != "muon" or plan.options.variant != "none"
        return cls(rates, found, ["what the variant adds to plain Muon"] if varies else [])


def _device(durations: Durations) -> dict[str, Any]:
    parts = ("seconds", "products", "passes", "within", "between", "launches")
    return {
        **durations.rates.entry(),
        "milliseconds": {
            mode: {("total" if part == "seconds" else part): 1e3 * getattr(times, part) for part in parts}
            for mode, times in durations.modes.items()
        },
        "left_out": durations.left_out,
        "operations": {mode: times.operations for mode, times in durations.modes.items()},
    }


def possible_modes(plan: Plan) -> list[str]:
    """The tensor-parallel modes that every stage can be updated in."""
    return [mode for mode in MODES if mode not in plan.refusals]


def optimizer_share(plan: Plan, mode: str) -> float:
    """Newton-Schulz of the busiest rank as a share of all operations of a step, 0 to 1."""
    busiest = over_ranks(plan.loads, work_in(mode))["max"]
    total = busiest + plan.step.model_flops / plan.layout.world
    return busiest / total if total else 0.0


def _figures(loads: Sequence[RankLoad], mode: str) -> dict[str, Any]:
    flops = over_ranks(loads, work_in(mode))
    return {
        "ranks": sum(load.ranks for load in loads),
        "parameter_bytes": over_ranks(loads, lambda load: load.parameter_bytes),
        "optimizer_state_bytes": over_ranks(loads, lambda load: load.state_bytes),
        "step_bytes": over_ranks(loads, lambda load: load.step_bytes),
        "newton_schulz_flops": flops,
        "lent_bytes": over_ranks(loads, lambda load: load.lent_bytes[mode]),
        "imbalance": flops["max"] / flops["mean"] if flops["mean"] else 1.0,
    }


def _fullest(stage: StagePlan) -> dict[str, Any]:
    load = stage.fullest
    account = load.account
    return {
        "stage": stage.number,
        "rank": load.rank,
        "parameters": {MUON: stage.muon_parameters, OTHERS: stage.parameters - stage.muon_parameters},
        "device_bytes": account.total(),
        "host_bytes": account.total(on_host=True),
        "bytes": [{**asdict(entry), "bytes": size} for entry, size in account.entries],
    }


def _mode(plan: Plan, mode: str) -> dict[str, Any] | None:
    if mode not in possible_modes(plan):
        return None
    return {
        "newton_schulz_flops": over_ranks(plan.loads, work_in(mode)),
        "exchanged_bytes": over_ranks(plan.loads, work_in(mode, "bytes")),
        "collectives": over_ranks(plan.loads, work_in(mode, "collectives")),
        "optimizer_share": optimizer_share(plan, mode),
    }


def of_period(options: MuonConfig, what: str) -> Callable[[RankLoad], float]:
    """As :func:`work_in`, on average over the steps of ``--muon-blockwise-period``."""
    period, whole, block = options.blockwise_period, work_in(options.tp_mode, what), work_in(BLOCKWISE, what)
    return lambda load: (whole(load) + (period - 1) * block(load)) / period


def _period(plan: Plan) -> dict[str, Any] | None:
    if plan.options.blockwise_period == 1:
        return None
    named = {"newton_schulz_flops": "flops", "exchanged_bytes": "bytes", "collectives": "collectives"}
    means = {name: over_ranks(plan.loads, of_period(plan.options, what)) for name, what in named.items()}
    return {"steps": plan.options.blockwise_period, **means}


def _iteration(plan: Plan) -> dict[str, Any]:
    precision = plan.planner.precision
    restarts = plan.planner.orthogonalizer.restarts
    return {
        "dtype": dtype_name(precision.iteration),
        "gram_restarts": None if restarts is None else list(restarts),
        "wire_dtype": dtype_name(precision.wire),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _choice(choice: Choice, count: int) -> dict[str, Any]:
    mode, rows, columns = choice
    return {"mode": mode, "rows": rows, "columns": columns, "matrices": count}


def _class(route: Route, count: int, plan: Plan) -> dict[str, Any]:
    options, budget = plan.options, route.layout.budget
    return {
        "pattern": route.name,
        "count": count,
        "shape": list(route.shape),
        "parameters": count * route.numel,
        "optimizer": "muon" if route.muon else options.scalar_optimizer,
        "rule": _rule(route),
        "reason": route.reason,
        "override": route.override,
        "budget": None if budget is None else asdict(budget),
        "budget_rules": list(route.budget_rules),
        "divided": route.divided,
        "blocks": [
            {**asdict(block), "scale_factor": route.scale(block, options, plan.optimizer)} for block in route.blocks
        ],
    }


def _rule(route: Route) -> str:
    rules = {block.rule for block in route.blocks} or {SCALAR}
    return "mixed" if len(rules) > 1 else rules.pop()

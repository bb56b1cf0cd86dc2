"""The plan as text, for ``python -m megatron_muon plan``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_muon.choices import DECOUPLED
from megatron_muon.config import flag
from megatron_muon.engine import MODES
from megatron_muon.engine.modes import LOCAL
from megatron_muon.errors import ranges
from megatron_muon.planning.accounts import MUON, OTHERS, gib
from megatron_muon.planning.document import (
    Durations,
    dtype_name,
    of_period,
    optimizer_share,
    over_ranks,
    possible_modes,
    work_in,
)
from megatron_muon.planning.rates import KINDS
from megatron_muon.planning.survey import Plan
from megatron_muon.routing import report
from megatron_muon.routing.report import Route, table


def render(plan: Plan, durations: Durations | None = None) -> str:
    """The routing report, what each rank holds and does, the optimizer's share of a step, and how long that takes."""

    def routing(routes: Sequence[Route]) -> str:
        return report.render(routes, plan.options, optimizer=plan.optimizer)

    parts = [_layout(plan), routing(plan.routes), f"{plan.total_parameters:,} parameters"]
    if plan.mtp_routes:
        extra = sum(route.numel for route in plan.mtp_routes)
        parts += ["", "Multi-token prediction, besides:", routing(plan.mtp_routes)]
        parts += [f"{extra:,} parameters"]
    parts += ["", *_ranks(plan), "", *_bytes(plan), "", *_modes(plan), "", *_step(plan)]
    parts += [] if durations is None else ["", *_durations(plan, durations)]
    notes = list(plan.notes)
    if plan.left_out:
        notes.append(f"Not in the plan, since they change no weight: {', '.join(plan.left_out)}.")
    return "\n".join([*parts, *([""] if notes else []), *notes])


def _layout(plan: Plan) -> str:
    layout = plan.layout
    sizes = [
        ("tensor", layout.tensor),
        ("pipeline", layout.pipeline),
        ("context", layout.context),
        ("expert", layout.expert),
        ("expert tensor", layout.expert_tensor if layout.expert_tensor != layout.tensor else 1),
    ]
    named = [f"{name} {size}" for name, size in sizes if size > 1]
    replicas = f"{layout.data} replicas"
    if (layout.expert, layout.expert_tensor) != (1, layout.tensor):
        replicas += f" ({layout.expert_data} of each expert)"
    kind = "layer-wise Muon" if plan.layer_wise else "plain Muon"
    return f"{layout.world} ranks: {', '.join([*named, replicas])}; {kind}\n"


def _ranks(plan: Plan) -> list[str]:
    """One line for pipeline stages that are alike."""
    mode = plan.options.tp_mode
    numbers: dict[tuple[str, ...], list[int]] = {}
    for stage in plan.stages:
        state = over_ranks(stage.loads, lambda load: load.state_bytes)
        flops = over_ranks(stage.loads, work_in(mode))
        row = (
            str(sum(load.ranks for load in stage.loads)),
            f"{stage.parameters:,}",
            gib(stage.loads[0].parameter_bytes),
            gib(state["mean"]),
            gib(state["max"]),
            gib(over_ranks(stage.loads, lambda load: load.step_bytes)["max"]),
            _tera(flops["mean"]),
            _tera(flops["max"]),
        )
        numbers.setdefault(row, []).append(stage.number)
    rows = [(ranges(stages), *row) for row, stages in numbers.items()]
    header = (
        "stage",
        "ranks of each",
        "parameters of a rank",
        "their bytes",
        "optimizer state, mean",
        "greatest",
        "a step besides, greatest",
        "Newton-Schulz, mean",
        "greatest",
    )
    return [*table(header, rows), _balance(plan), *_padding(plan)]


def _padding(plan: Plan) -> list[str]:
    """What buffers have between owners, for runs that lay them out."""
    padding = sum(stage.padding for stage in plan.stages)
    muon = sum(w.local_numel for stage in plan.stages for w in stage.weights if w.layout is not None) or 1
    if not padding:
        decoupled = plan.options.layer_wise_param_layout == DECOUPLED
        return ["No padding between owners in the buffers of weights and gradients."] if decoupled else []
    return [
        f"Padding between owners in the buffers of weights, and again of gradients: {padding / muon:.1%} of Muon's "
        f"elements, up to {max(stage.padding for stage in plan.stages):,} on a rank; none with "
        f"{flag('layer_wise_param_layout')} {DECOUPLED}."
    ]


def _balance(plan: Plan) -> str:
    if not plan.layer_wise:
        return (
            f"Plain Muon: the {plan.layout.data} replicas of a weight all hold its state and do the same work. "
            "--use-distributed-optimizer gives each weight one owner."
        )
    flops = over_ranks(plan.loads, work_in(plan.options.tp_mode))
    if not flops["mean"]:
        return "No weight is orthogonalized."
    ratio = flops["max"] / flops["mean"]
    lent = max(load.lent_bytes.get(plan.options.tp_mode, 0.0) for load in plan.loads)
    return (
        f"Layer-wise Muon: the busiest rank does {ratio:.2f} times the mean work of all ranks; the others wait for it."
        + (f"\nRanks orthogonalize for one another: a rank sends up to {gib(lent)} for that." if lent else "")
    )


def _bytes(plan: Plan) -> list[str]:
    """One line for each kind of bytes of the rank that has most."""
    stage, scalar = plan.fullest, plan.options.scalar_optimizer.capitalize()
    account = stage.fullest.account
    parameters = {MUON: stage.muon_parameters, OTHERS: stage.parameters - stage.muon_parameters}

    def row(name: str, kinds: Sequence[str], on_host: bool) -> tuple[str, ...]:
        sizes = {whose: account.total(*kinds, whose=whose, on_host=on_host) for whose in parameters}
        each = [f"{size / parameters[whose]:.3f}" if size else "" for whose, size in sizes.items()]
        total = account.total(*kinds, on_host=on_host)
        return name, *each, f"{total / stage.parameters:.3f}", gib(total)

    kinds = dict.fromkeys((entry.on_host, entry.kind) for entry, _ in account.entries)
    rows = [row(f"{kind}, on the host" if on_host else kind, (kind,), on_host) for on_host, kind in kinds]
    rows.append(row("all on the device", (), False))
    header = (
        f"bytes a parameter, rank {stage.fullest.rank} of stage {stage.number} (the fullest)",
        f"of Muon's {parameters[MUON]:,}",
        f"of {scalar}'s {parameters[OTHERS]:,}",
        "of all",
        "in all",
    )
    shared = "Data-parallel ranks share state: a rank's bytes are over all parameters that it has. "
    return [
        *table(header, rows),
        f"{shared if plan.layer_wise else ''}Activations are not counted.",
    ]


def _modes(plan: Plan) -> list[str]:
    """One line for each mode of tensor parallelism, and what ``auto`` chose."""
    if plan.layout.tensor == plan.layout.expert_tensor == 1:
        return ["No tensor parallelism: every matrix is whole on its ranks, and nothing is exchanged for it."]
    rows = [_mode(plan, mode) for mode in MODES]
    header = (
        flag("tp_mode"),
        "Newton-Schulz, mean",
        "greatest",
        "sent to tensor-parallel ranks, mean",
        "greatest",
        "collectives",
        "share of a step",
    )
    lines = table(header, rows)
    precision, period = plan.planner.precision, plan.options.blockwise_period
    if period > 1:
        means = {what: over_ranks(plan.loads, of_period(plan.options, what))["mean"] for what in ("flops", "bytes")}
        lines.append(
            f"{flag('blockwise_period')} {period}: one step in {period} as {plan.options.tp_mode}, the others as "
            f"blockwise; on average {_tera(means['flops'])} and {gib(means['bytes'])} sent."
        )
    return [
        *lines,
        *plan.refusals.values(),
        "blockwise is another optimizer: each shard counts as a matrix of its own.",
        "",
        *table(("auto", "matrices", "which"), _choices(plan)),
        f"For an accelerator with NVLink; Newton-Schulz in {dtype_name(precision.iteration)}, matrices sent in "
        f"{dtype_name(precision.wire)}.",
    ]


def _mode(plan: Plan, mode: str) -> tuple[str, ...]:
    name = f"{mode} (chosen)" if mode == plan.options.tp_mode else mode
    if mode not in possible_modes(plan):
        return (name, "not possible, see below", "", "", "", "", "")
    flops, sent = over_ranks(plan.loads, work_in(mode)), over_ranks(plan.loads, work_in(mode, "bytes"))
    collectives = over_ranks(plan.loads, work_in(mode, "collectives"))["max"]
    return (
        name,
        _tera(flops["mean"]),
        _tera(flops["max"]),
        gib(sent["mean"]),
        gib(sent["max"]),
        f"{collectives:.0f}",
        f"{optimizer_share(plan, mode):.2%}",
    )


def _choices(plan: Plan) -> list[tuple[str, ...]]:
    """What ``auto`` does with the matrices of the whole model: a line for each mode that it uses."""
    lines: list[tuple[str, ...]] = []
    for mode in (*MODES, LOCAL):
        found = [(count, rows, columns) for (its, rows, columns), count in plan.choices.items() if its == mode]
        if found:
            shapes = ", ".join(f"{count:,} of {rows} x {columns}" for count, rows, columns in sorted(found)[::-1])
            name = "whole on a rank" if mode == LOCAL else mode
            lines.append((name, f"{sum(count for count, *_ in found):,}", shapes))
    return lines


def _step(plan: Plan) -> list[str]:
    step, mode = plan.step, plan.options.tp_mode
    busiest = over_ranks(plan.loads, work_in(mode))["max"]
    return [
        f"A step of {step.tokens:,} tokens, each through {step.active_parameters / 1e9:.2f} billion parameters: "
        f"{_tera(step.model_flops / plan.layout.world)} a rank,",
        f"forward and backward; {_tera(busiest)} of Newton-Schulz on the busiest rank. Its share of a step: "
        f"{optimizer_share(plan, mode):.2%},",
        "if both run at one rate of operations and nothing waits for communication.",
    ]


def _durations(plan: Plan, durations: Durations) -> list[str]:
    """Milliseconds of each mode, and where the rates are from."""
    rates = durations.rates
    parts = ("seconds", "products", "passes", "within", "between", "launches")
    rows = [
        (
            f"{mode} (chosen)" if mode == plan.options.tp_mode else mode,
            *(f"{1e3 * getattr(times, part):.2f}" for part in parts),
        )
        for mode, times in durations.modes.items()
    ]
    header = (
        "ms of the busiest rank",
        "all",
        "products",
        "passes over memory",
        "waiting in the node",
        "for other nodes",
        "for the host",
    )
    kernels = plan.planner.orthogonalizer.products.name
    of_kind = {kind: [name for name, (its, _) in rates.sources.items() if its == kind] for kind in KINDS}
    return [
        *table(header, rows),
        *(f"Not timed: {what}." for what in durations.left_out),
        f"On {rates.name}; products by {kernels}, each elementwise pass by one kernel. Rates that are",
        *(f"  {kind}: {', '.join(names)}" for kind, names in of_kind.items() if names),
    ]


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.2f} TFLOP"

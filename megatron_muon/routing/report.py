"""The table of who updates what, printed before training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_muon.config import MuonConfig, flag
from megatron_muon.errors import in_python, sizes
from megatron_muon.orthogonalize.scale import MOONLIGHT_HIDDEN, scale_factor
from megatron_muon.routing.annotate import BUDGET_RULES_ATTRIBUTE, OVERRIDE_ATTRIBUTE
from megatron_muon.routing.layout import BALLS, MSIGN, SCALAR, STIEFEL, WHOLE, Block, MatrixLayout, layout_of
from megatron_muon.routing.predicate import exclusion_reason
from megatron_muon.routing.wrappers import pattern


@dataclass(frozen=True)
class Route:
    """What happens to one weight.

    Attributes:
        name: its name without wrappers, with ``*`` for layer and expert numbers.
        shape: of the whole weight (before the tensor-parallel cut).
        divided: what tensor parallelism divides (``rows``, ``columns``), with the number of shards; empty if nothing.
        blocks: its logical matrices, if Muon updates it.
        reason: why Muon does not update it, if it does not.
        override: the ``--muon-param-rule`` that decided, if one did.
        layout: its layout, if Muon updates it.
        hidden_size: of the model; 0 if it is not known.
        budget_rules: those that decided about its budget.
    """

    name: str
    shape: tuple[int, ...]
    divided: str
    blocks: tuple[Block, ...]
    reason: str
    override: str = ""
    layout: MatrixLayout = WHOLE
    hidden_size: int = 0
    budget_rules: tuple[str, ...] = ()

    def scale(self, block: Block, options: MuonConfig, optimizer: str = "muon") -> float | None:
        """Factor on the direction of the matrices of a block; None where there is none, or it cannot be told here."""
        hidden = options.scale_mode == MOONLIGHT_HIDDEN and not self.hidden_size
        if block.rule == SCALAR or self.layout.direction == STIEFEL or hidden:
            return None
        if self.layout.direction in BALLS:
            return self.layout.ball_factor(block.columns, options.ball_radius)
        if optimizer.removeprefix("dist_") == "spectral_sphere":
            return options.sphere_radius * (block.rows / block.columns) ** 0.5 or None
        if options.variant == "hyperball":
            return None  # the norm of each
        factor = scale_factor(options.scale_mode, block.rows, block.columns, self.hidden_size)
        return factor * options.extra_scale_factor

    @property
    def muon(self) -> bool:
        """Whether Muon updates it."""
        return not self.reason

    @property
    def numel(self) -> int:
        """Number of elements of the whole weight."""
        return math.prod(self.shape)

    @property
    def scalar_numel(self) -> int:
        """Number of elements that the scalar optimizer's rule updates."""
        if not self.muon:
            return self.numel
        return sum(block.numel for block in self.blocks if block.rule == SCALAR)


def collect(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    options: MuonConfig,
    *,
    tp_size: int = 1,
    expert_tp_size: int = 1,
    hidden_size: int = 0,
) -> list[Route]:
    """One :class:`Route` for each trainable parameter, after :func:`megatron_muon.routing.annotate`."""
    return [
        _route(name, param, expert_tp_size if getattr(param, "expert_tp", False) else tp_size, hidden_size)
        for name, param in named_parameters
        if param.requires_grad
    ]


def _route(name: str, param: torch.nn.Parameter, ranks: int, hidden_size: int) -> Route:
    shape, divided = list(param.shape), ""
    dim = getattr(param, "partition_dim", -1)
    if getattr(param, "tensor_model_parallel", False) and ranks > 1 and 0 <= dim < len(shape):
        axis = dim + len(shape) - 2 if len(shape) > 2 and hasattr(param, "matrix_layout") else dim
        shape[axis] *= ranks
        divided = f"{'rows' if dim == 0 else 'columns'} / {ranks}"
    reason = exclusion_reason(param)
    layout = layout_of(param) if reason is None else WHOLE
    blocks = layout.blocks(tuple(shape)) if reason is None else []
    override, budget_rules = getattr(param, OVERRIDE_ATTRIBUTE, ""), getattr(param, BUDGET_RULES_ATTRIBUTE, ())
    return Route(
        pattern(name), tuple(shape), divided, tuple(blocks), reason or "", override, layout, hidden_size, budget_rules
    )


def render(routes: Sequence[Route], options: MuonConfig, *, notes: Sequence[str] = (), optimizer: str = "muon") -> str:
    """The table as text, with notes under it; equal routes are counted together."""
    header = ("weight", "count", "parameters", "shape", "divided", "optimizer", "as", "scale")
    rows = [_row(route, count, options, optimizer) for route, count in Counter(routes).items()]
    lines = [*table(header, rows), *_totals(routes, options), *_overrides(routes), *notes]
    return "\n".join(lines)


def told_in_python(routes: Iterable[Route], options: MuonConfig, *, notes: Sequence[str] = ()) -> str:
    """Share and table, with arguments in place of flags."""
    routes = [replace(route, reason=in_python(route.reason)) for route in routes]
    return f"{share(routes, options)}\n{in_python(render(routes, options, notes=notes))}"


def share(routes: Sequence[Route], options: MuonConfig) -> str:
    """How much of the model Muon updates."""
    total = sum(route.numel for route in routes)
    mine = total - sum(route.scalar_numel for route in routes)
    share = f" ({mine / total:.1%})" if total else ""
    return f"muon updates {mine:,} of {total:,} parameters{share}, {options.scalar_optimizer} the others"


def words(routes: Iterable[Route], options: MuonConfig) -> dict[str, str]:
    """Who updates the weights of each name, and as which matrices."""
    found: dict[str, dict[str, None]] = {}
    for route in dict.fromkeys(routes):
        *_, by, detail, _ = _row(route, 1, options, "muon")
        found.setdefault(route.name, {})[f"{by}: {detail}"] = None
    return {name: "; ".join(each) for name, each in found.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, with a rule under the header."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _row(route: Route, count: int, options: MuonConfig, optimizer: str) -> tuple[str, ...]:
    by = "muon" if route.muon else options.scalar_optimizer
    detail = ", ".join(_matrices(block, options) for block in route.blocks) if route.muon else route.reason
    if route.layout.direction != MSIGN:
        detail = f"{route.layout.direction}: {detail}"
    if route.layout.budget is not None:
        detail += f" ({route.layout.budget})"
    factors = [route.scale(block, options, optimizer) for block in route.blocks]
    scales = ["-" if factor is None else f"{factor:.3g}" for factor in factors]
    scale = scales[0] if len(set(scales)) == 1 else ", ".join(scales)
    parameters = f"{count * route.numel:,}"
    return (route.name, str(count), parameters, sizes(route.shape), route.divided, by, detail, scale)


def _matrices(block: Block, options: MuonConfig) -> str:
    shape = sizes((block.rows, block.columns))
    if block.rule == SCALAR:
        return f"{block.name} {shape} {options.scalar_optimizer}"
    return f"{block.name} {shape}" if block.count == 1 else f"{block.name} {block.count} of {shape}"


def _totals(routes: Sequence[Route], options: MuonConfig) -> list[str]:
    mine = [route for route in routes if route.muon]
    rest = [route for route in routes if not route.muon]
    rows = sum(route.scalar_numel for route in mine)
    within = f", {rows:,} in rows of muon's weights" if rows else ""
    scalar = sum(route.numel for route in rest) + rows
    return [
        f"muon: {sum(route.numel for route in mine) - rows:,} parameters in {len(mine)} weights",
        f"{options.scalar_optimizer}: {scalar:,} parameters in {len(rest)} weights{within}",
    ]


def _overrides(routes: Sequence[Route]) -> list[str]:
    """Which rules of the user decided, and about how many weights."""
    counts = Counter(rule for route in routes for rule in (route.override, *route.budget_rules) if rule)
    return [f"{flag('param_rule')} {rule}: {count} weights" for rule, count in counts.items()]

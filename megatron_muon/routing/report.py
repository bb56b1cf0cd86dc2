"""The table of who updates what, printed before training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_muon.routing.layout import MatrixLayout, layout_of
from megatron_muon.routing.predicate import exclusion_reason

__all__ = ["Route", "collect", "render"]


@dataclass(frozen=True)
class Route:
    """What happens to one weight.

    Attributes:
        name: its name without wrappers, with ``*`` for layer and expert numbers.
        shape: of the whole weight (before the tensor-parallel cut).
        muon: whether Muon updates it.
        detail: its logical matrices, or why Muon does not update it.
    """

    name: str
    shape: tuple[int, ...]
    muon: bool
    detail: str

    @property
    def numel(self) -> int:
        """Number of elements of the whole weight."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def collect(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    split_qkv: bool,
    tp_group: torch.distributed.ProcessGroup | None,
    expert_tp_group: torch.distributed.ProcessGroup | None,
) -> list[Route]:
    """One :class:`Route` for each trainable parameter of this rank."""
    routes = []
    for name, param in named_parameters:
        if not param.requires_grad:
            continue
        shape = tuple(param.shape)
        group = expert_tp_group if getattr(param, "expert_tp", False) else tp_group
        if getattr(param, "tensor_model_parallel", False) and group is not None:
            dim = getattr(param, "partition_dim", -1)
            shape = tuple(size * group.size() if i == dim else size for i, size in enumerate(shape))
        reason = exclusion_reason(param)
        detail = reason or _matrices(layout_of(param, split_qkv=split_qkv), shape)
        routes.append(Route(_pattern(name), shape, reason is None, detail))
    return routes


def render(routes: Sequence[Route], *, scalar_optimizer: str, notes: Sequence[str] = ()) -> str:
    """The table as text.

    Args:
        routes: of the whole model; equal ones are counted together.
        scalar_optimizer: name of the optimizer of the rest.
        notes: lines to print under it.
    """
    counts: dict[Route, int] = {}
    for route in routes:
        counts[route] = counts.get(route, 0) + 1
    header = ("weight", "count", "shape", "optimizer", "as")
    rows = [
        (route.name, str(count), _times(route.shape), "muon" if route.muon else scalar_optimizer, route.detail)
        for route, count in counts.items()
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for name, muon in (("muon", True), (scalar_optimizer, False)):
        mine = [route for route in routes if route.muon is muon]
        lines.append(f"{name}: {sum(route.numel for route in mine):,} parameters in {len(mine)} weights")
    return "\n".join([*lines, *notes])


def _pattern(name: str) -> str:
    """``module.decoder.layers.3.mlp.weight`` -> ``decoder.layers.*.mlp.weight``; ``weight12`` -> ``weight*``."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return re.sub(r"(?<=\.)\d+(?=\.|$)|(?<=weight)\d+$", "*", name)


def _matrices(layout: MatrixLayout, shape: tuple[int, ...]) -> str:
    m, n = shape
    return ", ".join(f"{name} {_times((rows, columns))}" for name, rows, columns in layout.block_shapes(m, n))


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

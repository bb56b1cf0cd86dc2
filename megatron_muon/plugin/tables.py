"""The numbers that the ranks of a model have found in a measured step, brought together weight by weight.

Each rank knows the matrices that it has parts of. The rows of the table are agreed on when the optimizer is built; a
step's numbers are added up in one tensor and compared in another, so that two all-reduces tell every rank all.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.config import MuonConfig
from megatron_muon.monitor.schema import STATS, TIMES
from megatron_muon.monitor.table import Row, Spread
from megatron_muon.optimizers.findings import Sample
from megatron_muon.orthogonalize.defect import random_defect
from megatron_muon.routing import global_names, layout_of
from megatron_muon.routing.layout import MSIGN, SCALAR, MatrixLayout
from megatron_muon.routing.predicate import is_expert_parallel
from megatron_muon.routing.report import Route, collect

Named = tuple[str, torch.nn.Parameter]


def numbered(chunk: torch.nn.Module, experts: Any) -> Iterator[Named]:
    """As :func:`global_names`, with experts numbered over the whole model, too.

    Args:
        chunk: of the model on this rank.
        experts: the expert-parallel group, whose ranks have equally many experts; None for one rank.
    """
    named = [*global_names(chunk)]
    if experts is None or experts.size() == 1:
        yield from named
        return
    parts = [_EXPERT.fullmatch(name) if is_expert_parallel(param) else None for name, param in named]
    local: dict[tuple[str, str], int] = {}
    for found in filter(None, parts):
        local[found[1], found[3]] = max(local.get((found[1], found[3]), 0), int(found[2]) + 1)
    for (name, param), part in zip(named, parts, strict=True):
        if part is not None:
            name = f"{part[1]}{int(part[2]) + experts.rank() * local[part[1], part[3]]}{part[3]}"
        yield name, param


_EXPERT = re.compile(r"(.*\.local_experts\.|.*\.weight)(\d+)(\..*|)")


def routes_of(
    muon: MuonConfig, model_chunks: Sequence[torch.nn.Module], groups: Any, ranks: Ranks
) -> list[tuple[str, Route]]:
    """The routes of all weights of the model, of all pipeline stages and experts, with their names; on all ranks."""
    from megatron.core.utils import get_model_config

    routes: list[tuple[str, Route]] = []
    for chunk in model_chunks:
        dense: list[Named] = []
        experts: list[Named] = []
        for name, param in numbered(chunk, getattr(groups, "ep", None)):
            if param.requires_grad:
                (experts if getattr(param, "expert_tp", False) else dense).append((name, param))
        its_routes = functools.partial(
            collect,
            options=muon,
            tp_size=groups.tp.size(),
            expert_tp_size=getattr(groups, "expt_tp", groups.tp).size(),
            hidden_size=getattr(get_model_config(chunk), "hidden_size", 0),
        )
        # One rank speaks for each set of replicas and shards.
        for named, replicas in ((dense, ("tp", "dp_cp")), (experts, ("expt_tp", "expt_dp"))):
            if _is_first(groups, *replicas):
                routes += zip((name for name, _ in named), its_routes(named), strict=True)
    return [route for part in ranks.gather(lambda: routes) for route in part]


def _is_first(groups: Any, *names: str) -> bool:
    """Whether this rank is the first of each of these groups; a collection made by hand need not have them all."""
    found = [getattr(groups, name, None) for name in names]
    return all(group is None or group.rank() == 0 for group in found)


def _row(name: str, layout: MatrixLayout, block: str) -> str:
    return f"{name}[{block}]" if len(layout.indices) > 1 else name


@dataclass(frozen=True)
class Numbers:
    """On the host, of all ranks; NaN: not measured.

    Attributes:
        names: of rows, classes or layers.
        matrices: of each, (rows,), float64.
        spreads: least, mean, largest: (rows, len(STATS), 3), float64.
    """

    names: tuple[str, ...]
    matrices: torch.Tensor
    spreads: torch.Tensor

    def rows(self) -> dict[str, Row]:
        """In plain Python: of ten thousand rows this is a tenth of a second, and half of it the collector's."""
        spreads = [*zip(*(part.reshape(-1).tolist() for part in self.spreads.unbind(dim=-1)), strict=True)]
        found, starts = {}, range(0, len(spreads), len(STATS))
        for name, matrices, start in zip(self.names, self.matrices.tolist(), starts, strict=True):
            known = zip(STATS, spreads[start : start + len(STATS)], strict=True)
            found[name] = Row(int(matrices), {stat: its for stat, its in known if its[1] == its[1]})
        return found

    def by(self, kind: Callable[[str], str]) -> Numbers:
        """Of rows of one kind together: each matrix counts as much as every other."""
        names, index = _kinds(self.names, kind)
        least, mean, largest = self.spreads.unbind(dim=-1)
        found = _Sums.of(len(names), index, self.matrices, mean, least, largest)
        matrices = self.matrices.new_zeros(len(names)).index_add_(0, index, self.matrices)
        return Numbers(names, matrices, found.spreads())


@functools.lru_cache(maxsize=8)
def _kinds(names: tuple[str, ...], kind: Callable[[str], str]) -> tuple[tuple[str, ...], torch.Tensor]:
    """The kinds of names, in their order, and of each name the number of its kind."""
    found = [kind(name) for name in names]
    kinds = {name: number for number, name in enumerate(dict.fromkeys(found))}
    return tuple(kinds), torch.tensor([kinds[each] for each in found], dtype=torch.long)


@dataclass(frozen=True)
class _Sums:
    """Of rows: what is added up (numbers and how many there are) and what is compared (largest, negated least).

    Both (rows, len(STATS), 2), float64: counts of matrices that several ranks have are fractions.
    """

    added: torch.Tensor
    compared: torch.Tensor

    @classmethod
    def of(
        cls,
        rows: int,
        index: torch.Tensor,
        weights: torch.Tensor,
        mean: torch.Tensor,
        least: torch.Tensor,
        largest: torch.Tensor,
    ) -> _Sums:
        """
        Args:
            rows: how many there are.
            index: of each matrix, its row: (matrices,), int64.
            weights: how much each counts, (matrices,).
            mean: (matrices, len(STATS)); NaN: not measured. ``least`` and ``largest`` likewise.
        """
        mean = mean.double()
        known, low = ~mean.isnan(), float("-inf")
        count = known * weights.double()[:, None]
        added = torch.stack([torch.where(known, mean, 0.0) * count, count], dim=-1)
        compared = torch.stack([torch.where(known, largest, low), torch.where(known, -least, low)], dim=-1).double()
        places = index[:, None, None].expand_as(compared)
        shape = (rows, mean.size(1), 2)
        return cls(
            added.new_zeros(shape).index_add_(0, index, added),
            compared.new_full(shape, low).scatter_reduce_(0, places, compared, "amax"),
        )

    def spreads(self) -> torch.Tensor:
        """Least, mean and largest, (rows, len(STATS), 3); NaN where nothing was measured."""
        total, count = self.added.unbind(dim=-1)
        largest, least = self.compared.unbind(dim=-1)
        found = torch.stack([-least, total / count, largest], dim=-1)
        return torch.where(count[..., None] > 0, found, torch.nan)


class Rows:
    """The rows of a model's table, the same on all its ranks.

    Args:
        routes: of all weights of the model, with their names by :func:`numbered`, in the same order on all ranks.
        weights: of this rank's optimizers, with these names.
        device: of the model.
    """

    def __init__(
        self, routes: Iterable[tuple[str, Route]], weights: Iterable[tuple[str, torch.Tensor]], device: torch.device
    ) -> None:
        matrices: dict[str, int] = {}
        for name, route in routes:
            for block in route.blocks if route.muon else ():
                if block.rule != SCALAR:  # of a stack each expert-parallel rank has others, under one name
                    row = _row(name, route.layout, block.name)
                    matrices[row] = matrices.get(row, 0) + block.count
        self._names = tuple(sorted(matrices, key=_natural))
        self._matrices = torch.tensor([float(matrices[name]) for name in self._names], dtype=torch.float64)
        numbers = {name: number for number, name in enumerate(self._names)}
        self._number: dict[tuple[torch.Tensor, str], int] = {}
        for name, weight in weights:
            layout = layout_of(weight)
            for block_name in [section.name for section in layout.sections] if len(layout.indices) > 1 else [""]:
                if (number := numbers.get(_row(name, layout, block_name))) is not None:
                    self._number[weight, block_name] = number
        self._device = device

    def local(self, samples: Sequence[Sample]) -> _Sums:
        """The numbers of this rank, on the device."""
        counts = [len(its.numbers) for its in samples]
        rows, shares = [self._number[its.param, its.block] for its in samples], [1 / its.ranks for its in samples]
        each = torch.tensor([rows, shares, counts], dtype=torch.float64).to(self._device)  # one transfer
        index, weights = each[:2].repeat_interleave(each[2].long(), dim=1, output_size=sum(counts))
        numbers = torch.cat([torch.empty(0, len(STATS), device=self._device), *(its.numbers for its in samples)])
        return _Sums.of(len(self._names), index.long(), weights, numbers, numbers, numbers)

    def together(
        self, mine: _Sums, times: Mapping[str, float], largest: torch.Tensor, ranks: Ranks
    ) -> tuple[Numbers, dict[str, Spread], list[float]]:
        """Exchange what the ranks have; all of them must call this. The host waits for the device.

        Args:
            mine: of :meth:`local`.
            times: of this rank, by the names of :data:`TIMES`.
            largest: numbers whose largest counts, float64; -inf: this rank has none.
            ranks: the model's.

        Returns:
            the rows, the times, and the numbers of ``largest``.
        """
        added, compared = self.exchange(mine, times, largest, ranks)
        size, shape, many = mine.added.numel(), mine.added.shape, len(TIMES)
        sums = _Sums(added[:size].view(shape), compared[:size].view(shape))
        means = (added[size : size + many] / added[-1]).tolist()
        most, negated, rest = (part.tolist() for part in compared[size:].split([many, many, largest.numel()]))
        found = {name: (-low, mean, high) for name, low, mean, high in zip(TIMES, negated, means, most, strict=True)}
        return Numbers(self._names, self._matrices, sums.spreads()), found, rest

    def exchange(
        self, mine: _Sums, times: Mapping[str, float], largest: torch.Tensor, ranks: Ranks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`together` asks of the device and of other ranks: what is added up and compared, on the host."""
        clock = torch.tensor([times[name] for name in TIMES], dtype=torch.float64).to(self._device)
        added = torch.cat([mine.added.view(-1), clock, clock.new_ones(1)])
        compared = torch.cat([mine.compared.view(-1), clock, -clock, largest])
        ranks.reduce_sum(added)
        ranks.reduce_max(compared)
        return added.cpu(), compared.cpu()


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Layer 10 after layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def defects_of(routes: Iterable[tuple[str, Route]], options: MuonConfig) -> dict[str, float]:
    """By rows, what the iteration leaves of random matrices of their size, see :func:`random_defect`."""
    found = {}
    for name, route in routes:
        for block in route.blocks if route.muon and route.layout.direction == MSIGN else ():
            if block.rule != SCALAR and block.numel:
                p, iteration = min(block.rows, block.columns), options.iteration(route.layout.budget)
                found[_row(name, route.layout, block.name)] = random_defect(p, iteration)
    return found

"""QK-clip of one model: measured in its forward passes, applied inside its optimizer's step.

A step goes like this. While the forward passes run, each attention layer writes its maxima into one buffer of the whole
model. When gradients are prepared an all-reduce (maximum) makes the buffer the same on all ranks, and before the update
all factors are computed from it. As soon as an inner optimizer has updated a tensor - float32 masters where there
are any, whole, in slices or kept as remainders - the rows of queries and keys in it are multiplied; what copies and
gathers comes after that. Nothing here waits for the device or branches on what it holds: a factor of 1 changes no
bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.optimizers.storage import master_of, opened
from megatron_muon.qk_clip.factors import Heads, factor_table, gammas
from megatron_muon.qk_clip.measure import Gauge
from megatron_muon.qk_clip.rows import Rows


@dataclass(frozen=True)
class ClipSettings:
    """What is done with the maxima."""

    clip: bool  # whether weights are clipped; otherwise maxima are only reported
    threshold: float  # tau
    alpha: float  # share of the factor that queries take
    rule: str  # for heads that share a key head
    interval: int = 1  # measure and clip in every so many-th step
    log_layers: int = 0  # steps between logs of each layer's maximum; 0 never


@dataclass(frozen=True)
class Target:
    """A tensor that an optimizer updates, and the factors of its elements."""

    tensor: torch.Tensor  # whole, of the parameter's shape, or a flat slice of it
    rows: Rows  # the parameter's
    start: int | None = None  # of the slice in the flattened parameter; None if ``tensor`` is whole


@torch.no_grad()
def scale_rows(target: Target, factors: torch.Tensor) -> None:
    """Multiply the rows of a parameter, or of a slice of it, in place.

    Args:
        target: what to multiply.
        factors: (rows of the parameter,) one for each row.
    """
    tensor, offset = target.tensor, target.rows.offset
    columns = target.rows.param.numel() // factors.numel()
    start = target.start or 0
    stop = start + tensor.numel()
    flat = tensor.view(-1)
    first, last = -(-start // columns), stop // columns
    if first > last:  # a slice inside one row
        parts = [(flat, factors[last : last + 1])]
    else:
        head, tail = first * columns - start, last * columns - start
        parts = [
            (flat[:head], factors[first - 1 : first]),
            (flat[head:tail].view(-1, columns), factors[first:last, None]),
            (flat[tail:], factors[last : last + 1]),
        ]
    for part, factor in parts:
        if part.numel():
            part.mul_(factor)
            if offset:
                # (w + offset) * f - offset in a form that leaves w as it is, to the last bit, where f is 1.
                part.add_(factor - 1, alpha=offset)


class QKClip:
    """The maxima and factors of a model on this rank.

    Args:
        names: of all attention layers of the model, on all ranks, in order.
        heads: all their heads.
        settings: what to do with the maxima.
        ranks: over which maxima are reduced: all ranks of the model. One maximum then serves data, context and tensor
            parallelism, and tells every rank of the layers of other pipeline stages.
        device: of the model.
        dtype: of maxima and factors.
    """

    def __init__(
        self,
        names: Sequence[str],
        heads: Heads,
        settings: ClipSettings,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.names = list(names)
        self.heads = heads
        self.settings = settings
        self.gauges: list[Gauge] = []
        self.rows: list[Rows] = []
        self._ranks = ranks
        self._clippable = torch.zeros(heads.count, dtype=torch.bool, device=device)
        self._maxima = torch.full((heads.count,), float("-inf"), dtype=dtype, device=device)
        self._last = self._maxima.clone()
        self._peak = self._maxima.clone()
        self._clipped = torch.zeros((), dtype=torch.int64, device=device)
        self._clipped_since = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = 0
        self._reduced = False
        self._factors: dict[int, torch.Tensor] | None = None
        self._targets: dict[torch.optim.Optimizer, list[Target]] = {}

    def maxima_of(self, first: int, count: int) -> torch.Tensor:
        """The part of the buffer that belongs to ``count`` heads from the model's head ``first`` on."""
        return self._maxima[first : first + count]

    def clip_only(self, layers: Sequence[str]) -> None:
        """Of the whole model only these layers can be clipped; the others are frozen or normalised."""
        numbers = {self.names.index(each) for each in layers}
        self._clippable.copy_(torch.tensor([number in numbers for number in self.heads.layer.tolist()]))
        self.settings = replace(self.settings, clip=self.settings.clip and bool(layers))

    def watch(self, targets: Sequence[tuple[torch.optim.Optimizer, Target]]) -> None:
        """Clip these tensors whenever their optimizer has updated them inside :meth:`step`."""
        for inner, target in targets:
            if inner not in self._targets:
                self._targets[inner] = []
                finals = getattr(inner, "finals", None)
                if finals is None:
                    inner.register_step_post_hook(lambda inner, args, kwargs: self._scale(inner))
                else:  # before anybody else hears of them
                    finals.insert(0, functools.partial(self._scale, inner))
            self._targets[inner].append(target)

    @property
    def measuring(self) -> bool:
        """Whether the step that comes is measured."""
        return self._steps % self.settings.interval == 0

    def prepare(self, prepare: Callable[[], bool]) -> bool:
        """Prepare gradients, and know the maxima of the model. May be done again, as drivers of steps do.

        ``prepare`` is Megatron-Core's ``prepare_grads``: whether a gradient has overflowed, so that no step follows.
        """
        if self.measuring:
            self._reduce()
        overflow = prepare()
        if overflow:
            self.forget()
        return overflow

    def step(self, update: Callable[[], Any]) -> Any:
        """Update weights by Megatron-Core's ``step_with_ready_grads``, and clip them.

        Returns:
            what ``update`` returns.
        """
        if self.measuring:
            if not self._reduced:
                self._reduce()
            if self.settings.clip:
                self._clipped.copy_(((gammas(self._last, self.settings.threshold) < 1) & self._clippable).sum())
                self._clipped_since.add_(self._clipped)
                self._factors = self._row_factors()
        try:
            return update()
        finally:
            self._factors = None
            self.forget()
            self._steps += 1
            for gauge in self.gauges:
                gauge.active = self.measuring

    def forget(self) -> None:
        """Begin to measure anew: after a step, and before the forward passes of the next if none was made."""
        self._maxima.fill_(float("-inf"))
        self._reduced = False

    def _reduce(self) -> None:
        self._ranks.reduce_max(self._maxima)
        self._last.copy_(self._maxima)
        torch.maximum(self._peak, self._last, out=self._peak)
        self._reduced = True

    def _row_factors(self) -> dict[int, torch.Tensor]:
        """The factors of the rows of each parameter on this rank, by its identity."""
        settings = self.settings
        table = factor_table(self._maxima, self.heads, settings.threshold, settings.alpha, settings.rule)
        return {id(rows.param): table[rows.index] for rows in self.rows}

    def _scale(self, inner: torch.optim.Optimizer, updated: Sequence[torch.Tensor] | None = None) -> None:
        """Clip what an optimizer has updated: all, or these tensors."""
        if self._factors is None:
            return
        some = None if updated is None else set(map(id, updated))
        for target in self._targets[inner]:
            if some is None or id(target.tensor) in some:
                kept = master_of(target.tensor, inner.state.get(target.tensor, {}))
                with opened([kept], list) as (numbers,):
                    scale_rows(replace(target, tensor=numbers), self._factors[id(target.rows.param)])

    @property
    def max_logit(self) -> torch.Tensor:
        """The largest logit of the last measured step over the whole model: a scalar on the device."""
        return self._last.max()

    @property
    def heads_clipped(self) -> torch.Tensor:
        """How many heads of the whole model were clipped in the last measured step, on the device."""
        return self._clipped

    def scalars(self) -> dict[str, float]:
        """For a log: the largest logit and, if weights are clipped, how many heads were since the last call.

        Waits for the device: call it where the host has waited already.
        """
        peak, clipped = self._peak.max().item(), int(self._clipped_since.item())
        self._peak.fill_(float("-inf"))
        self._clipped_since.zero_()
        return {"max_attention_logit": peak, **({"heads_clipped": clipped} if self.settings.clip else {})}

    def by_layer(self) -> dict[str, float]:
        """The largest logit of each layer in the last measured step. Waits for the device."""
        values = self._last.new_full((self.heads.layers,), float("-inf"))
        values = values.scatter_reduce(0, self.heads.layer, self._last, "amax")
        return dict(zip(self.names, values.tolist(), strict=True))

    def describe(self) -> Iterator[str]:
        """What is clipped, in words."""
        settings = self.settings
        if settings.clip:
            shared = "" if bool(self.heads.alone.all()) else f", shared keys: {settings.rule}"
            yield (
                f"{self._count(self._clippable)} are clipped above {settings.threshold:g} "
                f"(alpha {settings.alpha:g}{shared})"
            )
        if not bool(self._clippable.all()):
            yield f"attention logits of {self._count(~self._clippable)} are measured, not clipped"
        if settings.interval > 1:
            yield f"measured in every {settings.interval}th step"

    def _count(self, heads: torch.Tensor) -> str:
        return f"{int(heads.sum())} heads in {self.heads.layer[heads].unique().numel()} layers"

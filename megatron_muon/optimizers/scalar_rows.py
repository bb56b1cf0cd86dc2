"""Rows of a Muon weight that follow the scalar optimizer's rule.

A fused weight may hold rows that are no matrix: the beta and alpha rows of GatedDeltaNet's ``in_proj``, the dt rows of
Mamba's. They are updated as the scalar optimizer would update a weight that consists of these rows alone. The first
moment lives in their rows of Muon's ``momentum_buffer`` (both are moving averages of the gradient). The second moment
is a tensor of these rows alone, in memory order. In checkpoints it has the weight's shape, so that it is saved and
resharded as the weight is: with zeros in all other rows, which nobody reads.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.engine.plan import Weight
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.handled import STEP
from megatron_muon.optimizers.param_step import ParamStep, rows_of
from megatron_muon.optimizers.rates import kept_of, rate_of
from megatron_muon.optimizers.shard_layout import ShardLayout
from megatron_muon.optimizers.storage import momentum_of, opened
from megatron_muon.orthogonalize.kernels.elementwise import Rate, add_
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, SCALAR, WHOLE, MatrixLayout, layout_of

SECOND_MOMENT = "exp_avg_sq"
"""State of the rows under Adam, in their order: (rows of the shard, columns); of a stack (experts, rows, columns)."""


def cut_second_moment(param: torch.Tensor, state: dict[str, Any]) -> None:
    """Replace a second moment of the weight's shape, as in checkpoints and older states, by its rows under Adam."""
    whole, layout = state.get(SECOND_MOMENT), layout_of(param)
    if not (layout.has_scalar_rows and layout.has_matrices) or isinstance(layout, ShardLayout):
        return  # all its rows are under Adam, or none; or it is kept as the weight is, so as to be resharded
    if whole is not None and whole.shape == param.shape and whole.size(-2):
        rows = torch.cat(layout.rows_by_rule(whole, SCALAR), -2)
        state[SECOND_MOMENT] = rows.flatten(param.dim() - 2, -2)  # of all periods


def whole_second_moment(param: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Copy a second moment into a tensor of the weight's shape, which is zero in all other rows."""
    whole = kept.new_zeros(param.shape)
    rows = layout_of(param).rows_by_rule(whole, SCALAR)
    torch._foreach_copy_(rows, _parts(kept, rows))
    return whole


def _parts(kept: torch.Tensor, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of a kept second moment, each of the shape of a view of the weight's rows under Adam."""
    counts = [view.size(-2) for view in rows]
    periods = kept.size(-2) // max(1, sum(counts))  # a weight without rows has none
    parts = kept.unflatten(-2, (periods, sum(counts))).split(counts, -2)
    return [part.view_as(view) for part, view in zip(parts, rows, strict=True)]


def _second(layout: MatrixLayout, state: dict[str, Any], rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of the second moment of a weight, each of the shape of a view of the weight's rows under Adam."""
    kept: torch.Tensor = state[SECOND_MOMENT]
    return layout.rows_by_rule(kept, SCALAR) if isinstance(layout, ShardLayout) else _parts(kept, rows)


def check_scalar_rows(weight: Weight) -> None:
    """Refuse a weight whose shards cut through such rows: no rank holds all of a section.

    Raises:
        ConfigError: naming the weight's kind, and what to do instead.
    """
    if weight.is_broken and weight.layout.has_scalar_rows and not isinstance(weight.layout, ShardLayout):
        raise ConfigError(
            f"a {weight.layout.kind} weight with {weight.shape[-2]} rows on each of {weight.ranks} tensor-parallel "
            f"ranks cuts through sections (periods of {weight.layout.period} rows), some of which follow the scalar "
            "optimizer's rule. Give it to Adam (--muon-param-rule 'NAME=adam') or treat it as one matrix "
            "(--muon-param-rule 'NAME=whole')."
        )


def restart_emptied(touched: list[tuple[torch.Tensor, dict[str, Any]]]) -> None:
    """Let Adam's rows begin anew, with the first update of a fresh optimizer, where they have lost their second moment.

    Args:
        touched: weights with such rows, and their state, which somebody else may have replaced or zeroed.
    """
    # Waits for the device: for state that is not as the last step left it, and that has been counted before.
    # Of a DTensor a rank may have rows that have never had a gradient: its count is that of the others.
    layouts = [(layout_of(param), state) for param, state in touched if state[STEP]]
    counted = [(layout, state) for layout, state in layouts if not isinstance(layout, ShardLayout)]
    anything = [state[SECOND_MOMENT].any() for _, state in counted]
    for (layout, state), is_left in zip(counted, anything, strict=True):
        if not is_left:
            state[STEP] = 0
            for plane in momentum_of(state).planes:  # zeros in all of them are zero, however it is kept
                torch._foreach_zero_(layout.rows_by_rule(plane, SCALAR))


@dataclass(frozen=True)
class RowRates:
    """What the scalar optimizer multiplies rows by in one step: those of one param group.

    Learning rate and weight decay are the group's own times ``scalar_lr_mult`` and ``scalar_wd_mult``, so that they
    follow its schedule.

    Attributes:
        lr: learning rate.
        kept: what is left of rows when they decay; None if they do not.
        mixed: which of the group's weights in the step have such rows.
        counts: how many updates each of them had, with this one, since its second moment began. Empty for Lion.
        firsts: for each of them the bias correction of the first moment.
        roots: the root of that of the second.
    """

    lr: Rate
    kept: Rate | None
    mixed: tuple[int, ...]
    counts: tuple[int, ...] = ()
    firsts: tuple[Rate, ...] = ()
    roots: tuple[Rate, ...] = ()


def row_rates(
    group: dict[str, Any], lr: Rate, params: Sequence[torch.Tensor], states: Sequence[dict[str, Any]]
) -> RowRates | None:
    """The rates of the step that comes; None if no weight has such rows.

    Args:
        group: Muon's param group.
        lr: its learning rate.
        params: weights of the group that are in the step.
        states: their state.
    """
    layouts = [getattr(param, LAYOUT_ATTRIBUTE, WHOLE) for param in params]  # no call for each weight in each step
    mixed = tuple(index for index, layout in enumerate(layouts) if layout.has_scalar_rows)
    if not mixed:
        return None
    lr = lr * group["scalar_lr_mult"]
    kept = kept_of(lr * (rate_of(group, "weight_decay") * group["scalar_wd_mult"]))
    if group["scalar_optimizer"] != "adam":
        return RowRates(lr, kept, mixed)
    counts = tuple(states[index].get(STEP, 0) + 1 for index in mixed)
    beta1, beta2 = group["scalar_betas"]
    roots = tuple((1.0 - beta2**count) ** 0.5 for count in counts)
    return RowRates(lr, kept, mixed, counts, tuple(1.0 - beta1**count for count in counts), roots)


def step_scalar_rows(weights: list[ParamStep], rates: RowRates) -> None:
    """One step of the scalar optimizer on the rows that layouts give to it.

    Args:
        weights: of one param group; those without such rows are left alone.
        rates: of this step.
    """
    adam = weights[0].group["scalar_optimizer"] == "adam"
    pairs = zip(rates.firsts, rates.roots, strict=True) if adam else itertools.repeat((1.0, 1.0))
    alike: dict[Hashable, list[tuple[ParamStep, tuple[Rate, Rate]]]] = defaultdict(list)
    for index, each in zip(rates.mixed, pairs, strict=False):
        alike[weights[index].key].append((weights[index], each))
    for some in (part for weights_alike in alike.values() for part in _in_bound(weights_alike)):
        _step_rows([weight for weight, _ in some], rates, [each for _, each in some] if adam else [])


def _in_bound(
    weights: list[tuple[ParamStep, tuple[Rate, Rate]]],
) -> Iterator[list[tuple[ParamStep, tuple[Rate, Rate]]]]:
    """As many at a time as may be opened at once, see :attr:`megatron_muon.optimizers.forms.Form.bound`."""
    bound = weights[0][0].momentum.form.bound
    if not bound:
        yield weights
        return
    some, total = list[tuple[ParamStep, tuple[Rate, Rate]]](), 0
    for weight, each in weights:
        size = 8 * sum(rows.numel() for rows in rows_of([weight.param], [weight.layout], SCALAR))
        if some and total + size > bound:
            yield some
            some, total = [], 0
        some.append((weight, each))
        total += size
    yield some


def _step_rows(weights: list[ParamStep], rates: RowRates, each: list[tuple[Rate, Rate]]) -> None:
    """Of weights whose numbers are kept in one way, with the corrections of each (:class:`RowRates`; none for Lion)."""
    layouts = [weight.layout for weight in weights]

    def cut(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return rows_of(tensors, layouts, SCALAR)

    seconds: list[torch.Tensor] = []
    corrections: list[tuple[Rate, Rate]] = []
    if each:
        pairs = [(weight.state, weight.layout.rows_by_rule(weight.param, SCALAR)) for weight in weights]
        seconds = [
            part for layout, (state, rows) in zip(layouts, pairs, strict=True) for part in _second(layout, state, rows)
        ]
        corrections = [both for (_, its_rows), both in zip(pairs, each, strict=True) for _ in its_rows]
    grads = _wide(cut([weight.raw_grad for weight in weights]))
    masters, momenta = [weight.master for weight in weights], [weight.momentum for weight in weights]
    with opened(masters, cut) as params, opened(momenta, cut) as firsts:
        # In float32 at least: what has 16 bits is rounded once, when all is done.
        wide = [_wide(views) for views in (params, firsts, seconds)]
        _update_rows(weights[0].group, rates, corrections, grads, *wide)
        for views, results in zip((params, firsts, seconds), wide, strict=True):
            for view, result in zip(views, results, strict=True):
                if view is not result:
                    view.copy_(result)


def _wide(views: list[torch.Tensor]) -> list[torch.Tensor]:
    return [view.to(torch.promote_types(view.dtype, torch.float32)) for view in views]


def _update_rows(
    group: dict[str, Any],
    rates: RowRates,
    corrections: list[tuple[Rate, Rate]],
    grads: list[torch.Tensor],
    params: list[torch.Tensor],
    first_moments: list[torch.Tensor],
    second_moments: tuple[torch.Tensor, ...] | list[torch.Tensor] = (),
) -> None:
    """One step of the scalar optimizer on views of rows, in place; of their moments alone at rate 0.

    Args:
        group: Muon's param group; ``scalar_betas`` and ``scalar_eps`` are the scalar optimizer's.
        rates: of this step.
        corrections: of the bias of each row's moments, see :class:`RowRates`. Empty for Lion.
        grads: of the rows.
        params: rows of the weights, float32 or wider; updated, as are their moments.
        first_moments: of the rows.
        second_moments: of the rows. Empty for Lion.

    Source:
        AdamW: Loshchilov and Hutter, arXiv 1711.05101; Lion: Chen et al., arXiv 2302.06675.
    """
    lr, (beta1, beta2) = rates.lr, group["scalar_betas"]
    is_still = not isinstance(lr, torch.Tensor) and lr == 0.0
    if rates.kept is not None:
        torch._foreach_mul_(params, rates.kept)
    if group["scalar_optimizer"] == "lion":
        signs = torch._foreach_lerp(first_moments, grads, 1.0 - beta1)
        torch._foreach_sign_(signs)
        if not is_still:
            add_(params, signs, -lr)
        torch._foreach_lerp_(first_moments, grads, 1.0 - beta2)
        return
    torch._foreach_lerp_(first_moments, grads, 1.0 - beta1)
    torch._foreach_mul_(second_moments, beta2)
    torch._foreach_addcmul_(second_moments, grads, grads, value=1.0 - beta2)
    if is_still:
        return
    roots = torch._foreach_sqrt(second_moments)
    firsts, bias_roots = [
        list[Any](each) for each in zip(*corrections, strict=True)
    ]  # numbers, or scalars on the device
    torch._foreach_div_(roots, bias_roots)
    torch._foreach_add_(roots, group["scalar_eps"])
    if isinstance(lr, torch.Tensor):
        updates = torch._foreach_div(first_moments, roots)
        torch._foreach_div_(updates, firsts)
        add_(params, updates, -lr)
    else:  # the very operations of torch's AdamW
        torch._foreach_addcdiv_(params, first_moments, roots, [-lr / first for first in firsts])

"""Faults that are put by hand around the step, each seen by what the other files of this folder check."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint import param_state, request, saving
from megatron_muon.monitor.recorder import Recorder
from megatron_muon.plugin import early_gather, nonfinite, sharing
from megatron_muon.plugin.stiefel import Tangency
from megatron_muon.qk_clip import clip, measure
from tests.fake_cuda import test_checkpoint, test_plugin, test_qk_clip
from tests.fake_cuda.megatron import outcomes
from tests.fake_cuda.sequences import check_meeting
from tests.pool import RankPool

Work = Callable[[], Any]


def instead(target: Any, name: str, fault: Callable[..., Any]) -> Any:
    """A fault that is given the function in whose place it is."""
    original = getattr(target, name)
    return patch.object(target, name, lambda *args, **kwargs: fault(original, *args, **kwargs))


def before(target: Any, name: str, fault: Callable[..., Any]) -> Any:
    """A fault that is given the arguments first."""

    def faulty(original: Any, *args: Any, **kwargs: Any) -> Any:
        fault(*args, **kwargs)
        return original(*args, **kwargs)

    return instead(target, name, faulty)


def on_every_rank(name: str) -> Work:
    return lambda: check_meeting({rank: test_plugin.two_steps(test_plugin.STEPS[name], rank) for rank in range(4)})


def on_one_rank(name: str) -> Work:
    return lambda: test_plugin.two_steps(test_plugin.STEPS[name], rank=1)


def with_clip(name: str) -> Work:
    return lambda: test_qk_clip.measure_and_clip(test_qk_clip.CASES[name])


def saved(name: str) -> Work:
    return lambda: test_checkpoint.there_and_back(test_checkpoint.CASES[name], 0, [])


def of_the_host(original: Any, *args: Any) -> Any:
    return original(*args[:-1], args[-1].cpu())


def strided(original: Any, ranks: Ranks, tensor: torch.Tensor) -> None:
    original(ranks, torch.stack([tensor, tensor], dim=-1)[..., 0])


def on_cpu(original: Any, *args: Any) -> Any:
    return original(*args[:-1], torch.device("cpu"))


def table_by_host(self: clip.QKClip) -> dict[int, torch.Tensor]:
    return {id(rows.param): self._maxima[rows.index.cpu() % self._maxima.numel()] for rows in self.rows}


def moved(held: param_state.ParamState) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in held.tensors.items()}


def at_once(gathers: Any) -> None:
    """Bucket groups start although weights in them are not final."""
    gathers._left = [0] * len(gathers._left)


def another_order(original: Any, chunks: Any) -> Any:
    found = original(chunks)
    return found[::-1] if dist.get_rank() == 1 else found


def on_some_ranks(original: Any, ranks: Ranks, tensor: torch.Tensor) -> None:
    if dist.get_rank() != 2:
        original(ranks, tensor)


READS, OF_HOST = "the host reads", "on cpu|to the host|from the host"

FAULTS: dict[str, tuple[Any, Work, str]] = {
    "a factor is read": (
        before(clip, "scale_rows", lambda target, factors: factors[0].item()),
        with_clip("scores, q_only"),
        READS,
    ),
    "a branch on maxima": (
        before(clip, "gammas", lambda maxima, threshold: bool((maxima > threshold).any())),
        with_clip("scores, q_only"),
        READS,
    ),
    "a maximum is read in the forward pass": (
        before(measure, "score_maxima", lambda scores, hidden: scores.max().item()),
        with_clip("scores, q_only"),
        "wait in the forward pass",
    ),
    "factors by an index of the host": (
        patch.object(clip.QKClip, "_row_factors", table_by_host),
        with_clip("scores, q_only"),
        "memory of the host|to the host",
    ),
    "maxima are reduced on the host": (instead(Ranks, "reduce_max", of_the_host), with_clip("layer-wise"), OF_HOST),
    "maxima are strided": (instead(Ranks, "reduce_max", strided), with_clip("scores, q_only"), "not contiguous"),
    "a norm is read": (
        before(nonfinite, "_suspect", lambda optimizer, device: next(nonfinite._params(optimizer)).grad.norm().item()),
        on_one_rank("plain"),
        READS,
    ),
    "one rank gives no verdict": (
        instead(Ranks, "reduce_max", on_some_ranks),
        on_every_rank("layer-wise"),
        "wait for one another|differ",
    ),
    "work is shared on the host": (instead(sharing, "Sharing", on_cpu), on_one_rank("layer-wise, lent"), "cpu"),
    "weights are sent before they are final": (
        before(early_gather._EarlyGathers, "_start", at_once),
        on_one_rank("layer-wise"),
        "before its wait|Assertion",
    ),
    "gathers are left under way": (
        instead(early_gather._EarlyGathers, "settle", lambda original, gathers: None),
        on_one_rank("layer-wise without overlap"),
        "nobody has waited for|before its wait",
    ),
    "gathers in another order": (
        instead(early_gather, "_in_order", another_order),
        on_every_rank("layer-wise"),
        "differ|wait for one another",
    ),
    "a residual is read": (
        before(Tangency, "step", lambda self, update: self._worst.item()),
        on_one_rank("manifold"),
        READS,
    ),
    "a loss is read": (
        before(Recorder, "add", lambda self, losses, skipped: [value.item() for value in losses.values()]),
        test_plugin.logged_and_moved,
        READS,
    ),
    "state is saved from the host": (
        patch.object(param_state.ParamState, "saved", property(moved)),
        saved("plain"),
        OF_HOST,
    ),
    "a mean square is read": (
        instead(request, "mean_squares", lambda original, *args: [each.item() for each in original(*args)]),
        saved("from Muon to Adam"),
        READS,
    ),
    "an estimate is filled in by a number of the device": (
        before(
            request,
            "gradients_to_average",
            lambda decay: torch.zeros(2, device="cuda").masked_fill_(
                torch.ones(2, device="cuda") > 0, torch.zeros((), device="cuda")
            ),
        ),
        saved("from Muon to Adam"),
        READS,
    ),
    "a step count is read for each weight": (
        before(saving, "_step", lambda held: [each.param.sum().item() for each in held]),
        saved("plain"),
        READS,
    ),
}


def _put_each() -> dict[str, str]:
    def put(case: tuple[Any, Work, str]) -> None:
        fault, work, _ = case
        with fault:
            work()

    return outcomes(FAULTS, put)


@pytest.fixture(scope="module")
def seen(pool: RankPool) -> dict[str, str]:
    return pool.run(_put_each, 1)[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(seen: dict[str, str], fault: str) -> None:
    assert re.search(FAULTS[fault][2], seen[fault]), seen[fault] or "nothing was seen"

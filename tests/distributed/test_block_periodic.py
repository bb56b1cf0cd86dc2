"""Block-periodic Muon (arXiv 2510.16981): shards by themselves, and whole matrices in every P-th step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.modes import OWNER
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tests.pool import RankPool

PERIOD, STEPS, RESUMED = 3, 7, 4
QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))
HEADS = MatrixLayout("qkv", (Section("q", 4, matrix_rows=4), Section("k", 4, matrix_rows=4)))
WEIGHTS = [((16, 12), 0, WHOLE), ((16, 12), 1, WHOLE), ((32, 6), 0, QKV), ((16, 6), 0, HEADS), ((8, 12), None, WHOLE)]
"""Shapes of whole weights and what is divided; the last one has the shape that the first one's shards have."""
CUT = [True, True, True, False, False]


def _params() -> list[torch.nn.Parameter]:
    found = []
    for number, (shape, dim, layout) in enumerate(WEIGHTS):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        param = torch.nn.Parameter(whole if dim is None else whole.chunk(2, dim)[dist.get_rank()].contiguous())
        param.matrix_layout = layout
        if dim is not None:
            param.tensor_model_parallel, param.partition_dim = True, dim
        found.append(param)
    return found


def _optimizer(params: list[torch.nn.Parameter], **options: Any) -> Muon:
    common: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "fp32_matmul_prec": "highest", "chunk_mb": 0.001}
    return Muon(params, **common, tp_group=dist.group.WORLD, **options)


def _step(optimizer: Muon, number: int) -> tuple[int, int]:
    """Take a step with the gradients of that number; returns the messages and bytes of all engines."""
    params = optimizer.param_groups[0]["params"]
    for index, param in enumerate(params):
        seed = 1000 * number + 10 * index + (dist.get_rank() if index < len(params) - 1 else 0)
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    for engine in optimizer.engines:
        engine.counters.reset()
    optimizer.step()
    counters = [engine.counters for engine in optimizer.engines]
    return sum(its.collectives for its in counters), sum(its.bytes for its in counters)


@dataclass
class Compared:
    """What one step of one optimizer did, and what one of another did from the same state."""

    sent: tuple[int, int]
    by_mode: dict[str, tuple[int, int]]  # messages and bytes of that mode
    equal: dict[str, list[bool]]  # for each weight, whether its bits are those of that mode


def steps(scale_mode: str) -> list[Compared]:
    """Of each step of a period and more."""
    found, options = [], {"scale_mode": scale_mode}
    ours = _optimizer(_params(), **options, tp_mode="owner", blockwise_period=PERIOD, blockwise_lr_mult=0.5)
    planned = ours.prepare()
    assert planned is not None and OWNER in {chunk.mode for chunk in planned.plan.chunks}, "what the report tells"
    for number in range(STEPS):
        before, by_mode, equal = [param.detach().clone() for param in ours.param_groups[0]["params"]], {}, {}
        state = copy.deepcopy(ours.state_dict())
        sent = _step(ours, number)
        results = ours.param_groups[0]["params"]
        for mode, extra in (("blockwise", 0.5), ("blockwise", 1.0), ("owner", 1.0)):
            params = _params()
            other = _optimizer(params, **options, tp_mode=mode, extra_scale_factor=extra)
            other.load_state_dict(copy.deepcopy(state))
            for param, value in zip(params, before, strict=True):
                param.data.copy_(value)
            name = f"{mode} x {extra}"
            by_mode[name] = _step(other, number)
            equal[name] = [torch.equal(a, b) for a, b in zip(results, params, strict=True)]
        found.append(Compared(sent, by_mode, equal))
    return found


@pytest.mark.parametrize("scale_mode", ["spectral", "update_norm"])
def test_steps_are_those_of_blockwise_and_every_third_is_exact(pool: RankPool, scale_mode: str) -> None:
    """What no rank cuts, heads among it, has the learning rate and the update of all steps."""
    for by_step in pool.run(steps, 2, scale_mode):
        for number, each in enumerate(by_step, start=1):
            if number % PERIOD:
                assert each.equal["blockwise x 0.5"][:3] == [True] * 3, number
                assert each.equal["blockwise x 1.0"] == [not is_cut for is_cut in CUT], number
                assert each.equal["owner x 1.0"] == [not is_cut for is_cut in CUT], number
                assert each.sent == (0, 0), number
            else:
                assert all(each.equal["owner x 1.0"]), number
                assert each.sent == each.by_mode["owner x 1.0"] and min(each.sent) > 0, number


def resumed() -> list[bool]:
    """Whether weights are those of the run without a break, after one in the middle of a period."""
    options = {"blockwise_period": PERIOD}
    ours = _optimizer(_params(), **options)
    for number in range(RESUMED):
        _step(ours, number)
    params = _params()
    other = _optimizer(params, **options)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    for param, value in zip(params, ours.param_groups[0]["params"], strict=True):
        param.data.copy_(value.detach())
    for number in range(RESUMED, STEPS):
        sent = _step(ours, number), _step(other, number)
        assert sent[0] == sent[1] and (min(sent[0]) > 0) is ((number + 1) % PERIOD == 0), number
    return [torch.equal(a, b) for a, b in zip(params, ours.param_groups[0]["params"], strict=True)]


def test_a_period_goes_on_where_it_was_left(pool: RankPool) -> None:
    for equal in pool.run(resumed, 2):
        assert all(equal)


def out_of_phase() -> tuple[list[str], bool]:
    """What ranks say whose counts of steps differ, and of one that refuses a step in blocks after an exact one."""
    found = []
    ours = _optimizer(_params(), blockwise_period=2)
    for number in range(2):
        _step(ours, number)
    before = [param.detach().clone() for param in ours.param_groups[0]["params"]]
    for entry, value in (("step", 3), ("momentum", 2.0)):
        kept = ours.param_groups[0][entry]
        if dist.get_rank() == 1:
            ours.param_groups[0][entry] = value
        with pytest.raises((RuntimeError, ValueError)) as error:
            _step(ours, 2)
        ours.param_groups[0][entry] = kept
        found.append(str(error.value))
    return found, all(map(torch.equal, before, ours.param_groups[0]["params"]))


def test_ranks_that_differ_stop_together_in_every_step(pool: RankPool) -> None:
    """In a step in which nothing is sent, too: the ranks that go on would be in another step than the others."""
    for (counts, momentum), are_unchanged in pool.run(out_of_phase, 2):
        assert "this step is one of blocks is True on ranks [0] and False on ranks [1]" in counts
        assert "momentum 2.0" in momentum and are_unchanged


def test_checkpoints_say_in_which_steps_shards_are_by_themselves() -> None:
    params = [torch.nn.Parameter(torch.ones(4, 6))]
    plain, always = Muon(params).checkpoint_options, Muon(params, tp_mode="blockwise").checkpoint_options
    period = Muon(params, blockwise_period=5, blockwise_lr_mult=0.5).checkpoint_options
    assert (plain["blockwise"], always["blockwise"]) == ("no step", "every step")
    assert (period["blockwise"], period["blockwise_lr_mult"]) == ("all but every 5. step", 0.5)


def refusal() -> str:
    """Of a weight whose periods four ranks cut."""
    param = torch.nn.Parameter(torch.ones(4, 12))
    param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, 0, QKV
    with pytest.raises(ValueError) as error:
        _optimizer([param], blockwise_period=5)
    return str(error.value)


def test_shards_that_hold_no_whole_sections_are_refused(pool: RankPool) -> None:
    for message in pool.run(refusal, 4):
        assert "blockwise_period 5: a qkv weight with 4 rows on each of 4" in message
        assert "Leave it out, or treat the weight as one matrix (param_rule=('NAME=whole',))" in message

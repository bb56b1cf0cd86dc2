"""Steps of Megatron-Core's own optimizers on fake CUDA: layouts, gradients' checks, numbers that are logged, state."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_muon.errors import ConfigError
from megatron_muon.monitor import sources
from megatron_muon.monitor.recorder import Recorder
from megatron_muon.optimizers import sleeping
from megatron_muon.plugin import recording
from megatron_muon.plugin.groups import device_of
from megatron_muon.plugin.sleeping import sleep, wake
from megatron_muon.plugin.state import reset, state_bytes
from megatron_muon.plugin.tables import Rows
from megatron_muon.plugin.watching import Watching
from tests.fake_cuda.megatron import FIRST_STEP, GPU, STEP, Allowed, forward, gpus, outcomes, start, step
from tests.fake_cuda.sequences import check_meeting
from tests.fake_cuda.world import World
from tests.megatron.harness import Layout
from tests.megatron.qk_clip import GQA
from tests.megatron.test_layer_wise_sharing import UNEVEN, free_messages, shared
from tests.pool import RankPool
from tests.slow import with_slow

Case = tuple[Layout, dict[str, Any], dict[str, Any]]

SHARDED = {"layer_wise": True, "ddp_buffers": True}
BF16 = {"bf16": True}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_grouped_gemm": False, "add_bias_linear": False}

MANIFOLD = {"muon_param_rule": ("*linear_fc1.weight=stiefel",)}

STEPS: dict[str, Case] = {
    "plain": (Layout(tp=2), {}, {}),
    "pipeline": (Layout(pp=2), {}, BF16),
    "layer-wise": (Layout(tp=2, **SHARDED), {}, BF16),
    "layer-wise, float32": (Layout(tp=2, **SHARDED), {}, {}),
    "layer-wise without overlap": (Layout(tp=2, overlap=False, **SHARDED), {}, BF16),
    "lists": (Layout(tp=2, layer_wise=True), {}, {**BF16, "param_layout": False}),
    "lists without overlap": (Layout(tp=2, layer_wise=True, overlap=False), {}, {**BF16, "param_layout": False}),
    "experts": (Layout(tp=2, ep=2, etp=1), {}, {**BF16, **MOE}),
    "experts, layer-wise": (Layout(tp=2, ep=2, etp=1, **SHARDED), {}, {**BF16, **MOE}),
    "nobody looks": (Layout(tp=2), {"muon_nonfinite": "propagate"}, {}),
    "lion": (Layout(tp=2), {"muon_scalar_optimizer": "lion"}, BF16),
    "manifold": (Layout(tp=2), {"name": "stiefel_muon", **MANIFOLD}, {}),
    "layer-wise, lent": (Layout(**SHARDED), {}, {**BF16, **UNEVEN}),
    "layer-wise, lent, gloo beside NCCL": (Layout(**SHARDED), {}, {**UNEVEN, "backend": "cpu:gloo,cuda:nccl"}),
    "measured": (Layout(tp=2), {"muon_log_interval": 1}, BF16),
    "measured, layer-wise": (Layout(tp=2, **SHARDED), {"muon_log_interval": 1}, BF16),
    "measured, experts": (Layout(tp=2, ep=2, etp=1), {"muon_log_interval": 1}, {**BF16, **MOE}),
    "sphere, layer-wise": (Layout(tp=2, **SHARDED), {"name": "spectral_sphere"}, BF16),
}
LOG = (
    Allowed("megatron_muon/qk_clip/clip.py:scalars", "in iterations that are logged", 0),
    Allowed("megatron_muon/qk_clip/clip.py:by_layer", "likewise, every --muon-qk-log-layers", 0),
    Allowed("megatron_muon/plugin/qk_clip.py:scalars", "likewise, for Megatron's writers", 0),
    Allowed("megatron_muon/plugin/stiefel.py:report", "in iterations that are logged", 0),
    Allowed("megatron_muon/plugin/stiefel.py:scalars", "likewise, for Megatron's writers", 0),
    Allowed("megatron_muon/monitor/recorder.py:log", "losses of iterations that are logged", 1),
)
TOLD = tuple(
    Allowed(f"megatron_muon/plugin/tables.py:{function}", "after a measured step, when the gradients are waited for")
    for function in ("local", "exchange")
)
MOVES = tuple(
    Allowed(f"megatron_muon/optimizers/sleeping.py:{function}", "between steps")
    for function in ("put_to_sleep", "awaken", "_settle")
)

ON_ALL_RANKS = ("layer-wise", "lists", "layer-wise, lent", "experts, layer-wise")


class ArrivedError(Exception):
    """What was measured is on the host."""


@contextmanager
def only_exchanged() -> Iterator[None]:
    """Measured numbers are brought to the host, and no further."""

    def exchange(rows: Rows, *arguments: Any) -> None:
        original(rows, *arguments)
        raise ArrivedError

    original = Rows.exchange
    with patch.object(Rows, "exchange", exchange):
        yield


def two_steps(case: Case, rank: int) -> list[Any]:
    """What a rank communicates in two steps, the second with no wait that is not listed."""
    layout, optimizer, model = case
    backend = model.get("backend", "nccl")
    model = {name: value for name, value in model.items() if name != "backend"}
    with (
        gpus(rank, ranks=4) as world,
        patch.object(dist, "get_backend", lambda group=None: backend),
        free_messages() if model.keys() >= UNEVEN.keys() else nullcontext(),
    ):
        run = start(layout, optimizer=optimizer, early=True, **model)
        assert not model.keys() >= UNEVEN.keys() or shared(run), "nothing is lent"
        first = len(world.calls)
        with world.refusing(FIRST_STEP):
            step(run)
        is_measured = "muon_log_interval" in optimizer
        # What a measured step leaves is read when the next begins. A fake number cannot be judged: see below.
        unread = patch.object(Watching, "_tell", lambda watching: []) if is_measured else nullcontext()
        with unread, world.refusing(STEP[1:] if optimizer.get("muon_nonfinite") == "propagate" else STEP):
            step(run)
        if is_measured:
            with world.refusing((*STEP, *TOLD)), only_exchanged(), pytest.raises(ArrivedError):
                step(run)
        for leaf in run.optimizer.chained_optimizers:
            for state in getattr(getattr(leaf, "optimizer", None), "state", {}).values():
                assert all(value.device == GPU for key, value in state.items() if key != "step")
        return world.calls[first:]


def _step_on_ranks(name: str) -> dict[str, str]:
    def steps(name: str) -> None:
        if name in ON_ALL_RANKS:
            check_meeting({rank: two_steps(STEPS[name], rank) for rank in range(4)})
        else:
            two_steps(STEPS[name], rank=0 if name.startswith("measured") else 1)  # whose routes are the model's

    return outcomes({name: name}, steps)


SLOW = (
    *("layer-wise, float32", "lists without overlap", "experts", "layer-wise, lent, gloo beside NCCL"),
    *("measured, layer-wise", "measured, experts"),
)


@pytest.mark.parametrize("case", with_slow(STEPS, *SLOW))
def test_steps_on_the_device(pool: RankPool, case: str) -> None:
    failed = pool.run(_step_on_ranks, 1, case)[0][case]
    assert not failed, failed


def logged_and_moved() -> None:
    """What is said of a run is read after its steps; state goes to the host and comes back.

    There are no master weights: a fake tensor does not notice that its ``.data`` is on another device.
    """
    with gpus(rank=3, ranks=4) as world:
        model = {"qk_clip": True, "qk_clip_threshold": 0.05, **GQA}
        options = {"name": "stiefel_muon", **MANIFOLD, "muon_qk_log_layers": 1}
        run = start(Layout(tp=2), optimizer=options, early=True, **model)
        forward(run)
        with world.refusing(FIRST_STEP):
            step(run)
        recorder = Recorder(Path(tempfile.mkdtemp()) / "log", 0, {})
        with world.refusing():
            recorder.stopwatch.start()
            recorder.add({"lm loss": torch.zeros((), device=GPU)}, skipped=False)
            recorder.add({"lm loss": torch.zeros(1, device=GPU)}, skipped=False)
            recorder.stopwatch.stop()
            said = recording._stepped.take()
        assert {source.title for source in said} == {"Gradients", "QK-clip", "Stiefel manifold"}
        with world.refusing(LOG):
            lines, record = sources.report(said, 1)
            recorder.log(1, 1.0, True, **record)
            sources.scalars(said, 1)
        assert lines and record["heads_clipped"] == 0

        before = state_bytes(run.optimizer)
        assert before.on_device and not before.elsewhere
        with world.refusing(MOVES):
            assert sleep(run.optimizer) == sum(before.on_device.values())
        assert not state_bytes(run.optimizer).on_device
        with world.refusing(STEP), pytest.raises(ConfigError, match="wake"):
            step(run)
        with world.refusing(MOVES):
            wake(run.optimizer)
        assert state_bytes(run.optimizer) == before
        with world.refusing():
            reset(run.optimizer)
        with world.refusing(FIRST_STEP):
            step(run)


def free_while_asleep(name: str, to: str) -> dict[str, Any]:
    """Bytes on the device before and in sleep, and those of the model."""
    layout, optimizer, model = STEPS[name]
    with gpus(1, ranks=4) as world, patch.object(sleeping, "StateFile", _Nowhere):
        run = start(layout, optimizer=optimizer, early=True, **model)
        with world.refusing(FIRST_STEP):
            step(run)
        sizes = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for chunk in run.chunks
            for tensor in (*chunk.parameters(), *chunk.module.buffers(), *_buffers(chunk))
            if tensor.device == GPU
        }
        gc.collect()
        found = {"before": world.watch.live, "model": sum(sizes.values()), "moved": run.optimizer.sleep(to)}
        gc.collect()
        return {**found, "asleep": world.watch.live}


def _buffers(chunk: Any) -> list[torch.Tensor]:
    buffers = (*chunk.buffers, *chunk.expert_parallel_buffers)
    return [tensor for each in buffers for tensor in (each.param_data, each.grad_data) if tensor is not None]


class _Nowhere:
    """In place of a file: fake tensors have no contents."""

    def __init__(self, folder: str, tensors: list[torch.Tensor]) -> None:
        self.path = Path(folder) / "file"


def _free() -> list[dict[str, Any]]:
    return [free_while_asleep(name, to) for name, to in ASLEEP]


ASLEEP = [("layer-wise", "host"), ("lists", "folder"), ("plain", "host")]


def test_every_byte_is_free_while_asleep(pool: RankPool) -> None:
    """Momentum, masters and their gradients, second moments, Adam's part; scalars of Megatron-Core's are left."""
    for found in pool.run(_free, 1)[0]:
        assert found["moved"] > 0.5 * found["model"] and found["before"] - found["asleep"] >= found["moved"], found
        assert found["asleep"] - found["model"] == 6 * 4, found


def test_what_is_logged_and_moved(pool: RankPool) -> None:
    pool.run(logged_and_moved, 1)


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl", "undefined"])
def test_an_empty_stage_is_on_the_gpu(backend: str) -> None:
    """By whatever names the run's backends were asked for: the others' maxima and verdicts come by NCCL."""
    with World(), patch.object(dist, "get_backend", lambda group=None: backend):
        assert device_of([torch.nn.Module()]) == GPU

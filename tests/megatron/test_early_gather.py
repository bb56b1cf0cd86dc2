"""Gathers of weights that start inside the step of a layer-wise run: hidden behind Newton-Schulz, and the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_routing import GDN, MOE
from tests.pool import RankPool
from tests.slow import with_slow


def start(layout: Layout, options: dict[str, Any], overlap: bool, bucket_size: int | None, early: bool = True) -> Run:
    """A run with or without the early start.

    Args:
        layout: layer-wise.
        options: of :func:`harness.start`.
        overlap: gradients are reduced during the backward pass, weights gathered during the forward pass.
        bucket_size: of the first model chunk; later ones have one bucket of each kind.
        early: whether gathers start in the step.
    """
    from megatron_muon.plugin import factory

    gather_early, ddp = factory.gather_early, {"bucket_size": bucket_size}
    factory.gather_early = gather_early if early else lambda *args: None
    try:
        return harness.start(dataclasses.replace(layout, overlap=overlap), early=True, ddp=ddp, **options)
    finally:
        factory.gather_early = gather_early


@dataclass
class Wire:
    """Carries one gather after another, each for so many seconds.

    Attributes:
        delay: of each.
        exchange: seconds of all gathers.
        exposed: seconds of it in which a rank waits.
        free: when the last one is through.
    """

    delay: float
    exchange: float = 0.0
    exposed: float = 0.0
    free: float = 0.0

    def send(self) -> float:
        """When a gather that starts now will be through."""
        self.exchange += self.delay
        self.free = max(self.free, time.perf_counter()) + self.delay
        return self.free

    def wait(self, since: float, until: float) -> None:
        self.exposed += max(0.0, until - since)
        time.sleep(max(0.0, until - time.perf_counter()))

    @contextlib.contextmanager
    def under(self) -> Iterator[None]:
        """Within, Megatron-Core's gathers of weights take as long as this says; those that it waits for at once too."""
        from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

        original = _ParamAndGradBucketGroup.start_param_sync

        def start_param_sync(group: Any, force_sync: bool = False) -> None:
            since, through = time.perf_counter(), self.send()
            original(group, force_sync)
            if group.param_gather_handle is None:
                self.wait(since, through)
            else:
                group.param_gather_handle = Delayed(group.param_gather_handle, self, through)

        _ParamAndGradBucketGroup.start_param_sync = start_param_sync
        try:
            yield
        finally:
            _ParamAndGradBucketGroup.start_param_sync = original


@dataclass
class Delayed:
    """A gather under way that is not through before its time."""

    handle: Any
    wire: Wire
    through: float

    def wait(self) -> None:
        since = time.perf_counter()
        self.handle.wait()
        self.wire.wait(since, self.through)


LARGE = {"num_layers": 6, "hidden_size": 256, "ffn_hidden_size": 512, "kv_channels": 64}
"""About 20 ms of Newton-Schulz a layer on each of two ranks, in a bucket."""
LAYER = 700_000


def exposed() -> dict[bool, tuple[float, int, str]]:
    """Runs on a rank: with and without the early start, the exposed share of a step, its gathers, and the weights."""
    found = {}
    for early in (False, True):
        run = start(Layout(layer_wise=True), LARGE, False, LAYER, early)
        run.losses(1)  # plans
        wire = Wire(0.01)
        with wire.under():
            run.losses(1)
        found[early] = (wire.exposed / wire.exchange, round(wire.exchange / wire.delay), digest(run))
    return found


def digest(run: Run) -> str:
    """Of the weights of all chunks as they are on this rank."""
    weights = [param.detach().float().numpy().tobytes() for chunk in run.chunks for param in chunk.parameters()]
    return hashlib.sha256(b"".join(weights)).hexdigest()


def test_gathers_are_hidden_behind_newton_schulz(pool: RankPool) -> None:
    for found in pool.run(exposed, 2):
        assert found[True][1] >= 6, "buckets"
        assert found[False][0] >= 0.99
        assert found[True][0] <= 0.2
        assert found[True][2] == found[False][2]


def train(layout: Layout, options: dict[str, Any], overlap: bool, bucket_size: int | None, early: bool) -> list[Any]:
    """Four steps, the loss of an evaluation and the weights after the second, and all weights at the end."""
    run = start(layout, options, overlap, bucket_size, early)
    found: list[Any] = [[run._one_step(), run._one_step()]]
    groups = [group for chunk in run.chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
    assert all(bool(group.param_gather_handle) is (overlap and early) for group in groups)
    for chunk in run.chunks if overlap else ():
        chunk.disable_forward_pre_hook()
    found += [digest(run), evaluate(run)]
    for chunk in run.chunks if overlap else ():
        chunk.enable_forward_pre_hook()
    found.append(run.losses(2))
    for chunk in run.chunks if overlap else ():
        chunk.start_param_sync(force_sync=True)  # as before a checkpoint is saved
    return [*found, digest(run), run.gradient_norms]


def evaluate(run: Run) -> float:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [run.data.micro_batches(99, 0, 2, 2) for _ in run.chunks]
    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=harness.forward_step,
            data_iterator=iterators if run.layout.vpp else iterators[0],
            model=run.chunks if run.layout.vpp else run.chunks[0],
            num_microbatches=2,
            seq_length=run.data.sequence,
            micro_batch_size=2,
            forward_only=True,
        )
    return harness.mean_over_ranks(reports)


def compare(layout: Layout, options: dict[str, Any], sizes: tuple[int | None, ...]) -> int:
    """Runs on a rank: the same losses, norms and weights with and without the early start. The number of chunks."""
    from megatron_muon.engine import stages

    factor, stages._MORE = stages._MORE, 1e6  # as many stages as buckets, however small
    try:
        for size in sizes:
            expected = train(layout, options, False, size, False)
            for overlap in (False, True):
                assert train(layout, options, overlap, size, True) == expected, f"{overlap=}, {size=}"
    finally:
        stages._MORE = factor
    return len(sizes)


CLIPPED = {"qk_clip": True, "qk_clip_threshold": 0.05, "num_query_groups": 2}
BITS = {
    "fp32": (2, Layout(layer_wise=True), {}, (None,)),
    "fp32, buckets": (2, Layout(layer_wise=True), {}, (6000,)),
    "bf16, clipped": (2, Layout(layer_wise=True), {"bf16": True, **CLIPPED}, (6000,)),
    "clipped": (2, Layout(layer_wise=True), CLIPPED, (None, 6000)),
    "bf16": (2, Layout(layer_wise=True), {"bf16": True}, (None, 6000)),
    "rows of Adam": (2, Layout(layer_wise=True), {**GDN, "optimizer": {"muon_gdn_in_proj": "split"}}, (6000,)),
    "hyperball": (
        2,
        Layout(layer_wise=True),
        {"optimizer": {"muon_variant": "hyperball", "muon_scale_mode": "none"}},
        (6000,),
    ),
    "sphere": (
        2,
        Layout(layer_wise=True),
        {
            "optimizer": {
                "name": "spectral_sphere",
                "muon_coefficient_type": "polar_express",
                "muon_num_ns_steps": 8,
            }
        },
        (6000,),
    ),
    "virtual stages": (4, Layout(pp=2, vpp=2, layer_wise=True), {}, (6000,)),
    "expert parallel": (4, Layout(ep=2, layer_wise=True), {**MOE, "bf16": True}, (6000,)),
    "tensor parallel": (4, Layout(tp=2, layer_wise=True), {"bf16": True, **CLIPPED}, (6000,)),
}
SLOW = ("fp32, buckets", "clipped", "bf16", "rows of Adam", "hyperball", "sphere", "expert parallel", "tensor parallel")


@pytest.mark.parametrize("case", with_slow(BITS, *SLOW))
def test_the_bits_are_the_same(pool: RankPool, case: str) -> None:
    world, layout, options, sizes = BITS[case]
    pool.run(compare, world, layout, options, sizes)


def load_at_once(folder: str) -> tuple[str, str]:
    """Runs on a rank: weights that are loaded while gathers are under way stay what was loaded."""
    run = start(Layout(layer_wise=True), {}, True, 6000)
    run.losses(1)
    for chunk in run.chunks:
        chunk.start_param_sync(force_sync=True)
    harness.save_run(run, folder)
    saved = digest(run)
    run.losses(2)
    harness.load_run(run, folder)
    for chunk in run.chunks:
        chunk.start_param_sync(force_sync=True)
    return saved, digest(run)


def test_what_is_loaded_meanwhile_stays(pool: RankPool, tmp_path: Path) -> None:
    for saved, loaded in pool.run(load_at_once, 2, str(tmp_path / "checkpoint")):
        assert loaded == saved


def under_way(captured: bool) -> tuple[bool, str]:
    """Whether gathers are under way after a step; with one CUDA graph of forward and backward pass, of which they are a
    part: those from before it would neither be waited for in it nor repeated with it."""
    wrap = harness.wrap

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        chunks = wrap(*args, **kwargs)
        for chunk in chunks if captured else ():
            chunk.config.cuda_graph_impl = "full_iteration"
        return chunks

    harness.wrap = wrapped
    try:
        run = start(Layout(layer_wise=True), {}, True, 6000)
    finally:
        harness.wrap = wrap
    run._one_step()
    found = any(group.param_gather_handle is not None for chunk in run.chunks for group in chunk.bucket_groups)
    run.losses(1)
    return found, digest(run)


def test_gathers_of_a_captured_forward_pass_do_not_start_before_it(pool: RankPool) -> None:
    (early, bits), (late, same) = pool.run(under_way, 2, False)[0], pool.run(under_way, 2, True)[0]
    assert early and not late and bits == same


def without_adam() -> tuple[int, int]:
    """Runs on a rank, with nothing to train but Muon's matrices: the gathers of a step, and the bucket groups."""
    build_model = harness.build_model

    def frozen(*args: Any, **kwargs: Any) -> Any:
        chunks = build_model(*args, **kwargs)
        for name, param in (each for chunk in chunks for each in chunk.named_parameters()):
            param.requires_grad_(param.dim() == 2 and "embedding" not in name and "output_layer" not in name)
        return chunks

    harness.build_model = frozen
    try:
        run = start(Layout(layer_wise=True), {}, False, 6000)
    finally:
        harness.build_model = build_model
    wire = Wire(0.001)
    with wire.under():
        run.losses(1)
    return round(wire.exchange / wire.delay), sum(len(chunk.bucket_groups) for chunk in run.chunks)


def test_each_bucket_travels_once(pool: RankPool) -> None:
    """The layer-wise optimizer alone, in no chain with Adam's, gathers after its step by itself."""
    for gathers, groups in pool.run(without_adam, 2):
        assert gathers == groups

"""Buckets without padding between owners: the bits of the padded run, and checkpoints from one to the other."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import _world

from megatron_muon.choices import DECOUPLED, PADDED, PARAM_LAYOUTS
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.loading import failure
from tests.megatron.planner import TINY, Planner
from tests.megatron.test_layer_wise_balance import THREE_LAYERS, names_of
from tests.megatron.test_routing import MOE
from tests.pool import RankPool
from tests.slow import with_slow

MODELS = Path(__file__).parents[2] / "examples" / "models"
ALIGNED = 64
"""Elements at whose multiples a weight starts."""


@dataclasses.dataclass
class Found:
    """What a rank has after some steps."""

    losses: list[float]
    norms: list[float]
    weights: str
    """Their bits."""
    state: dict[str, str]
    """The bits of momentum, of second moments and of masters, by the name of the weight."""


def start(choice: str, layout: Layout, options: dict[str, Any], **ddp: Any) -> Run:
    optimizer = {"muon_layer_wise_param_layout": choice, **options.get("optimizer", {})}
    return harness.start(layout, early=True, ddp=ddp, **{**options, "optimizer": optimizer})


def found(run: Run, steps: int) -> Found:
    losses, names = run.losses(steps), names_of(run)
    state: dict[str, list[Any]] = {}
    for leaf in leaves(run.optimizer):
        for param, its in leaf.optimizer.state.items():
            values = [param.data, *(its[key] for key in sorted(its) if isinstance(its[key], torch.Tensor))]
            state[names.get(param, "a slice of Adam's")] = values
    weights = [param.data for chunk in run.chunks for param in chunk.parameters()]
    return Found(losses, run.gradient_norms, bits(weights), {name: bits(values) for name, values in state.items()})


def leaves(optimizer: Any) -> list[Any]:
    inside = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if inside is None else [leaf for each in inside for leaf in leaves(each)]


def bits(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(each.detach().float().numpy().tobytes() for each in tensors)).hexdigest()


def buffers(run: Run) -> list[Any]:
    """Those of Muon's weights."""
    parts = [buffer for chunk in run.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return [buffer for buffer in parts if buffer.params[0].is_managed_by_layer_wise_optimizer]


def gaps(buffer: Any) -> list[int]:
    """Elements between weights and at the end of buckets, in which no weight lies."""
    gone, last = [], 0
    for start, end, _ in sorted(buffer.param_index_map.values()):
        gone, last = [*gone, start - last], end
    return [*gone, buffer.grad_data.numel() - last]


def both(layout: Layout, options: dict[str, Any], ddp: dict[str, Any]) -> list[tuple[Found, int, int]]:
    """Runs on a rank: padded and not, with the largest gap and the number of groups in uneven parts."""
    from megatron.core.distributed import param_and_grad_buffer as module

    result, together = [], module._coalescing_manager

    @contextlib.contextmanager
    def never_of_nothing(group: Any, **how: Any) -> Iterator[Any]:
        """torch's, which fails in older versions where nothing was put together."""
        with together(group, **how) as manager:
            yield manager
            assert _world.pg_coalesce_state[group], "nothing to put together"

    try:
        for choice in PARAM_LAYOUTS:
            # Megatron-Core's own float32 accumulation puts nothing together.
            if choice == DECOUPLED and not ddp.get("reduce_scatter_with_fp32_accumulation"):
                module._coalescing_manager = never_of_nothing
            run = start(choice, layout, options, **ddp)
            groups = [
                group for chunk in run.chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
            ]
            uneven = sum(hasattr(group, "has_uneven_parts") for group in groups)
            result.append((found(run, 4), max(gap for buffer in buffers(run) for gap in gaps(buffer)), uneven))
    finally:
        module._coalescing_manager = together
    return result


BF16 = {"bf16": True}
OWN_PRECISION = {"grad_reduce_in_fp32": False}
CASES: dict[str, tuple[int, Layout, dict[str, Any], dict[str, Any]]] = {
    "three replicas, bf16 averages": (
        3,
        Layout(layer_wise=True),
        {**THREE_LAYERS, **BF16},
        {**OWN_PRECISION, "average_in_collective": True},
    ),
    "virtual stages, accumulated": (
        4,
        Layout(pp=2, vpp=2, layer_wise=True),
        BF16,
        {**OWN_PRECISION, "reduce_scatter_with_fp32_accumulation": True},
    ),
    "remainders, bf16": (
        3,
        Layout(layer_wise=True),
        {**THREE_LAYERS, **BF16, "optimizer": {"muon_master": "remainder", "muon_momentum_dtype": "bf16"}},
        OWN_PRECISION,
    ),
    "experts, without overlap": (4, Layout(ep=2, layer_wise=True, overlap=False), {**MOE, **THREE_LAYERS}, {}),
    "experts": (4, Layout(ep=2, layer_wise=True), {**MOE, **THREE_LAYERS}, {"check_for_nan_in_grad": True}),
    "four replicas, accumulated": (
        4,
        Layout(layer_wise=True),
        {**MOE, **BF16},
        {**OWN_PRECISION, "reduce_scatter_with_fp32_accumulation": True},
    ),
    "local accumulation": (
        3,
        Layout(layer_wise=True),
        {**THREE_LAYERS, **BF16},
        {**OWN_PRECISION, "param_name_patterns_for_fp32_local_accumulation": ("*fc1*",)},
    ),
    "tensor": (4, Layout(tp=2, sp=True, layer_wise=True), THREE_LAYERS, {}),
    "context": (4, Layout(cp=2, layer_wise=True), THREE_LAYERS, {}),
    "gathers when a layer is reached": (2, Layout(layer_wise=True), THREE_LAYERS, {"align_param_gather": False}),
    "one bucket, gathered in the step": (2, Layout(layer_wise=True, overlap=False), THREE_LAYERS, {}),
}
SLOW = sorted(CASES.keys() - {"virtual stages, accumulated"})


@pytest.mark.parametrize("case", with_slow(CASES, *SLOW))
def test_the_bits_of_the_padded_run(pool: RankPool, case: str) -> None:
    """Losses, norms, weights, momentum, second moments and masters after four steps, on every rank."""
    world, layout, options, ddp = CASES[case]
    padded, decoupled = zip(*pool.run(both, world, layout, options, ddp), strict=True)
    for (before, _, even), (after, gap, _) in zip(padded, decoupled, strict=True):
        assert after == before
        assert even == 0 and gap < ALIGNED
    assert max(gap for _, gap, _ in padded) > ALIGNED, "there is padding to leave out"
    assert sum(uneven for _, _, uneven in decoupled) > 0, "and parts that are not of one length"


def resumed(layout: Layout, options: dict[str, Any], folder: str) -> list[tuple[Found, Found]]:
    """Runs on a rank: saved by each, resumed by the other; four steps of the one, two and two of both."""
    pairs = []
    for first, second in (PARAM_LAYOUTS, reversed(PARAM_LAYOUTS)):
        run = start(first, layout, options)
        run.losses(2)
        harness.save_run(run, f"{folder}/{first}")
        uninterrupted = found(run, 2)
        run = start(second, layout, options)
        harness.load_run(run, f"{folder}/{first}")
        run.gradient_norms[:] = uninterrupted.norms[:2]
        pairs.append((found(run, 2), uninterrupted))
    return pairs


def test_checkpoints_of_either_resume_as_the_other(pool: RankPool, tmp_path: Path) -> None:
    layout = Layout(layer_wise=True)
    for pairs in pool.run(resumed, 2, layout, {**MOE, **THREE_LAYERS, **BF16}, str(tmp_path)):
        assert all(other == uninterrupted for other, uninterrupted in pairs)


def mismatched(built: str, asked: str, param_layout: bool) -> tuple[str, str]:
    """Runs on a rank: DDP is built by one option, and the optimizer asked for with another."""
    import megatron_muon

    megatron_muon.install(megatron_muon.MuonConfig(layer_wise_param_layout=built))
    from megatron.core.optimizer import get_megatron_optimizer

    layout = Layout(layer_wise=True)
    layout.initialize()
    chunks = harness.wrap(harness.build_model(layout), layout, param_layout=param_layout)
    config = harness.optimizer_config(layout, muon_layer_wise_param_layout=asked)
    return failure(lambda: get_megatron_optimizer(config, chunks))


@pytest.mark.parametrize(
    ("built", "asked", "param_layout", "how"),
    [
        (PADDED, DECOUPLED, True, "by --layer-wise-param-layout padded"),
        (DECOUPLED, PADDED, True, "by --layer-wise-param-layout decoupled"),
        (DECOUPLED, DECOUPLED, False, "without such a layout"),
    ],
)
def test_buffers_of_another_layout_are_refused(
    pool: RankPool, built: str, asked: str, param_layout: bool, how: str
) -> None:
    for name, text in pool.run(mismatched, 2, built, asked, param_layout):
        assert name == "ConfigError"
        assert f"--layer-wise-param-layout {asked}: DistributedDataParallel was built {how}. Give the flag" in text


def test_plan_tells_of_padding(planner: Planner) -> None:
    """And of the same owners."""
    flags = [*TINY, "--num-layers", "3", "--use-distributed-optimizer"]
    without = [*flags, "--layer-wise-param-layout", DECOUPLED]
    padded = planner.text(flags, 4)
    assert "again of gradients: 9.8% of Muon's elements, up to 2,560 on a rank; none with --layer-wise-param" in padded
    assert "\nNo padding between owners in the buffers of weights and gradients.\n" in planner.text(without, 4)
    stages = [planner.document(each, 4)["stages"][0] for each in (flags, without)]
    assert [stage["padding"] for stage in stages] == [2560, 0]
    assert stages[0]["optimizer_state_bytes"] == stages[1]["optimizer_state_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(path.stem for path in MODELS.iterdir()))
def test_published_models_have_no_padding(planner: Planner, model: str, tmp_path: Path) -> None:
    """To the element."""
    for choice in PARAM_LAYOUTS:
        path = tmp_path / f"{choice}.json"
        flags = ["--model", str(MODELS / f"{model}.args"), "--layer-wise-param-layout", choice, "--json", str(path)]
        assert planner.command(flags).errors == ""
        padding = [stage["padding"] for stage in json.loads(path.read_text())["stages"]]
        assert (max(padding) == 0) is (choice == DECOUPLED)

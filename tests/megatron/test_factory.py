"""The stock factory: what it builds for plain and layer-wise Muon, and what it refuses."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import ConfigError, Muon
from megatron_muon.plugin.optimizer_state import leaves
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool


def structure(layout: Layout, options: dict[str, Any]) -> list[str]:
    """Class names of the optimizers inside, outermost first."""
    run = harness.start(layout, **options)

    def walk(optimizer: Any) -> list[str]:
        names = [type(optimizer).__name__]
        for part in getattr(optimizer, "chained_optimizers", []):
            names += walk(part)
        return names

    run.losses(2)
    return walk(run.optimizer)


WRAPPERS = [(False, "LayerWiseFP32Optimizer"), (True, "Float16OptimizerWithFloat16Params")]


@pytest.mark.parametrize("bf16,wrapper", [(False, "FP32Optimizer"), (True, "Float16OptimizerWithFloat16Params")])
def test_plain(pool: RankPool, bf16: bool, wrapper: str) -> None:
    for names in pool.run(structure, 2, Layout(), {"bf16": bf16}):
        assert names == ["ChainedOptimizer", wrapper, wrapper]


@pytest.mark.parametrize("bf16,wrapper", WRAPPERS)
def test_layer_wise(pool: RankPool, bf16: bool, wrapper: str) -> None:
    for names in pool.run(structure, 2, Layout(layer_wise=True), {"bf16": bf16}):
        assert names == ["ChainedOptimizer", "LayerWiseDistributedOptimizer", wrapper, "DistributedOptimizer"]


@pytest.mark.parametrize("bf16,wrapper", WRAPPERS)
def test_layer_wise_without_parameter_layout(pool: RankPool, bf16: bool, wrapper: str) -> None:
    for names in pool.run(structure, 2, Layout(layer_wise=True), {"bf16": bf16, "param_layout": False}):
        assert names == ["LayerWiseDistributedOptimizer", wrapper, wrapper]


def test_dist_muon_is_layer_wise(pool: RankPool) -> None:
    """Megatron's older spelling, from code."""
    names = pool.run(structure, 2, Layout(layer_wise=True), {"optimizer": {"name": "dist_muon"}})[0]
    assert "LayerWiseDistributedOptimizer" in names


def replicas_after_training(layout: Layout, options: dict[str, Any]) -> tuple[list[float], bool]:
    """Losses, and whether all data-parallel replicas hold the same bits."""
    run = harness.start(layout, **options)
    for inner in (part.optimizer for part, _ in leaves(run.optimizer) if isinstance(part.optimizer, Muon)):
        # Ranks have shared out the others, and buckets are sent when these are final.
        with pytest.raises(ConfigError, match="get_megatron_optimizer has built"):
            inner.add_param_group({"params": [torch.nn.Parameter(torch.ones(4, 4))]})
    losses = run.losses(6)
    same = True
    for chunk in run.chunks:
        for param in chunk.parameters():
            others = [torch.empty_like(param.data) for _ in range(dist.get_world_size())]
            dist.all_gather(others, param.data.contiguous())
            same &= all(torch.equal(other, param.data) for other in others)
    return losses, same


@pytest.mark.parametrize(
    ("bf16", "param_layout"),
    [
        pytest.param(False, True, marks=pytest.mark.slow),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_layer_wise_equals_plain(pool: RankPool, bf16: bool, param_layout: bool) -> None:
    """Sharding over data parallelism moves work and changes nothing: same seeds, same losses, equal replicas.

    float32: gradients are averaged by other collectives (reduce-scatter), which round differently. bfloat16 weights
    round to 8 bits, so that such a difference now and then flips a weight by 2^-9 of its size. Losses of about 4 were
    measured to differ by 2e-7 and 8e-4 in six steps.
    """
    tolerance = 2**-9 if bf16 else 2e-6
    plain, same = pool.run(replicas_after_training, 2, Layout(), {"bf16": bf16})[0]
    assert same
    options = {"bf16": bf16, "param_layout": param_layout}
    sharded, same = pool.run(replicas_after_training, 2, Layout(layer_wise=True), options)[0]
    assert same
    assert sharded == pytest.approx(plain, abs=tolerance)


def layer_wise_twice(name: str, param_layout: bool) -> list[list[float]]:
    """Losses of a layer-wise run by what its config says of Megatron's distributed optimizer."""
    found = []
    for distributed in (False, True):
        config = {"optimizer": name, "use_distributed_optimizer": distributed}
        run = harness.start(Layout(layer_wise=True), optimizer=config, param_layout=param_layout)
        found.append(run.losses(4))
    return found


@pytest.mark.parametrize(("name", "param_layout"), [("muon", True), ("dist_muon", False)])
def test_a_layer_wise_config_may_ask_for_the_distributed_optimizer(
    pool: RankPool, name: str, param_layout: bool
) -> None:
    """As verl always does. To Megatron-Core that is the layer-wise optimizer, whatever the field says."""
    for without, asked in pool.run(layer_wise_twice, 2, name, param_layout):
        assert asked == without and without[-1] < without[0]


def refusal(layout: Layout, options: dict[str, Any]) -> str:
    import megatron_muon

    try:
        harness.start(layout, **options)
    except megatron_muon.ConfigError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    "layout,optimizer,message",
    [
        (Layout(ddp_buffers=True), {}, "use_distributed_optimizer True with --optimizer muon, not layer-wise: "),
        (Layout(), {"muon_num_ns_steps": 0}, "--muon-num-ns-steps 0: give a whole number of at least 1"),
        (Layout(), {"muon_no_such_knob": 1}, "OptimizerConfig.muon_no_such_knob 1: no such Muon option"),
        (Layout(), {"fp16": True}, "--fp16"),
        (
            Layout(),
            {"use_distributed_optimizer": True},
            "OptimizerConfig.use_distributed_optimizer True with --optimizer muon, not layer-wise: ",
        ),
        (
            Layout(),
            {"optimizer_cuda_graph": True},
            "(--optimizer-cuda-graph): its weights are on cpu",
        ),
    ],
)
def test_refusals(pool: RankPool, layout: Layout, optimizer: dict[str, Any], message: str) -> None:
    for answer in pool.run(refusal, 2, layout, {"optimizer": optimizer}):
        assert message in answer


def refusal_of_unmatched_buffers() -> str:
    """DDP with reduce-scatter buffers, wrapped without Megatron's layer-wise layout, under a layer-wise optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    layout = Layout(layer_wise=True)
    layout.initialize()
    chunk = harness.build_model(layout)[0]
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=False)
    wrapped = DistributedDataParallel(config=chunk.config, ddp_config=ddp_config, module=chunk)
    try:
        get_megatron_optimizer(harness.optimizer_config(layout), [wrapped])
    except megatron_muon.ConfigError as error:
        return str(error)
    return "accepted"


def test_layer_wise_without_its_buffers_is_refused(pool: RankPool) -> None:
    for answer in pool.run(refusal_of_unmatched_buffers, 2):
        assert "without a layer-wise parameter layout" in answer


def defaults_and_explicit_values() -> list[str]:
    from megatron.core.optimizer import OptimizerConfig

    import megatron_muon

    before = OptimizerConfig(optimizer="muon").muon_tp_mode
    megatron_muon.install()
    ours = OptimizerConfig(optimizer="muon").muon_tp_mode
    explicit = OptimizerConfig(optimizer="muon", muon_tp_mode="blockwise").muon_tp_mode
    megatron_muon.uninstall()
    return [before, ours, explicit, OptimizerConfig(optimizer="muon").muon_tp_mode]


def test_default_of_a_config_built_in_code(pool: RankPool) -> None:
    assert pool.run(defaults_and_explicit_values, 1)[0] == ["blockwise", "auto", "blockwise", "blockwise"]


def said_of_blockwise(layout: Layout) -> list[str]:
    """The first words of a run whose config has blockwise, by whether the user has said it to this package.

    Of one with a period, too.
    """
    import megatron_muon

    found = []
    blockwise = {"muon_tp_mode": "blockwise"}
    for installed, asked in (
        (None, {"muon_blockwise_period": 5}),
        (None, blockwise),
        (megatron_muon.MuonConfig(tp_mode="blockwise"), blockwise),
    ):
        megatron_muon.install(installed)
        with contextlib.redirect_stdout(io.StringIO()) as text:
            harness.start(layout, optimizer=asked, num_layers=1)
        found.append(text.getvalue().partition("weight  ")[0])
    return found


def test_blockwise_is_said_before_all_else(pool: RankPool) -> None:
    """A framework's recipe that has it is told apart from a choice on the command line or of install()."""
    period, recipes, chosen = pool.run(said_of_blockwise, 2, Layout(tp=2))[0]
    assert "WARNING muon_blockwise_period 5 is another optimizer than Muon on one device" in period
    assert "orthogonalized by itself in all but every 5. step, so that it changes" in period
    assert "factors are those of the shards, at 1 x the learning rate. Leave it out for the same update" in period
    for text in (recipes, chosen):
        assert text.splitlines()[1].startswith("*****")
        assert "WARNING muon_tp_mode blockwise is another optimizer than Muon on one device" in text
        assert "(now 2)" in text
    assert "Neither the command line nor install() asks for it" in recipes and "Neither" not in chosen
    period, recipes, chosen = pool.run(said_of_blockwise, 1, Layout())[0]
    for text, asked in ((recipes, "muon_tp_mode blockwise"), (period, "muon_blockwise_period 5")):
        assert f"{asked}: plain Muon while the tensor-parallel size is 1" in text
    assert "another size" in chosen


def knobs_in_the_optimizer() -> Any:
    import megatron_muon

    knobs = {"momentum": 0.8, "nesterov": True, "scale_mode": "unit_rms_norm", "num_ns_steps": 7, "eps": 1e-9}
    run = harness.start(Layout(), optimizer={f"muon_{name}": value for name, value in knobs.items()})
    inner = [part.optimizer for part in run.optimizer.chained_optimizers]
    muon = next(optimizer for optimizer in inner if isinstance(optimizer, megatron_muon.Muon))
    return {name: getattr(muon.config, name) for name in knobs} == knobs


def test_every_knob_reaches_the_optimizer_from_code(pool: RankPool) -> None:
    assert pool.run(knobs_in_the_optimizer, 1) == [True]


def soap(install: bool) -> tuple[dict[str, str], float]:
    """Weight -> class of the optimizer that holds it, with Megatron's SOAP; and the loss before the first update.

    Not those that follow: where ATen's kernels are those of AVX2, SOAP of emerging-optimizers reads memory that nobody
    has written, and two runs of the same program differ.
    """
    run = harness.start(Layout(), optimizer={"name": "soap"}, install=install)
    names = {param: name for name, param in run.chunks[0].named_parameters()}
    held = {
        names[param]: type(part.optimizer).__name__
        for part in run.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for param in group["params"]
    }
    return held, run.losses(1)[0]


def test_other_emerging_optimizers_are_as_without_the_hooks(pool: RankPool) -> None:
    alone, hooked = (pool.run(soap, 1, install)[0] for install in (False, True))
    assert set(alone[0].values()) == {"SOAP", "GroupStepAdamW"}
    assert hooked == alone

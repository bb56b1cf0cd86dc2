"""How DDP wraps layer-wise models: the groups of buckets of later chunks, and the models of builders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_cpu_parallelism import ADAM, HYBRID, TOLERANCE
from tests.megatron.test_layer_wise_balance import arguments
from tests.pool import RankPool

VIRTUAL = Layout(pp=2, vpp=2, layer_wise=True, overlap=False)


def train(layout: Layout, weights: str) -> tuple[list[float], list[set[bool]]]:
    """Runs on a rank: losses, and kinds of weights in each group of buckets. The harness compares replicas."""
    run = harness.start(layout, weights=weights)
    return run.losses(4), [kinds(group) for chunk in run.chunks for group in chunk.bucket_groups]


def kinds(group: Any) -> set[bool]:
    """Whether its weights are the layer-wise optimizer's."""
    return {getattr(param, "is_managed_by_layer_wise_optimizer", False) for param in group.params}


def test_replicas_of_later_chunks_stay_together(pool: RankPool, tmp_path: Path) -> None:
    """Bit for bit after each step, Adam's weights too; and the losses are those of one process."""
    folder = str(tmp_path / "initial")
    pool.run(harness.save_initial_weights, 1, folder)
    expected = pool.run(train, 1, Layout(), folder)[0][0]
    for losses, groups in pool.run(train, 4, VIRTUAL, folder):
        assert groups == [{False}, {True}, {True}, {False}] or groups == [{True}, {False}, {True}, {False}]
        assert losses == pytest.approx(expected, abs=4e-6)  # see test_layouts


def groups_of_two_chunks() -> dict[str, Any]:
    """Runs on a rank: groups of a chunk under overlap and with 8-bit weights, and what is said of a mixed group."""
    import megatron_muon
    from megatron_muon import ConfigError

    megatron_muon.install()
    layout = Layout(layer_wise=True, bucket_size=3000)
    layout.initialize()
    from megatron.core.distributed import distributed_data_parallel as ddp
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer import get_megatron_optimizer

    def chunks() -> list[Any]:
        return [harness.build_model(layout, num_layers=1)[0] for _ in range(2)]

    first, second = harness.wrap(chunks(), layout)
    found: dict[str, Any] = {"first": [kinds(group) for group in first.bucket_groups]}
    found["second"] = [kinds(group) for group in second.bucket_groups]
    group, found["gathered"] = second.bucket_groups[-1], []
    while group is not None:
        found["gathered"].append(second.bucket_groups.index(group))
        group = group.next_param_gather_bucket_group
    # As with weights in 8 bits, of which the last bucket's group gets all others: the buffer's type decides.
    for buffer in first.buffers:
        buffer.param_dtype = torch.uint8 if kinds(buffer) == {True} else buffer.param_dtype
    found["8 bits"] = [kinds(group) for group in ddp.partition_buckets(first.buffers)]

    upstream = ddp.partition_buckets.__wrapped__
    with mock.patch.object(ddp, "partition_buckets", upstream):
        mixed = harness.wrap(chunks(), dataclasses.replace(layout, overlap=False))
    try:
        get_megatron_optimizer(harness.optimizer_config(layout), mixed)
    except ConfigError as error:
        found["refused"] = str(error)
    accumulating = param_and_grad_buffer.reduce_scatter_with_fp32_accumulation
    with mock.patch.object(param_and_grad_buffer, "dist_reduce_scatter_func", accumulating):
        try:
            get_megatron_optimizer(harness.optimizer_config(layout), [first])
        except ConfigError as error:
            found["accumulates elsewhere"] = str(error)
    return found


def test_no_group_has_buckets_of_two_optimizers(pool: RankPool) -> None:
    for found in pool.run(groups_of_two_chunks, 2):
        assert len(found["first"]) > 2 and all(len(each) == 1 for each in found["first"])
        assert sorted(map(sorted, found["second"])) == [[False], [True]]
        assert found["gathered"] == [1, 0]
        assert found["8 bits"][-1] == {False} and all(each == {True} for each in found["8 bits"][:-1])
        assert found["refused"].startswith("Model chunk 1: ") and "install() before" in found["refused"]
        assert "Give it to all models of the process, or to none" in found["accumulates elsewhere"]


def layouts(optimizer: str, param_layout: bool, **ddp: Any) -> tuple[list[Any], list[Any]]:
    """Runs on a rank: where weights lie, by a builder's function and by that of ``get_model``; None without layout."""
    import megatron_muon

    megatron_muon.install()
    layout = Layout(layer_wise=True)
    layout.initialize()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.dist_utils import prepare_existing_model_chunks_for_distributed_training

    def chunks() -> list[Any]:
        return [harness.build_model(layout)[0] for _ in range(2)]

    ours = chunks()
    run = {"use_layer_wise_distributed_optimizer": True, "use_layer_wise_param_layout": param_layout}
    with arguments(optimizer=optimizer, **run):
        built = prepare_existing_model_chunks_for_distributed_training(
            ours,
            ours[0].config,
            ProcessGroupCollection.use_mpu_process_groups(),
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, **ddp),
        )
        size = sum(param.numel() for chunk in built for param in chunk.parameters()) // ddp.pop("num_buckets")
        provided = harness.wrap(chunks(), dataclasses.replace(layout, bucket_size=size), ddp=ddp)
    return places(built), places(provided)


def places(chunks: list[Any]) -> list[Any]:
    found = []
    for chunk in chunks:
        names = {param: name for name, param in chunk.named_parameters()}
        assert len(chunk.bucket_groups) > 1 or chunk.full_param_layout is None or chunk is chunks[1]
        found.append(
            chunk.full_param_layout
            and {
                key: (buffer.bucket_indices, {names[param]: place for param, place in buffer.param_index_map.items()})
                for key, buffer in chunk.full_param_layout.layouts.items()
            }
        )
    return found


@pytest.mark.parametrize(
    ("optimizer", "param_layout", "same"),
    [("muon", True, True), ("muon", False, False), ("soap", True, False)],
)
def test_models_from_builders_are_laid_out_alike(
    pool: RankPool, optimizer: str, param_layout: bool, same: bool
) -> None:
    """In the buckets of ``get_model``; but not with ``--no-use-layer-wise-param-layout``, or for other optimizers."""
    for built, provided in pool.run(layouts, 2, optimizer, param_layout, num_buckets=3, overlap_grad_reduce=True):
        assert (built == provided) is same
        assert same or built == [None, None]


def with_and_without_overlap() -> list[list[float]]:
    """Runs on a rank: losses of GatedDeltaNet under Adam, whose convolution lies in a bucket with later layers."""
    layouts = [Layout(local=True, ddp_buffers=True, overlap=overlap) for overlap in (True, False)]
    return [harness.start(layout, optimizer=ADAM, **HYBRID).losses(3) for layout in layouts]


def test_layers_wait_for_weights_of_modules_that_they_do_not_call(pool: RankPool) -> None:
    for overlapped, not_overlapped in pool.run(with_and_without_overlap, 2):
        assert overlapped == pytest.approx(not_overlapped, abs=TOLERANCE)

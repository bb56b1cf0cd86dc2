"""No bucket group has buckets of two optimizers: it is gathered after the step of one of them."""

from types import SimpleNamespace

import pytest
import torch

from megatron.core.distributed import param_and_grad_buffer
from megatron.core.distributed.param_and_grad_buffer import partition_buckets


class Group:
    def __init__(self, buckets, ddp_config, data_parallel_group, data_parallel_world_size):
        self.buckets = buckets
        self.ranks = (ddp_config, data_parallel_group, data_parallel_world_size)


def bucket(name, is_layer_wise=None):
    param = torch.nn.Parameter(torch.ones(1))
    if is_layer_wise is not None:
        param.is_managed_by_layer_wise_optimizer = is_layer_wise
    return SimpleNamespace(name=name, params_list=[param])


def buffer(buckets, dtype=torch.bfloat16):
    return SimpleNamespace(
        buckets=buckets,
        param_dtype=dtype,
        ddp_config="config",
        data_parallel_group="group",
        data_parallel_world_size=2,
    )


def names(groups):
    assert all(group.ranks == ("config", "group", 2) for group in groups)
    return [[each.name for each in group.buckets] for group in groups]


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    monkeypatch.setattr(param_and_grad_buffer, "_ParamAndGradBucketGroup", Group)


def test_one_group_for_each_optimizer():
    """As DDP asks for the later chunks of a virtual pipeline."""
    muon, adam = buffer([bucket("m0", True), bucket("m1", True)]), buffer([bucket("a0", False)])
    assert names(partition_buckets([muon, adam], True)) == [["m0", "m1"], ["a0"]]
    assert names(partition_buckets([adam, muon], True)) == [["a0"], ["m0", "m1"]]


def test_one_optimizer_has_one_group():
    for tag in (True, False, None):
        buffers = [buffer([bucket("0", tag)]), buffer([bucket("1", tag)])]
        assert names(partition_buckets(buffers, True)) == [["0", "1"]]


def test_fp8_weights_and_biases_of_two_optimizers():
    weights = buffer([bucket("w0", True), bucket("w1", True)], torch.uint8)
    biases = buffer([bucket("b", False)])
    assert names(partition_buckets([weights, biases])) == [["w0"], ["w1"], ["b"]]
    untagged = [buffer([bucket("w0"), bucket("w1")], torch.uint8), buffer([bucket("b")])]
    assert names(partition_buckets(untagged)) == [["w0"], ["w1", "b"]]

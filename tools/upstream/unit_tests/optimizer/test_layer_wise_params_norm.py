"""--log-params-norm: owners' main weights, once each, and no weight that is yet to be gathered."""

from types import SimpleNamespace

import pytest
import torch

from megatron.core.optimizer import layer_wise_optimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.training.utils.common_utils import _get_param_data


@pytest.fixture
def weights(monkeypatch):
    """Two bfloat16 weights, the first of which is this rank's, and a float32 one."""
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
    params = [torch.nn.Parameter(torch.ones(2, 2, dtype=dtype)) for dtype in dtypes]

    def shard(self, optimizers, layouts):
        optimizers[0].param_groups[0]["params"] = [params[0]]

    class Wrapped:
        def __init__(self, optimizer, *args):
            [own] = optimizer.param_groups[0]["params"]
            own.main_param = own.detach().float() + 1

    monkeypatch.setattr(LayerWiseDistributedOptimizer, "shard_params", shard)
    monkeypatch.setattr(LayerWiseDistributedOptimizer.__base__, "__init__", lambda *args: None)
    monkeypatch.setattr(layer_wise_optimizer, "Float16OptimizerWithFloat16Params", Wrapped)
    return params


def build(monkeypatch, params, ranks):
    monkeypatch.setattr(layer_wise_optimizer, "get_pg_size", lambda group: ranks)
    inner = SimpleNamespace(param_groups=[{"params": list(params)}])
    config = SimpleNamespace(bf16=True, overlap_param_gather=True)
    monkeypatch.setattr(
        LayerWiseDistributedOptimizer, "set_bucket_layerwise_params_list", lambda *args: None
    )
    LayerWiseDistributedOptimizer([inner], config, None, None, [])


def test_owners_alone_count(monkeypatch, weights):
    build(monkeypatch, weights, ranks=2)
    own, is_sharded = _get_param_data(weights[0], False, True)
    assert is_sharded and torch.equal(own, torch.full((2, 2), 2.0))
    assert _get_param_data(weights[1], False, True) == (None, True)
    assert not hasattr(weights[1], "main_param")  # that of an owner


def test_what_every_rank_has_counts_everywhere(monkeypatch, weights):
    build(monkeypatch, weights, ranks=2)
    assert _get_param_data(weights[2], False, True)[1] is False
    copy, is_sharded = _get_param_data(weights[1], True, True)  # with force_create_fp32_copy
    assert not is_sharded and torch.equal(copy, torch.ones(2, 2))


def test_one_rank_shares_nothing_out(monkeypatch, weights):
    build(monkeypatch, weights, ranks=1)
    assert _get_param_data(weights[0], False, True)[1] is False
    assert _get_param_data(weights[1], False, True)[1] is False

"""Weights that Muon leaves to the scalar optimizer, in param groups and in DDP's buffers alike."""

import pytest
import torch

from megatron.core.optimizer.emerging_optimizers import _is_nonlinear_or_embedding
from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer


@pytest.mark.parametrize(
    "shape,tags,is_scalar",
    [
        ((4, 4), {}, False),
        ((4, 4), {"skip_orthogonalization": False, "use_muon": True}, False),
        ((4, 4), {"skip_orthogonalization": True}, True),
        ((4, 4), {"use_muon": False}, True),
        ((4, 4), {"is_embedding_or_output_parameter": True}, True),
        ((4,), {}, True),
        ((2, 4, 4), {}, True),
    ],
)
def test_param_groups_and_buffers_agree(shape, tags, is_scalar):
    param = torch.nn.Parameter(torch.ones(shape))
    for name, value in tags.items():
        setattr(param, name, value)
    assert _is_nonlinear_or_embedding(param) is is_scalar
    assert is_managed_by_layer_wise_optimizer(param) is not is_scalar

"""Which weight goes to Muon."""

import pytest
import torch

from megatron_muon.routing import _is_nonlinear_or_embedding


def _parameter(*shape: int, **tags: object) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.zeros(shape))
    for name, value in tags.items():
        setattr(param, name, value)
    return param


@pytest.mark.parametrize(
    "param,expected",
    [
        (_parameter(4, 4), False),
        (_parameter(4), True),
        (_parameter(2, 3, 4), True),
        (_parameter(4, 4, is_embedding_or_output_parameter=True), True),
        (_parameter(4, 4, skip_orthogonalization=True), True),
        (_parameter(4, 4, skip_orthogonalization=False), False),
        (_parameter(4, 4, use_muon=False), True),
        (_parameter(4, 4, use_muon=True), False),
        (_parameter(1, 4), True),
        (_parameter(4, 1), True),
        # One row on this rank is not one row of the whole:
        (_parameter(1, 4, tensor_model_parallel=True, partition_dim=0), False),
        (_parameter(1, 4, tensor_model_parallel=True, partition_dim=1), True),
        (_parameter(1, 4, tensor_model_parallel=False, partition_dim=0), True),
    ],
)
def test_predicate(param: torch.nn.Parameter, expected: bool) -> None:
    assert _is_nonlinear_or_embedding(param) is expected

"""One attribute says which optimizer updates a parameter, and one predicate reads it."""

import pytest
import torch

from megatron.core.optimizer.emerging_optimizers import _is_nonlinear_or_embedding
from megatron.core.optimizer.layer_wise_optimizer import (
    is_managed_by_layer_wise_optimizer,
    tag_params_for_buffer_routing,
)
from megatron.core.optimizer.optimizer import copy_optimizer_param_metadata
from megatron.core.optimizer.param_route import add_param_router, is_matrix_param, route_params


def parameter(*shape, **attributes):
    param = torch.nn.Parameter(torch.ones(shape))
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


@pytest.mark.parametrize(
    "param,is_matrix",
    [
        (parameter(4, 4), True),
        (parameter(4), False),
        (parameter(2, 4, 4), False),
        (parameter(4, 4, is_embedding_or_output_parameter=True), False),
        (parameter(4, 4, optimizer_route="scalar"), False),
        (parameter(2, 4, 4, optimizer_route="matrix"), True),  # experts in one weight
    ],
)
def test_all_who_ask_hear_the_same(param, is_matrix):
    assert is_matrix_param(param) is is_matrix
    assert _is_nonlinear_or_embedding(param) is not is_matrix
    assert is_managed_by_layer_wise_optimizer(param) is is_matrix


def test_a_route_that_does_not_exist():
    with pytest.raises(ValueError, match="'matrix' or 'scalar', not 'adam'"):
        is_matrix_param(parameter(4, 4, optimizer_route="adam"))


def test_main_params_keep_the_route():
    copy = parameter(4, 4)
    source = parameter(4, 4, optimizer_route="scalar", optimizer_metadata="rows of q, k, v")
    copy_optimizer_param_metadata(copy, source)
    assert (copy.optimizer_route, copy.optimizer_metadata) == ("scalar", "rows of q, k, v")


def test_routers_are_asked_before_buffers_are_laid_out():
    def router(chunk):
        chunk.weight.optimizer_route = "scalar"

    model = torch.nn.Linear(4, 4)
    remove = add_param_router(router)
    try:
        tag_params_for_buffer_routing([model])
    finally:
        remove()
    assert model.weight.is_managed_by_layer_wise_optimizer is False
    del model.weight.optimizer_route
    route_params([model])
    assert is_matrix_param(model.weight)

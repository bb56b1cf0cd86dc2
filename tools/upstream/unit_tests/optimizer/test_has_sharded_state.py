"""An optimizer that gives its checkpoint state itself, inside each of the wrappers."""

from types import SimpleNamespace

import pytest
import torch

from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
)


class Toy(torch.optim.SGD):
    """State of a form of its own."""

    def sharded_state(self, model_sharded_state_dict, main_params, is_loading):
        self.given = main_params
        return {"toy": model_sharded_state_dict["model"], "is_loading": is_loading}

    def load_sharded_state(self, state_dict, main_params):
        self.loaded = state_dict, main_params


def wrapped(kind, optimizer_class):
    """A wrapper of a bfloat16 weight and its copy; constructors need a GPU or process groups."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    copy = torch.nn.Parameter(torch.ones(2))
    updated = weight if kind is FP32Optimizer else copy
    wrapper = kind.__new__(kind)
    wrapper.optimizer = optimizer_class([updated], lr=0.1)
    wrapper.init_state_fn = lambda *args: pytest.fail(
        "no state is made up for one that gives its own"
    )
    wrapper.float16_groups, wrapper.fp32_from_float16_groups = [[weight]], [[copy]]
    wrapper.fp32_from_fp32_groups = [[]]
    wrapper.config = SimpleNamespace()
    return wrapper, {weight: updated}


@pytest.mark.parametrize("kind", [Float16OptimizerWithFloat16Params, FP32Optimizer])
def test_wrappers_ask_the_optimizer(kind):
    wrapper, main_params = wrapped(kind, Toy)
    state = wrapper.sharded_state_dict({"model": 1}, is_loading=True)
    assert state == {"toy": 1, "is_loading": True}
    wrapper.load_state_dict(state)
    assert wrapper.optimizer.loaded == (state, main_params)
    assert wrapper.optimizer.given == main_params


def test_the_layer_wise_optimizer_leaves_it_alone(monkeypatch):
    """It rewrites replica ids and param groups of the usual form, which this is not."""
    wrapper, _ = wrapped(Float16OptimizerWithFloat16Params, Toy)
    optimizer = LayerWiseDistributedOptimizer.__new__(LayerWiseDistributedOptimizer)
    optimizer.chained_optimizers = [wrapper]
    state = optimizer.sharded_state_dict({"model": 1})
    assert state == {"toy": 1, "is_loading": False}
    optimizer.load_state_dict(state)
    assert wrapper.optimizer.loaded[0] == state


def test_others_are_saved_as_ever():
    wrapper, _ = wrapped(FP32Optimizer, torch.optim.SGD)
    wrapper.init_state_fn = lambda *args: None
    state = wrapper.sharded_state_dict({}, is_loading=True)
    assert set(state) == {"state", "param_groups"}
    assert ChainedOptimizer.load_state_dict is not LayerWiseDistributedOptimizer.load_state_dict

"""An emerging optimizer from another package: name, flags, options, and hooks in the factory."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from megatron.core import optimizer as factory
from megatron.core.optimizer import (
    EmergingOptimizerEntry,
    OptimizerConfig,
    emerging_optimizers,
    register_emerging_optimizer,
)
from megatron.training.arguments import add_megatron_arguments
from megatron.training.training import get_megatron_optimizer_config


class Toy(torch.optim.SGD):
    def __init__(self, params, power):
        super().__init__(params, lr=0.1)
        self.power = power


def add_arguments(parser):
    parser.add_argument("--toy-power", type=int, default=2)


def entry(**others):
    return EmergingOptimizerEntry(
        Toy,
        init_state_fn=lambda opt, config=None: None,
        config_to_kwargs=lambda config, chunks, groups: dict(config.optimizer_options),
        add_arguments=add_arguments,
        options_from_args=lambda args: {"power": args.toy_power},
        **others,
    )


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(
        emerging_optimizers, "_EMERGING_OPTIMIZERS", dict(emerging_optimizers._EMERGING_OPTIMIZERS)
    )


def test_names_are_taken_once():
    register_emerging_optimizer("toy", entry())
    for taken in ("toy", "adam", "sgd", "dist_toy"):
        with pytest.raises(ValueError, match=taken):
            register_emerging_optimizer(taken, entry())
    register_emerging_optimizer("toy", entry(), replace=True)


def config_of(flags):
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        setattr(args, name, torch.float32)  # as validate_args() does
    return get_megatron_optimizer_config(args)[0]


def test_flags_arrive_in_the_config():
    register_emerging_optimizer("toy", entry())
    config = config_of("--optimizer toy --toy-power 3 --lr 0.1")
    assert (config.optimizer, config.optimizer_options) == ("toy", {"power": 3})
    other = config_of("--optimizer adam --lr 0.1")
    assert other.optimizer_options == {} and OptimizerConfig().optimizer_options == {}


def test_the_factory_prepares_builds_and_hands_over(monkeypatch):
    """Without the package emerging-optimizers, too: nothing of it is needed."""
    seen = []
    model = torch.nn.Linear(2, 2, bias=False)
    groups = SimpleNamespace(tp="tp", mp="mp")
    register_emerging_optimizer(
        "toy",
        entry(
            prepare=lambda config, chunks, pg: seen.append(("prepare", chunks, pg)),
            finish=lambda optimizer, config, chunks, pg: ("finished", optimizer),
        ),
    )

    def param_groups(model_chunks, config, overrides):
        seen.append("param groups")
        return [{"params": list(model.parameters()), "is_expert_parallel": False}]

    monkeypatch.setattr(factory, "HAVE_EMERGING_OPTIMIZERS", False)
    monkeypatch.setattr(factory, "_get_param_groups", param_groups)
    monkeypatch.setattr(factory, "ChainedOptimizer", lambda results: results[0])
    monkeypatch.setattr(factory, "log_single_rank", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        factory, "FP32Optimizer", lambda optimizer, config, fn: SimpleNamespace(optimizer=optimizer)
    )
    config = OptimizerConfig(optimizer="toy", lr=0.1, optimizer_options={"power": 4})
    made, optimizer = factory._get_megatron_emerging_optimizer(config, [model], {}, groups)
    assert made == "finished" and optimizer.optimizer.power == 4
    assert seen == [("prepare", [model], groups), "param groups"]


def test_what_is_not_registered_is_refused_by_name():
    config = OptimizerConfig(optimizer="no_such_optimizer", lr=0.1)
    with pytest.raises((ValueError, ImportError), match="no_such_optimizer"):
        factory._get_megatron_emerging_optimizer(config, [], {}, SimpleNamespace())

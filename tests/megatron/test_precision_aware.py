"""Megatron's flags for numbers of fewer bits: taken as Muon's own, in arguments, configs and their copies."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_arguments import parsed
from tests.megatron.test_config_fields import by_fields
from tests.pool import RankPool

FLAGS = "--optimizer muon --bf16 --use-precision-aware-optimizer"


def taken(config: Any) -> tuple[str, str, bool, str]:
    """What a config asks for: masters, momentum, whether Megatron's flag is still there, gradients."""
    assert (config.main_params_dtype, config.exp_avg_dtype, config.exp_avg_sq_dtype) == (torch.float32,) * 3
    gradients = str(config.main_grads_dtype).removeprefix("torch.")
    return config.muon_master, config.muon_momentum_dtype, config.use_precision_aware_optimizer, gradients


def configs() -> list[list[Any]]:
    """Runs on a rank: configs made in code, and what became of them in copies."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import OptimizerConfig

    class OfAFramework(OptimizerConfig):
        def __post_init__(self) -> None:
            super().__post_init__()

    found = []
    for cls, given in (
        (OptimizerConfig, {"bf16": True}),
        (OptimizerConfig, {"bf16": True, "exp_avg_dtype": torch.bfloat16, "main_grads_dtype": torch.bfloat16}),
        (OfAFramework, {"bf16": True, "muon_momentum_dtype": "int8", "store_param_remainders": False}),
        (OptimizerConfig, {}),
    ):
        config = cls(optimizer="muon", use_precision_aware_optimizer=True, **given)
        copies = (config, copy.copy(config), copy.deepcopy(config), dataclasses.replace(config), by_fields(config))
        found.append(list(map(taken, copies)))
    adam = OptimizerConfig(optimizer="adam")
    found.append([adam.use_precision_aware_optimizer_no_fp8_or_ds_fp8, adam.muon_master])
    return found


def test_configs(pool: RankPool) -> None:
    *found, adam = pool.run(configs, 1)[0]
    assert found == [
        [("remainder", "auto", False, "float32")] * 5,
        [("remainder", "bf16", False, "bfloat16")] * 5,
        [("fp32", "int8", False, "float32")] * 5,
        [("fp32", "auto", False, "float32")] * 5,  # float32 weights have no copies
    ]
    assert adam == [False, "fp32"]


def asked_for(cases: list[str]) -> list[Any]:
    """Runs on a rank: what command lines ask for, and the type of DDP's gradients; or the error."""
    from megatron_muon.plugin import options

    found: list[Any] = []
    for flags in cases:
        outcome = parsed(flags)
        if isinstance(outcome, str):
            found.append(outcome)
            continue
        args, config = outcome
        assert options.current().master == config.muon_master
        found.append((*taken(config), args.accumulate_allreduce_grads_in_fp32))
    return found


def test_command_lines(pool: RankPool) -> None:
    cases = {
        FLAGS: ("remainder", "auto", False, "float32", True),
        f"{FLAGS} --exp-avg-dtype bf16 --main-grads-dtype bf16": ("remainder", "bf16", False, "bfloat16", False),
        f"{FLAGS} --muon-momentum-dtype int8": ("remainder", "int8", False, "float32", True),
        f"{FLAGS} --muon-momentum-dtype int8 --exp-avg-dtype bf16": (
            "--exp-avg-dtype bf16 with --muon-momentum-dtype int8: these contradict each other; give one."
        ),
        f"{FLAGS} --exp-avg-dtype fp8": (
            "--exp-avg-dtype fp8: momentum is kept in float32, bfloat16 or int8; leave it out, and add "
            "--muon-momentum-dtype int8."
        ),
        "--optimizer muon --muon-master remainder": (
            "--muon-master remainder without --bf16: it is what a bfloat16 weight lacks of its float32 value; add "
            "--bf16, or leave it out: float32 weights have no copies."
        ),
    }
    for (flags, expected), found in zip(cases.items(), pool.run(asked_for, 1, list(cases))[0], strict=True):
        assert found == expected, flags


def built(ddp: dict[str, Any]) -> tuple[list[str], str]:
    """Runs on a rank: an optimizer whose config was told by attributes, as frameworks do: its wrappers; the error."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    from megatron_muon.plugin.optimizer_state import leaves

    layout = Layout()
    layout.initialize()
    chunks = harness.wrap(harness.build_model(layout, bf16=True, num_layers=1), layout, ddp=ddp)
    config = harness.optimizer_config(layout, bf16=True)
    config.use_precision_aware_optimizer, config.main_grads_dtype = True, torch.bfloat16
    config.exp_avg_dtype = torch.bfloat16
    try:
        optimizer = get_megatron_optimizer(config, chunks)
    except megatron_muon.ConfigError as error:
        return [], str(error)
    assert taken(config) == ("remainder", "bf16", False, "bfloat16")
    harness.Run(layout, chunks, optimizer).losses(1)
    return [type(leaf).__name__ for leaf, _ in leaves(optimizer)], ""


def test_attributes(pool: RankPool) -> None:
    names, _ = pool.run(built, 1, {"grad_reduce_in_fp32": False})[0]
    assert names == ["Float16OptimizerWithoutCopies", "Float16OptimizerWithFloat16Params"]
    _, error = pool.run(built, 1, {})[0]
    assert "--main-grads-dtype torch.bfloat16 with DistributedDataParallelConfig.grad_reduce_in_fp32 True" in error


@pytest.mark.parametrize("name", ["overlap_cpu_optimizer_d2h_h2d", "optimizer_cpu_offload"])
def test_the_host_computes_no_step(pool: RankPool, name: str) -> None:
    found = pool.run(refused_in_code, 1, name)[0]
    assert found.startswith(f"--{name.replace('_', '-')} with --optimizer muon") and "--muon-offload" in found


def refused_in_code(name: str) -> str:
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import OptimizerConfig

    try:
        OptimizerConfig(optimizer="muon", **{name: True})
    except megatron_muon.ConfigError as error:
        return str(error)
    return "accepted"

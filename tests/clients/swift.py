"""ms-swift's own functions: its arguments, DDP, optimizer and checkpoints, without a model from a hub.

``BaseMegatronTrainer`` builds its optimizer from ``args`` alone; ``args`` are the fields of ``MegatronArguments``.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch

from tests.megatron import harness
from tests.megatron.harness import COUNTING, Layout, Run


def arguments(layout: Layout, **changes: Any) -> Any:
    """``MegatronArguments`` with its defaults, its check of Muon's options and ``changes``."""
    from swift.megatron.arguments.megatron_args import MegatronArguments

    values = {
        each.name: each.default if each.default is not dataclasses.MISSING else each.default_factory()
        for each in dataclasses.fields(MegatronArguments)
        if each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING
    }
    values |= {
        "optimizer": "dist_muon" if layout.layer_wise else "muon",
        "lr": 0.01,
        "min_lr": 0.001,
        "train_iters": 8,
        "global_batch_size": COUNTING.global_batch,
        "start_weight_decay": 0.1,
        "end_weight_decay": 0.1,
        "muon_fp32_matmul_prec": "highest",
        "muon_tp_mode": "duplicated",
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": 1,
        "bf16": False,
        "fp16": False,
        "finetune": False,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "overlap_param_gather_with_optimizer_step": False,
    }
    values |= {name: torch.float32 for name, value in values.items() if name.endswith("_dtype") and value == "fp32"}
    args = SimpleNamespace(**{**values, **changes})
    args.__dataclass_fields__ = MegatronArguments.__dataclass_fields__
    args._muon_routes_through_param_overrides = MegatronArguments._muon_routes_through_param_overrides
    args._check_muon_mcore_support = lambda: MegatronArguments._check_muon_mcore_support(args)
    MegatronArguments._check_muon(args)
    del args.__dataclass_fields__, args._check_muon_mcore_support, args._muon_routes_through_param_overrides
    return args


def start(layout: Layout, weights: str = "", *, model: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A run whose DDP, optimizer and scheduler ms-swift has made."""
    from swift.megatron.trainers.base import BaseMegatronTrainer
    from swift.megatron.utils import wrap_model

    import megatron_muon

    megatron_muon.install()
    layout.initialize()
    chunks = harness.build_model(layout, **(model or {}))
    if weights:
        harness.load_weights(chunks, weights)

    class Trainer(BaseMegatronTrainer):
        """Its optimizer alone: the rest of a trainer is data and a model from a hub."""

        def __init__(self, args: Any, wrapped_models: list[Any]) -> None:
            self.args, self.wrapped_models = args, wrapped_models

        train_step = _prepare_batch = forward_step = None

    args = arguments(layout, **changes)
    Trainer.__abstractmethods__ = frozenset()
    trainer = Trainer(args, wrap_model(args, chunks))
    optimizer, scheduler = trainer.get_optimizer_and_scheduler()
    return Run(layout, trainer.wrapped_models, optimizer), scheduler, args


def train(run: Run, scheduler: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses += run.losses(1)
        scheduler.step(run.data.global_batch)
    return losses

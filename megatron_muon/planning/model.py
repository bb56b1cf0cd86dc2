"""The model of every pipeline stage, built by Megatron-Core itself, on one process and without memory.

Weights live on the ``meta`` device: they have shapes, dtypes and attributes but no storage. Process groups are torch's
``fake`` ones, which know their size and this rank and never communicate.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_muon._patching import Original, Patches, PatchSet


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds on its first rank (tensor, expert and data parallel rank 0)."""

    number: int  # of the stage, from 0
    chunks: list[torch.nn.Module]  # its model chunks, one for each virtual stage


def model_config(args: argparse.Namespace) -> Any:
    """Megatron's model configuration (``GPTModelConfig`` or ``HybridModelConfig``) of validated arguments."""
    from megatron.training import argument_utils

    if args.hybrid_layer_pattern is not None:
        return argument_utils.hybrid_config_from_args(args)
    return argument_utils.gpt_config_from_args(args)


def build_stages(args: argparse.Namespace) -> Iterator[Stage]:
    """Build the stages one after the other; only one is alive at a time unless the caller keeps it.

    The arguments are validated, and the CPU runtime is installed.
    """
    _FAKE_GROUPS.apply()
    try:
        for number in range(args.pipeline_model_parallel_size):
            with _process_groups(args, number):
                yield Stage(number, _build_chunks(args))
    finally:
        _FAKE_GROUPS.revert()


def _build_chunks(args: argparse.Namespace) -> list[torch.nn.Module]:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module

    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = []
    for vp_stage in range(args.virtual_pipeline_model_parallel_size or 1):
        config = model_config(args)  # one for each chunk: the specs of the one before may have been changed
        config.transformer.perform_initialization = False
        builder = config.get_builder_cls()(config)
        with _Meta():
            chunk = builder.build_model(
                groups, vp_stage=vp_stage if args.virtual_pipeline_model_parallel_size else None
            )
            chunks.append(Float16Module(config.transformer, chunk) if args.bf16 else chunk)
    return chunks


class _Meta(TorchFunctionMode):
    """Puts new tensors on the ``meta`` device, whatever device the code names.

    ``torch.device("meta")`` leaves calls that name a device alone, and knows torch's functions by identity, which the
    redirects of the CPU runtime change.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None or getattr(func, "__name__", "") in _FACTORIES:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


_FACTORIES = (
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros"),
)


@contextlib.contextmanager
def _process_groups(args: argparse.Namespace, stage: int) -> Iterator[None]:
    """Megatron's groups in the smallest world of this layout, seen from the first rank of a pipeline stage.

    Data parallelism changes no weight, so there are as many ranks as one copy of all dense and expert weights needs.
    """
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    expert_ranks = args.expert_tensor_parallel_size * args.expert_model_parallel_size
    ranks_of_stage = math.lcm(args.tensor_model_parallel_size, expert_ranks)
    world = ranks_of_stage * args.pipeline_model_parallel_size
    dist.init_process_group("fake", rank=stage * ranks_of_stage, world_size=world, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)  # modules ask for its states when they are built
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


_PATCHES = Patches()


@_PATCHES.around(
    "megatron.core.parallel_state:create_group",
    "a plan is made in one process: its groups have a size and a rank, and nobody to talk to",
)
def _fake_group(original: Original, ranks: Any = None, *args: Any, group_desc: Any = None, **kwargs: Any) -> Any:
    return dist.new_group(ranks, backend="fake", group_desc=group_desc)


_FAKE_GROUPS = PatchSet("megatron_muon.planning", _PATCHES)

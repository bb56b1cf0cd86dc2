"""The command line of a training run, from a file and from arguments, parsed and checked by Megatron itself."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_muon.errors import ConfigError
from megatron_muon.refusals import MUON, QK_CLIP, Settings, refuse
from megatron_muon.refusals.cpu import CPU
from megatron_muon.refusals.plan import READ

PLAN_PREFIX = "# plan:"
"""Begins a comment of a flag file that holds options of the plan: training ignores them."""


@dataclass(frozen=True)
class FlagFile:
    """A file of Megatron flags."""

    flags: tuple[str, ...]  # the flags and their values, as on a command line
    plan_options: tuple[str, ...]  # those behind ``# plan:``


@dataclass(frozen=True)
class Layout:
    """How many ranks there are, and how they divide the work."""

    world: int  # number of ranks
    tensor: int  # tensor-parallel size of dense weights
    expert_tensor: int  # tensor-parallel size of experts
    pipeline: int  # number of pipeline stages
    context: int  # context-parallel size
    expert: int  # expert-parallel size

    @property
    def ranks_of_stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.pipeline

    @property
    def data(self) -> int:
        """Replicas of a dense weight: data- and context-parallel ranks together, as optimizers count them."""
        return self.ranks_of_stage // self.tensor

    @property
    def expert_data(self) -> int:
        """Replicas of an expert's weight."""
        return self.ranks_of_stage // (self.expert_tensor * self.expert)

    def position(self, rank: int) -> Position:
        """Of a rank in its pipeline stage: numbered tensor first, then data; for experts tensor, expert, then data."""
        return Position(
            rank % self.tensor,
            rank // self.tensor,
            rank % self.expert_tensor,
            rank // (self.expert_tensor * self.expert),
        )


@dataclass(frozen=True)
class Position:
    """Where a rank of a pipeline stage stands, from 0."""

    tensor: int  # in the tensor-parallel group
    data: int  # among the replicas of dense weights
    expert_tensor: int  # in the tensor-parallel group of experts
    expert_data: int  # among the replicas of an expert's weights


def read_flags(path: str | Path) -> FlagFile:
    """Read a file of Megatron flags.

    Args:
        path: of a text file with flags and values as on a command line (quotes as in a shell), on any number of lines;
            lines that begin with ``#`` are comments, and one that begins with ``# plan:`` holds options of the plan.

    Raises:
        ConfigError: if the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(
            f"--model {path}: {reason}. Give a text file of Megatron's flags, as on a command line."
        ) from None
    flags: list[str] = []
    options: list[str] = []
    for line in map(str.strip, lines):
        if line.startswith(PLAN_PREFIX):
            options += shlex.split(line.removeprefix(PLAN_PREFIX))
        elif not line.startswith("#"):
            flags += shlex.split(line)
    return FlagFile(tuple(flags), tuple(options))


def parse(flags: Sequence[str], world: int | None) -> tuple[argparse.Namespace, Layout, list[str]]:
    """Parse and check the flags of a training run as ``megatron.training`` does.

    Args:
        flags: of Megatron and this package; of a flag given twice the last value counts.
        world: number of ranks; by default the smallest that holds the model once.

    Returns:
        the validated arguments, the layout, and the names of settings that do not enter the plan.

    Raises:
        ConfigError: for an unknown flag, a wrong value or a combination that cannot be.
    """
    parsers: list[argparse.ArgumentParser] = []

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.error = _refuse  # type: ignore[method-assign]  # argparse would print Megatron's whole usage
        parsers.append(parser)
        return parser

    from megatron.training import arguments

    with _command_line(flags), quiet(), as_config_error():
        args = arguments.parse_args(provider)
        layout = _layout(args, world)
        refuse(READ, args)
        # Context parallelism is left out below: without its ranks, batches are checked against the right replicas.
        args.world_size = layout.world // layout.context
        left_out, values = _leave_out(args, parsers[0])
        if args.global_batch_size is None and args.micro_batch_size is not None:
            # Megatron's default: one micro-batch a replica.
            args.global_batch_size = args.micro_batch_size * layout.data // layout.context
        arguments.validate_args(args)
        _refuse_left_out(values, args)
    if args.vocab_size is None and args.padded_vocab_size is None:
        raise ConfigError("--vocab-size is not given: a plan builds no tokenizer, so the flags must tell its size.")
    return args, layout, left_out


def _layout(args: argparse.Namespace, world: int | None) -> Layout:
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    context, expert = args.context_parallel_size, args.expert_model_parallel_size
    expert_tensor = args.expert_tensor_parallel_size or tensor
    sizes = {
        "--tensor-model-parallel-size": tensor,
        "--pipeline-model-parallel-size": pipeline,
        "--context-parallel-size": context,
        "--expert-model-parallel-size": expert,
        "--expert-tensor-parallel-size": expert_tensor,
    }
    for flag, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{flag} {size}: give a whole number of at least 1.")
    least = math.lcm(tensor * context, expert_tensor * expert) * pipeline
    world = least if world is None else world
    if world < 1 or world % least:
        raise ConfigError(
            f"--world-size {world}: tensor {tensor} x context {context} x pipeline {pipeline} ranks hold the dense "
            f"weights and expert tensor {expert_tensor} x expert {expert} x pipeline {pipeline} those of experts, so "
            f"that the number of ranks must be a multiple of {least}."
        )
    return Layout(world, tensor, expert_tensor, pipeline, context, expert)


def _leave_out(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[list[str], dict[str, Any]]:
    """Set what the CPU runtime refuses, and what changes no weight, to Megatron's default.

    Returns:
        what was set, as flags, and the values by name.
    """
    left_out, values = [], {}
    settings = Settings(args)
    for row in CPU:
        (condition,) = row.when
        if condition.name not in _KEPT and row.holds(settings):
            left_out.append(condition.said(settings))
            values[condition.name] = getattr(args, condition.name)
            setattr(args, condition.name, parser.get_default(condition.name))
    return left_out, values


def _refuse_left_out(values: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Refuse what a run would because of settings that were left out; the checks of ``args`` do not see them."""
    rows = (row for row in (*MUON, *QK_CLIP) if any(condition.name in values for condition in row.when))
    refuse(rows, values, args)


_KEPT = (
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "use_precision_aware_optimizer",
    "optimizer_cpu_offload",
    "transformer_impl",
    "experimental_attention_variant",
    "hybrid_layer_pattern",
    "position_embedding_type",
    "yaml_cfg",
)
"""Refused on the CPU for a reason that holds for a plan too: they change weights, or where these or their state are."""


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}. Give Megatron's flags as a training run takes them.")


@contextlib.contextmanager
def as_config_error() -> Iterator[None]:
    """Turn what Megatron raises at flags that it cannot honour (mostly assertions) into :class:`ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except (AssertionError, ImportError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        # Many of Megatron's assertions say nothing: then the line that failed says most.
        failed = traceback.extract_tb(error.__traceback__)[-1].line
        raise ConfigError(f"Megatron-Core refuses these flags: {str(error).strip() or failed}") from error


@contextlib.contextmanager
def _command_line(flags: Sequence[str]) -> Iterator[None]:
    """Megatron reads ``sys.argv`` and the environment of a launcher."""
    argv, environment = sys.argv, os.environ.copy()
    sys.argv = ["plan", *flags]
    os.environ.update(RANK="0", LOCAL_RANK="0")
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Megatron prints every argument, and prints and logs while it builds."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)

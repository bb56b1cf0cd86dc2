"""Checkpoints: the optimizer's state in one form, read at every layout, by Muon and by Adam."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_muon._patching import Patch
from megatron_muon.checkpoint.errors import CheckpointError, raise_together
from megatron_muon.checkpoint.record import ACCEPT, RECORD
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.plugin import options
from megatron_muon.plugin.adam_buckets import buckets_of_adam
from megatron_muon.plugin.checkpoint_files import EARLIER, reason_of
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.optimizer_state import held_by

if TYPE_CHECKING:
    from megatron_muon.checkpoint.canonical import Request

__all__ = ["patches"]

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}

_SCHEDULED = ("max_lr", "min_lr", "wd_mult", "start_wd", "end_wd", "scalar_lr_mult", "scalar_wd_mult")
"""What the schedule reads from param groups, and what is told as a multiple of it."""


def patches() -> list[Patch]:
    """Hooks on the factory's result, on loading, and on what is stored about a checkpoint's form."""
    return [
        Patch(
            "megatron.core.optimizer:get_megatron_optimizer",
            _with_canonical_state,
            "each wrapper saves its own form, which other layouts and other optimizers cannot read",
        ),
        Patch(
            "megatron.core.dist_checkpointing.serialization:load",
            _with_resolution,
            "what to read depends on what the checkpoint has, which is known here",
        ),
        Patch(
            "megatron.training.checkpointing:_build_sharded_state_dict_metadata",
            _with_mark,
            "an Adam run learns from the metadata that it is given Muon's checkpoint, and passes its own guards",
        ),
    ]


def _with_canonical_state(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_megatron_optimizer(config: Any, model_chunks: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        optimizer = original(config, model_chunks, *args, **kwargs)
        groups = kwargs.get("pg_collection")
        _attach(optimizer, model_chunks, is_ours(config.optimizer), options.of(config).ckpt_changes == ACCEPT, groups)
        return optimizer

    return get_megatron_optimizer


def _attach(optimizer: Any, chunks: Sequence[torch.nn.Module], ours: bool, accept: bool, groups: Any) -> None:
    """Replace how ``optimizer`` is saved and loaded; one that is not ours only where the checkpoint is."""
    from megatron_muon.checkpoint import canonical, replicas  # they import Megatron-Core, which install() must not
    from megatron_muon.checkpoint.changes import describe_changes

    upstream_sharded, upstream_load = optimizer.sharded_state_dict, optimizer.load_state_dict
    pending: list[canonical.Request] = []

    def sharded_state_dict(model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        marked = RECORD in (kwargs.get("metadata") or {})
        pending.clear()
        if not ours and not (is_loading and marked):
            return upstream_sharded(model_sharded_state_dict, is_loading, **kwargs)
        if not is_loading:
            return canonical.saved_state(held_by(optimizer, create=True), model_sharded_state_dict)
        buckets = functools.partial(buckets_of_adam, chunks, groups=groups)
        pending.append(canonical.Request(held_by(optimizer, create=True), model_sharded_state_dict, accept, buckets))
        return pending[0]

    def load_state_dict(state_dict: Any) -> None:
        if not pending:
            upstream_load(state_dict)
            return
        request = pending.pop()
        record = request.fill(state_dict)
        if getattr(options.training_arguments(), "use_checkpoint_opt_param_scheduler", False):
            request.take_numbers(_SCHEDULED)
        replicas.check(chunks, request.held, groups)
        text = describe_changes(request, record)
        if dist.get_rank() == 0:
            print(text, flush=True)

    optimizer.sharded_state_dict, optimizer.load_state_dict = sharded_state_dict, load_state_dict


def _with_resolution(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(
        sharded_state_dict: Any, checkpoint_dir: Any, sharded_strategy: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        requests = list(_requests(sharded_state_dict))
        if not requests:
            return original(sharded_state_dict, checkpoint_dir, sharded_strategy, *args, **kwargs)
        from megatron_muon.checkpoint import weights

        stored = _read(str(checkpoint_dir))
        _check_model(sharded_state_dict, stored)
        described = weights.described(sharded_state_dict)  # of the model alone: requests are still empty
        for request in requests:
            request.resolve(stored)
        if sharded_strategy is None:
            from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

            sharded_strategy = TorchDistLoadShardedStrategy()
        with _failing_together(sharded_strategy, checkpoint_dir):
            loaded = original(sharded_state_dict, checkpoint_dir, sharded_strategy, *args, **kwargs)
        # With some values of ``strict`` the keys that do not match come with the state.
        weights.check(described, loaded[0] if isinstance(loaded, tuple) else loaded, stored)
        return loaded

    return load


@contextlib.contextmanager
def _failing_together(strategy: Any, folder: Any) -> Iterator[None]:
    """Each rank reads its tensors for itself: if one cannot, the others must not wait for it."""
    reader = getattr(strategy, "base_strategy", strategy)
    read = reader.load

    def load(*args: Any, **kwargs: Any) -> Any:
        found, problems = None, []
        try:
            found = read(*args, **kwargs)
        except (Exception, CheckpointException) as error:
            problems = [reason_of(error)]
        raise_together(problems, f"{folder} is damaged: what is stored cannot be read:", EARLIER)
        return found

    reader.load = load
    try:
        yield
    finally:
        del reader.load


def _read(folder: str) -> Stored:
    """The contents of a checkpoint, or the same error on all ranks."""
    stored, problem = None, []
    try:
        stored = Stored.read(folder)
    except Exception as error:  # whatever a damaged index makes of the readers
        problem = [str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"]
    raise_together(problem, f"{folder} cannot be read:", "Load an earlier checkpoint (--ckpt-step).")
    assert stored is not None
    return stored


def _check_model(state: Any, stored: Stored) -> None:
    """The checkpoint is of this model, or the same error on all ranks."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    from megatron_muon.checkpoint.sharding import tensors_of

    sharded, _ = extract_sharded_tensors_and_factories(state)
    raise_together(
        stored.misfits(tensors_of(nested_values(sharded))),
        f"{stored.folder} is not a checkpoint of this model:",
        "Give the options of the model that saved it (--use-checkpoint-args takes them from there), or another --load.",
    )


def _requests(state: Any) -> Iterator[Request]:
    from megatron_muon.checkpoint.canonical import Request

    if isinstance(state, Request):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _requests(value)


def _with_mark(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def _build_sharded_state_dict_metadata(args: Any, *rest: Any, **kwargs: Any) -> dict[str, Any]:
        metadata = original(args, *rest, **kwargs)
        return {**metadata, **_SHARDING, RECORD: True} if is_ours(args.optimizer) else metadata

    return _build_sharded_state_dict_metadata

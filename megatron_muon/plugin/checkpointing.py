"""Checkpoints: the optimizer's state in one form, read at every layout, by Muon and by Adam."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_muon._patching import Patch
from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import CheckpointError, raise_together
from megatron_muon.checkpoint.record import ACCEPT, RECORD
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.plugin import options
from megatron_muon.plugin.adam_buckets import buckets_of_adam
from megatron_muon.plugin.checkpoint_files import EARLIER, reason_of
from megatron_muon.plugin.groups import groups_or_default, ranks_of
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.optimizer_state import has_parts, held_by

if TYPE_CHECKING:
    from megatron_muon.checkpoint.canonical import Request

__all__ = ["is_canonical", "patches"]

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
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_megatron_optimizer(config: Any, model_chunks: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        optimizer = original(config, model_chunks, *args, **kwargs)
        if has_parts(optimizer):
            return optimizer
        groups = signature.bind(config, model_chunks, *args, **kwargs).arguments.get("pg_collection")
        accept = options.of(config).ckpt_changes == ACCEPT
        _CanonicalState(optimizer, model_chunks, is_ours(config.optimizer), accept, groups).attach()
        return optimizer

    return get_megatron_optimizer


def is_canonical(optimizer: Any) -> bool:
    """Whether the optimizer saves and loads its state in the space of the model's weights."""
    return all(
        isinstance(getattr(method, "__self__", None), _CanonicalState)
        for method in (optimizer.sharded_state_dict, optimizer.load_state_dict)
    )


class _CanonicalState:
    """How an optimizer is saved and loaded: in the space of the model's weights.

    One that is not ours is, if the checkpoint is; else it is as ever.
    """

    def __init__(
        self, optimizer: Any, chunks: Sequence[torch.nn.Module], ours: bool, accept: bool, pg_collection: Any
    ) -> None:
        self._optimizer, self._chunks, self._ours, self._accept = optimizer, chunks, ours, accept
        self._pg_collection = pg_collection
        self._upstream_sharded, self._upstream_load = optimizer.sharded_state_dict, optimizer.load_state_dict
        self._request: Request | None = None

    def attach(self) -> None:
        """Take the place of the optimizer's own methods."""
        self._optimizer.sharded_state_dict = self.sharded_state_dict
        self._optimizer.load_state_dict = self.load_state_dict

    def sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        """What is saved, or what is to be read: see :mod:`megatron_muon.checkpoint.canonical`."""
        from megatron_muon.checkpoint import canonical  # it imports Megatron-Core, which install() must not

        self._request = None
        marked = RECORD in (kwargs.get("metadata") or {})
        if not self._ours and not (is_loading and marked):
            return self._upstream_sharded(model_sharded_state_dict, is_loading, **kwargs)
        ranks = ranks_of(self._pg_collection)

        def save() -> dict[str, Any]:
            return canonical.saved_state(ranks, held_by(self._optimizer, create=True), model_sharded_state_dict)

        def request() -> Request:
            held = held_by(self._optimizer, create=True)
            groups = groups_or_default(self._pg_collection)
            buckets = functools.partial(buckets_of_adam, self._chunks, groups=groups)
            return canonical.Request(ranks, held, model_sharded_state_dict, self._accept, buckets)

        if not is_loading:
            return ranks.together(save)
        self._request = ranks.together(request)
        return self._request

    def load_state_dict(self, state_dict: Any) -> None:
        """Take what was read."""
        request, self._request = self._request, None
        if request is None:
            self._upstream_load(_by_number(state_dict))
            return
        text = request.ranks.together(lambda: self._fill(request, state_dict))
        if request.ranks.is_first:
            print(text, flush=True)

    def _fill(self, request: Request, state_dict: Any) -> str:
        from megatron_muon.checkpoint import replicas
        from megatron_muon.checkpoint.changes import describe_changes

        record = request.fill(state_dict)
        if getattr(options.training_arguments(), "use_checkpoint_opt_param_scheduler", False):
            request.take_numbers(_SCHEDULED)
        replicas.check(request.ranks, self._chunks, request.held, groups_or_default(self._pg_collection))
        return describe_changes(request, record)


def _by_number(state_dict: Any) -> Any:
    """Chains say their state in lists, which Megatron-Core's layer-wise optimizer does not take back."""
    return {i: _by_number(each) for i, each in enumerate(state_dict)} if isinstance(state_dict, list) else state_dict


def _with_resolution(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(
        sharded_state_dict: Any, checkpoint_dir: Any, sharded_strategy: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        requests = list(_requests(sharded_state_dict))
        if not requests:
            return original(sharded_state_dict, checkpoint_dir, sharded_strategy, *args, **kwargs)
        from megatron_muon.checkpoint import weights

        def together[T](work: Callable[[], T]) -> T:
            """Agreed on by the ranks of each model, if there are several with an optimizer of their own."""
            for request in requests:
                work = functools.partial(request.ranks.together, work)
            return work()

        def resolve() -> tuple[weights.Described, Stored]:
            described = weights.described(sharded_state_dict)  # of the model alone: requests are still empty
            tensors = _model_tensors(sharded_state_dict)
            stored = _read(str(checkpoint_dir))
            for request in requests:
                _check_model(request.ranks, tensors, stored)
                request.resolve(stored)
            return described, stored

        def check() -> None:
            # With some values of ``strict`` the keys that do not match come with the state.
            state = loaded[0] if isinstance(loaded, tuple) else loaded
            for request in requests:
                weights.check(request.ranks, described, state, stored)

        described, stored = together(resolve)
        if sharded_strategy is None:
            from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

            sharded_strategy = TorchDistLoadShardedStrategy()
        with _reading(sharded_strategy, checkpoint_dir, together):
            loaded = original(sharded_state_dict, checkpoint_dir, sharded_strategy, *args, **kwargs)
        together(check)
        return loaded

    return load


@contextlib.contextmanager
def _reading(strategy: Any, folder: Any, together: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Each rank reads its tensors for itself: if one cannot, the others must not wait for it."""
    reader = getattr(strategy, "base_strategy", strategy)
    read = reader.load

    def load(*args: Any, **kwargs: Any) -> Any:
        def work() -> Any:
            try:
                return read(*args, **kwargs)
            except (Exception, CheckpointException) as error:
                title = f"{folder} is damaged: what is stored cannot be read:"
                raise CheckpointError(f"{title}\n  {reason_of(error)}\n{EARLIER}") from error

        return together(work)

    reader.load = load
    try:
        yield
    finally:
        del reader.load


def _read(folder: str) -> Stored:
    """The contents of a checkpoint."""
    try:
        return Stored.read(folder)
    except Exception as error:  # whatever a damaged index makes of the readers
        problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder} cannot be read:\n  {problem}\nLoad an earlier checkpoint (--ckpt-step)."
        ) from error


def _model_tensors(state: Any) -> list[Any]:
    """The ``ShardedTensor`` of the model."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    from megatron_muon.checkpoint.sharding import tensors_of

    sharded, _ = extract_sharded_tensors_and_factories(state)
    return list(tensors_of(nested_values(sharded)))


def _check_model(ranks: Ranks, tensors: list[Any], stored: Stored) -> None:
    """The checkpoint is of this model, or the same error on all ranks."""
    raise_together(
        ranks,
        stored.misfits(tensors),
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
        ours = is_ours(getattr(args, "optimizer", None))  # which Megatron-Core does not ask for here
        return {**metadata, **_SHARDING, RECORD: True} if ours else metadata

    return _build_sharded_state_dict_metadata

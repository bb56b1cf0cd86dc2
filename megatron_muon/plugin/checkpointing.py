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
from megatron_muon.plugin.early_gather import settle
from megatron_muon.plugin.groups import groups_or_default, ranks_of
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.optimizer_state import held_by

if TYPE_CHECKING:
    from megatron_muon.checkpoint.canonical import Model, Request

__all__ = ["is_canonical", "keep_canonical", "patches"]

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}

_SCHEDULED = ("max_lr", "min_lr", "wd_mult", "start_wd", "end_wd", "scalar_lr_mult", "scalar_wd_mult")
"""What the schedule reads from param groups, and what is told as a multiple of it."""


def patches() -> list[Patch]:
    """Hooks on loading, and on what is stored about a checkpoint's form."""
    return [
        Patch(
            "megatron.core.dist_checkpointing.serialization:load",
            _with_resolution,
            "what to read depends on what the checkpoint has, which is known here",
        ),
        Patch(
            "megatron.core.dist_checkpointing.serialization:save",
            _with_form,
            "frameworks refuse to load other forms than this one at another layout, by what the metadata say",
        ),
    ]


def keep_canonical(optimizer: Any, config: Any, chunks: Sequence[torch.nn.Module], pg_collection: Any) -> None:
    """Save and load a model's optimizer in one form: those of its wrappers no other layout or optimizer can read.

    Args:
        optimizer: Megatron-Core's.
        config: the ``OptimizerConfig``.
        chunks: of the model on this rank.
        pg_collection: the model's process groups; None for those of ``parallel_state``.
    """
    accept = options.of(config).ckpt_changes == ACCEPT
    state = _CanonicalState(optimizer, chunks, is_ours(config.optimizer), accept, pg_collection)
    optimizer.sharded_state_dict, optimizer.load_state_dict = state.sharded_state_dict, state.load_state_dict
    if is_ours(config.optimizer):
        state.tell_unsaved()


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
        self._request: Request | _Either | None = None

    def sharded_state_dict(self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        """What is saved, or what is to be read: see :mod:`megatron_muon.checkpoint.canonical`."""
        self._request = None
        if not self._ours:
            return self._upstream(model_sharded_state_dict, is_loading, **kwargs)
        from megatron_muon.checkpoint import canonical  # it imports Megatron-Core, which install() must not

        ranks, metadata = ranks_of(self._pg_collection), kwargs.get("metadata") or {}
        if is_loading:
            self._request = ranks.together(lambda: self._asked(ranks, model_sharded_state_dict, metadata))
            return self._request

        def save() -> dict[str, Any]:
            held = held_by(self._optimizer, create=True)
            return canonical.saved_state(ranks, held, self._model(model_sharded_state_dict, metadata))

        return ranks.together(save)

    def _upstream(self, model_state: Any, is_loading: bool, **kwargs: Any) -> Any:
        """Megatron-Core's own; to be read, it may become ours when the checkpoint is known."""
        metadata = kwargs.get("metadata") or {}
        if not is_loading or metadata.get("distrib_optim_sharding_type") == "fsdp_dtensor":
            return self._upstream_sharded(model_state, is_loading, **kwargs)
        from megatron_muon.checkpoint.sharding import noted

        try:
            ranks, state = ranks_of(self._pg_collection), noted(model_state)
        except Exception:  # no run of Adam fails because of what ours would need
            return self._upstream_sharded(model_state, is_loading, **kwargs)
        found = _Either(ranks, lambda: self._asked(ranks, state, metadata))
        try:
            found.update(self._upstream_sharded(model_state, is_loading, **kwargs))
        except Exception as error:  # the metadata may be of Muon's checkpoint, in a form that Adam has not
            found.problem = error
        self._request = found
        return found

    def _asked(self, ranks: Ranks, model_state: Any, metadata: dict[str, Any]) -> Request:
        from megatron_muon.checkpoint import canonical

        held = held_by(self._optimizer, create=True)
        groups = groups_or_default(self._pg_collection)
        buckets = functools.partial(buckets_of_adam, self._chunks, groups=groups)
        return canonical.Request(ranks, held, self._model(model_state, metadata), self._accept, buckets)

    def _model(self, state: Any, metadata: dict[str, Any]) -> Model:
        from megatron_muon.checkpoint.canonical import Model

        def again() -> Any:
            try:
                return self._state_of_model(metadata)
            except Exception:  # what is wrong with the state that was given is told then
                return {}

        return Model(state, again, self._names())

    def _names(self) -> dict[torch.nn.Parameter, str]:
        return {param: name for chunk in self._chunks for name, param in chunk.named_parameters()}

    def _state_of_model(self, metadata: dict[str, Any]) -> dict[str, Any]:
        from megatron.core.utils import unwrap_model

        groups = groups_or_default(self._pg_collection)
        metadata = {"dp_cp_group": getattr(groups, "dp_cp", None) or groups.dp, **metadata}
        chunks = unwrap_model(list(self._chunks))
        return {f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}

    def tell_unsaved(self) -> None:
        """Look for trained weights that the model does not save.

        Raises:
            CheckpointError: on all ranks, naming them, in a run of ``megatron.training`` that is to save them.
        """
        from megatron_muon.checkpoint.sharding import SAVE_IT, unsaved

        ranks, names = ranks_of(self._pg_collection), self._names()

        def look() -> tuple[list[str], str]:
            try:
                state = self._state_of_model({})
            except Exception as error:  # such a model can be trained, too
                return [], f"{type(error).__name__}: {error}"
            return unsaved(names, state), ""

        found = ranks.gather(look)
        missing = sorted({line for lines, _ in found for line in lines})
        args = options.training_arguments()
        in_this_form = getattr(args, "ckpt_format", None) == "torch_dist" and not getattr(args, "no_save_optim", None)
        if getattr(args, "save", None) and in_this_form:
            raise_together(ranks, missing, "Weights that are trained, but not saved:", SAVE_IT)
        failed = [f"no checkpoint: sharded_state_dict() of the model fails: {text}" for _, text in found if text][:1]
        if missing:
            failed.append("\n  ".join(("weights that are trained, but not saved:", *missing)))
        for text in failed if ranks.is_first else ():
            print(f"megatron_muon: WARNING {text}", flush=True)

    def load_state_dict(self, state_dict: Any) -> None:
        """Take what was read."""
        request, self._request = self._request, None
        if isinstance(request, _Either):
            request.fail()
            request = request.chosen
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


class _Either(dict[str, Any]):
    """What an optimizer of Megatron-Core would read, until it is known whether the checkpoint is Muon's.

    Attributes:
        problem: what Megatron-Core has raised instead.
        chosen: the request for the checkpoint, if it is Muon's.
    """

    def __init__(self, ranks: Ranks, ask: Callable[[], Request]) -> None:
        super().__init__()
        self._ranks, self._ask = ranks, ask
        self.problem: Exception | None = None
        self.chosen: Request | None = None

    def choose(self, folder: str) -> Request | None:
        """Decide, alike on all ranks of the model."""
        found: list[Any] = []
        if any(self._ranks.gather(lambda: _has_record(folder, found))):
            request = self._ranks.together(self._ask)
            # In a checkpoint of several models, others may be Adam's.
            names = {name for place in request.places for name in place.members}
            known = any(record["converted"] or not names.isdisjoint(record["weights"]) for record in found)
            if any(self._ranks.gather(lambda: known)):
                self.clear()
                self.chosen = request
                return request
        self._ranks.together(self.fail)
        return None

    def fail(self) -> None:
        """Raise what Megatron-Core has raised, if what it would read is asked for."""
        if self.chosen is None and self.problem is not None:
            raise self.problem


def _has_record(folder: str, found: list[Any]) -> bool:
    """Whether the checkpoint has a record of ours, which is put into ``found``."""
    from megatron.core import dist_checkpointing

    try:
        found.append(dist_checkpointing.load_common_state_dict(folder)["optimizer"][RECORD])
    except Exception:  # there is none; or Megatron-Core, which reads it next, tells what is wrong
        return False
    return True


def _with_resolution(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(
        sharded_state_dict: Any, checkpoint_dir: Any, sharded_strategy: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        settle()
        requests = _requests(sharded_state_dict, str(checkpoint_dir))
        if not requests:
            return original(sharded_state_dict, checkpoint_dir, sharded_strategy, *args, **kwargs)
        from megatron_muon.checkpoint import weights
        from megatron_muon.checkpoint.sharding import noted, tensors_of

        def together[T](work: Callable[[], T]) -> T:
            """Agreed on by the ranks of each model, if there are several with an optimizer of their own."""
            for _, request in requests:
                work = functools.partial(request.ranks.together, work)
            return work()

        def resolve() -> tuple[weights.Described, Stored]:
            described = weights.described(sharded_state_dict)  # of the model alone: requests are still empty
            tensors = tensors_of(noted(sharded_state_dict))
            stored = _read(str(checkpoint_dir))
            for place, request in requests:
                _check_model(request.ranks, tensors, stored)
                request.resolve(stored)
                place.update(request)
            return described, stored

        def check() -> None:
            # With some values of ``strict`` the keys that do not match come with the state.
            state = loaded[0] if isinstance(loaded, tuple) else loaded
            for _, request in requests:
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


def _check_model(ranks: Ranks, tensors: list[Any], stored: Stored) -> None:
    """The checkpoint is of this model, or the same error on all ranks."""
    raise_together(
        ranks,
        stored.misfits(tensors),
        f"{stored.folder} is not a checkpoint of this model:",
        "Give the options of the model that saved it (--use-checkpoint-args takes them from there), or another --load.",
    )


def _requests(state: Any, folder: str) -> list[tuple[dict[str, Any], Request]]:
    """Each dictionary that is to become what a request reads, and the request: mostly the same."""
    from megatron_muon.checkpoint.canonical import Request

    found = []
    for each in list(_dictionaries(state)):
        request = each if isinstance(each, Request) else each.choose(folder) if isinstance(each, _Either) else None
        if request is not None:
            found.append((each, request))
    return found


def _dictionaries(state: Any) -> Iterator[dict[str, Any]]:
    """All that are in one another, the outer first."""
    if isinstance(state, dict):
        yield state
        for value in state.values():
            yield from _dictionaries(value)


def _with_form(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save(sharded_state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(sharded_state_dict, *args, **kwargs)
        keys = set().union(*_dictionaries(sharded_state_dict))
        # Beside another model's distributed optimizer, its form is what they tell.
        if RECORD in keys and "param_state_sharding_type" not in keys:
            bound.arguments["content_metadata"] = {**(bound.arguments.get("content_metadata") or {}), **_SHARDING}
        return original(*bound.args, **bound.kwargs)

    return save

"""The hooks on saving and loading: what is read is decided when the checkpoint is known."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_muon._patching import Original, Patches
from megatron_muon.agree import Ranks, ranks_with
from megatron_muon.checkpoint.errors import CheckpointError, raise_together
from megatron_muon.checkpoint.keys import RECORD_KEY
from megatron_muon.checkpoint.record import RECORD
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.plugin.canonical_state import (
    ANSWER,
    OURS,
    Answer,
    Either,
    Saved,
    common_with_record,
    dictionaries,
    keys_in,
)
from megatron_muon.plugin.checkpoint_files import EARLIER, one_index, read_in_pieces, reason_of, remove_old_marks
from megatron_muon.plugin.checkpoint_writers import saved_together
from megatron_muon.plugin.early_gather import settle

if TYPE_CHECKING:
    from megatron_muon.checkpoint.request import Request

PATCHES = Patches()

Together = Callable[[Callable[[], Any]], Any]
"""Does what may fail on one rank as :meth:`Ranks.together` does."""

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


@PATCHES.around(
    "megatron.core.dist_checkpointing.serialization:load",
    "what to read depends on what the checkpoint has, which is known here",
)
@one_index()
def _with_resolution(
    original: Original,
    sharded_state_dict: Any,
    checkpoint_dir: Any,
    sharded_strategy: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    settle()
    bound = inspect.signature(original).bind(sharded_state_dict, checkpoint_dir, sharded_strategy, *args, **kwargs)
    group = bound.arguments.get("process_group")
    requests = requests_in(sharded_state_dict, lambda either: either.choose(str(checkpoint_dir), group), group)
    if not requests:
        try:
            return original(sharded_state_dict, checkpoint_dir, sharded_strategy, *args, **kwargs)
        except (Exception, CheckpointException) as error:
            _refuse_others(sharded_state_dict, str(checkpoint_dir), error)
            raise
    from megatron_muon.checkpoint.sharding import noted, tensors_of

    tensors = tensors_of(noted(sharded_state_dict))

    def contents(ranks: Sequence[Ranks]) -> Stored:
        stored = _read(str(checkpoint_dir), ranks)
        for each in ranks:
            _check_model(each, tensors, stored)
        return stored

    def read(stored: Stored, together: Together) -> Any:
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

        strategy = TorchDistLoadShardedStrategy() if sharded_strategy is None else sharded_strategy
        read_in_pieces()
        with _reading(strategy, checkpoint_dir, together):
            return original(sharded_state_dict, checkpoint_dir, strategy, *args, **kwargs)

    return answered(sharded_state_dict, requests, contents, read)


def answered(
    state: Any,
    requests: Sequence[tuple[dict[str, Any], Request]],
    contents: Callable[[Sequence[Ranks]], Stored],
    read: Callable[[Stored, Together], Any],
) -> Any:
    """What comes of reading a checkpoint into a state with requests in it, checked.

    Args:
        state: what is to be loaded.
        requests: from :func:`requests_in`, one at least.
        contents: finds what the checkpoint has; the ranks of each request agree on what fails there.
        read: the checkpoint, once requests have become what they read; told how what may fail on one rank is done.
    """
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    from megatron_muon.checkpoint import weights

    def together[T](work: Callable[[], T]) -> T:
        """Agreed on by the ranks of each model, if there are several with an optimizer of their own."""
        for _, request in requests:
            work = functools.partial(request.ranks.together, work)
        return work()

    def resolve() -> tuple[weights.Described, Stored]:
        described = weights.described(state)  # of the model alone: requests are still empty
        stored = contents([request.ranks for _, request in requests])
        for place, request in requests:
            request.resolve(stored)
            place.update(request)
            place[ANSWER] = LocalNonpersistentObject(Answer(request))
        return described, stored

    def check() -> None:
        # With some values of ``strict`` the keys that do not match come with the state.
        whole = loaded[0] if isinstance(loaded, tuple) else loaded
        stored_by = [request.stored.record if request.stored else None for _, request in requests]
        names = [set[str]() if record is None else set(record.model) for record in stored_by]
        for (_, request), own in zip(requests, names, strict=True):
            # Another model may live on other ranks: it is whole on those alone that check it.
            weights.check(request.ranks, described, whole, stored, set().union(*names) - own)

    described, stored = together(resolve)
    try:
        loaded = read(stored, together)
    finally:
        for place, _ in requests:
            place.pop(ANSWER, None)  # mostly the request, which would hold itself
    together(check)
    return loaded


@contextlib.contextmanager
def _reading(strategy: Any, folder: Any, together: Together) -> Iterator[None]:
    """Each rank reads its tensors for itself: if one cannot, the others must not wait for it.

    Our records, which have been read, are no keys that were not asked for.
    """
    reader = getattr(strategy, "base_strategy", strategy)
    read, keys = reader.load, strategy.load_sharded_metadata

    def load(*args: Any, **kwargs: Any) -> Any:
        def work() -> Any:
            try:
                return read(*args, **kwargs)
            except (Exception, CheckpointException) as error:
                title = f"{folder} is damaged: what is stored cannot be read:"
                raise CheckpointError(f"{title}\n  {reason_of(error)}\n{EARLIER}") from error

        return together(work)

    def load_sharded_metadata(*args: Any) -> dict[str, Any]:
        return {name: each for name, each in keys(*args).items() if not each.key.startswith(RECORD_KEY)}

    reader.load, strategy.load_sharded_metadata = load, load_sharded_metadata
    try:
        yield
    finally:
        del reader.load, strategy.load_sharded_metadata


def _read(folder: str, ranks: Sequence[Ranks]) -> Stored:
    """The contents of a checkpoint."""
    try:
        return Stored.read(folder, ranks)
    except Exception as error:  # whatever a damaged index makes of the readers
        if ranks_with(error):  # another rank has told all
            raise
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


def requests_in(
    state: Any, choose: Callable[[Either], Request | None], group: dist.ProcessGroup | None = None
) -> list[tuple[dict[str, Any], Request]]:
    """Each dictionary that is to become what a request reads, and the request: mostly the same.

    See :meth:`Either.choose`; the group has the ranks that load, as ``dist_checkpointing.load`` is told, None for all.
    """
    from megatron_muon.checkpoint.request import Request

    found = []
    for each in list(dictionaries(state)):
        request = choose(each) if isinstance(each, Either) else each
        if isinstance(request, Request):
            if group is not None and not request.members.issubset(dist.get_process_group_ranks(group)):
                request.ranks = Ranks((group,))  # nobody waits for ranks of the model that do not read
            found.append((each, request))
    return found


def _refuse_others(state: Any, folder: str, error: BaseException) -> None:
    """In place of what Megatron-Core says when an optimizer that this package does not know asks for Muon's state."""
    from megatron_muon.checkpoint.keys import is_bucket, parse_state
    from megatron_muon.checkpoint.sharding import noted

    keys = (base.key for base in noted(state))
    if any(parse_state(key) or is_bucket(key) for key in keys) and common_with_record(folder) is not None:
        raise CheckpointError(
            f"{folder} has the state of megatron_muon's optimizers, and the optimizer that is to read it was built "
            f"before megatron_muon.install(), or not by megatron.core.optimizer.get_megatron_optimizer "
            f"({reason_of(error)}). Build it so; or load the weights alone (--no-load-optim)."
        ) from error


@PATCHES.around(
    "megatron.core.dist_checkpointing.serialization:save",
    "frameworks refuse to load other forms than this one at another layout, by what the metadata say; and a "
    "checkpoint that is written over keeps its index until the end: interrupted, it would pass for whole",
)
def _with_form(original: Original, sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(original).bind(sharded_state_dict, checkpoint_dir, *args, **kwargs)
    keys = keys_in(sharded_state_dict)
    # Beside another model's distributed optimizer, its form is what they tell.
    if RECORD in keys and "param_state_sharding_type" not in keys:
        bound.arguments["content_metadata"] = {**(bound.arguments.get("content_metadata") or {}), **_SHARDING}
    saved = [*dict.fromkeys(each.ranks for each in dictionaries(sharded_state_dict) if isinstance(each, Saved))]
    for ranks in saved:
        ranks.from_first(lambda: remove_old_marks(checkpoint_dir))
    if not saved and any(each.is_in(sharded_state_dict) for each in OURS):
        # Of weights alone no rank knows if the others of their model have some: the first does what it can.
        try:
            remove_old_marks(checkpoint_dir)
        except Exception as error:
            print(f"megatron_muon: WARNING {checkpoint_dir}: {error}; interrupted, it would pass for whole")
    return saved_together(saved, checkpoint_dir, lambda: original(*bound.args, **bound.kwargs))

"""How one optimizer is saved and loaded, and what stands for its state until a checkpoint is known."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import CheckpointError, raise_together
from megatron_muon.checkpoint.param_state import MASTER
from megatron_muon.checkpoint.record import ACCEPT, RECORD, Recorder
from megatron_muon.checkpoint.stored import has_record, records_in
from megatron_muon.optimizers import storage
from megatron_muon.optimizers.storage import MOMENTUM
from megatron_muon.plugin import options
from megatron_muon.plugin.adam_buckets import buckets_of_adam
from megatron_muon.plugin.groups import groups_or_default, ranks_of
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.optimizer_state import leaves, param_states
from megatron_muon.plugin.sleeping import wake
from megatron_muon.plugin.way_back import way_back

if TYPE_CHECKING:
    from megatron_muon.checkpoint.request import Request
    from megatron_muon.checkpoint.saving import Model

_MASTERS = "fp32_from_fp16_params"
"""Of the state of ``Float16OptimizerWithFloat16Params``."""

_SCHEDULED = ("max_lr", "min_lr", "wd_mult", "start_wd", "end_wd", "scalar_lr_mult", "scalar_wd_mult")
"""What the schedule reads from param groups, and what is told as a multiple of it."""


def keep_canonical(optimizer: Any, config: Any, chunks: Sequence[torch.nn.Module], pg_collection: Any) -> None:
    """Save and load a model's optimizer in one form: those of its wrappers no other layout or optimizer can read."""
    state = _CanonicalState(optimizer, chunks, config, pg_collection)
    optimizer.sharded_state_dict, optimizer.load_state_dict = state.sharded_state_dict, state.load_state_dict
    if is_ours(config.optimizer):
        for leaf, _ in leaves(optimizer):
            leaf.state_dict = functools.partial(_state_of, leaf, leaf.state_dict)
            leaf.load_state_dict = functools.partial(_load_into, leaf, leaf.load_state_dict)
        state.tell_unsaved()


def _state_of(leaf: Any, original: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """State for ``--ckpt-format torch``, in the one form of checkpoints (:class:`ParamState`).

    Masters carry what is known of their weights, which torch.load() refuses: here they do not.
    """
    found = original(*args, **kwargs)
    inner = found.get("optimizer", found)
    if "state" not in inner:  # of Adam's slices, which have a form of their own
        return found
    held = {each.key: each for each in param_states(leaf, refuse=False)}
    if masters := found.get(_MASTERS):
        found[_MASTERS] = [[held[key].saved.get(MASTER, key).detach() for key in group] for group in masters]
    inner["state"] = {**inner["state"]}
    keys = [key for group in leaf.optimizer.param_groups for key in group["params"]]
    for number in inner["state"].keys() & set(range(len(keys))):
        saved, forms = held[keys[number]].saved, held[keys[number]].of_forms
        own = {name: value for name, value in inner["state"][number].items() if name not in forms}
        inner["state"][number] = {name: saved[name] if name == MOMENTUM else value for name, value in own.items()}
    return found


def _load_into(leaf: Any, original: Callable[[Any], None], state_dict: Any) -> None:
    """What :func:`_state_of` gave, in whatever form masters are kept here; Muon itself sees to its momentum."""
    inner = state_dict.get("optimizer", {})
    if getattr(getattr(leaf.optimizer, "config", None), "master", "") == "remainder" and _MASTERS in state_dict:
        state = {**inner["state"]}
        groups = zip(inner["param_groups"], leaf.optimizer.param_groups, state_dict[_MASTERS], strict=False)
        for saved, own, masters in groups:  # where there are others, torch refuses them
            pairs = zip(saved["params"], own["params"], strict=False)
            numbers = (number for number, param in pairs if param.dtype == torch.bfloat16)
            for number, master in zip(numbers, masters, strict=False):
                if number in state:
                    state[number] = {**state[number], **storage.remainder_of(master)}
        state_dict = {**state_dict, "optimizer": {**inner, "state": state}}
    original(state_dict)


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

    def __init__(self, optimizer: Any, chunks: Sequence[torch.nn.Module], config: Any, pg_collection: Any) -> None:
        self._optimizer, self._chunks, self._config, self._pg_collection = optimizer, chunks, config, pg_collection
        self._ours, self._accept = is_ours(config.optimizer), options.of(config).ckpt_changes == ACCEPT
        self._upstream_sharded, self._upstream_load = optimizer.sharded_state_dict, optimizer.load_state_dict
        self._signature = inspect.signature(optimizer.sharded_state_dict)
        self._recorder = Recorder()
        if self._ours and ranks_of(pg_collection).is_first:
            OURS.add(self)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What is saved, or what is to be read.

        The arguments are those of the optimizer's class: Megatron-Core's have ``metadata`` in different places.
        """
        bound = self._signature.bind(*args, **kwargs)
        given = {**bound.arguments, **bound.kwargs}
        metadata, is_loading = given.get("metadata") or {}, given.get("is_loading", False)
        model_state = given.get("model_sharded_state_dict", {})
        if not self._ours:
            upstream = functools.partial(self._upstream_sharded, *args, **kwargs)
            form = given.get("sharding_type") or metadata.get("distrib_optim_sharding_type")
            return (
                self._either(upstream, model_state, metadata) if is_loading and form != "fsdp_dtensor" else upstream()
            )
        from megatron_muon.checkpoint.saving import saved_state  # imports Megatron-Core, which install() must not

        ranks = ranks_of(self._pg_collection)
        if is_loading:
            request = ranks.together(lambda: self._asked(ranks, model_state, metadata))
            request.members = frozenset(ranks.gather(dist.get_rank))
            return request

        def save() -> dict[str, Any]:
            held = param_states(self._optimizer, create=True)
            return saved_state(ranks, held, self._model(model_state, metadata), self._recorder)

        return Saved(ranks, ranks.together(save))

    def _either(self, upstream: Callable[[], Any], model_state: Any, metadata: dict[str, Any]) -> Any:
        """What Megatron-Core would read; it becomes ours if the checkpoint is."""
        from megatron_muon.checkpoint.sharding import noted

        try:
            ranks, state = ranks_of(self._pg_collection), noted(model_state)
        except Exception:  # no run of Adam fails because of what ours would need
            return upstream()
        found = Either(ranks, lambda: self._asked(ranks, state, metadata))
        try:
            found.update(upstream())
        except Exception as error:  # the metadata may be of Muon's checkpoint, in a form that Adam has not
            found.problem = error
        return found

    def _asked(self, ranks: Ranks, model_state: Any, metadata: dict[str, Any]) -> Request:
        from megatron_muon.checkpoint.request import Request

        wake(self._optimizer)
        held = param_states(self._optimizer, create=True)
        groups = groups_or_default(self._pg_collection)
        buckets = functools.partial(buckets_of_adam, self._chunks, groups=groups)
        back = functools.partial(way_back, self._chunks, self._config)
        return Request(ranks, held, self._model(model_state, metadata), self._accept, buckets, back)

    def _model(self, state: Any, metadata: dict[str, Any]) -> Model:
        from megatron_muon.checkpoint.saving import Model

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
        """Take what was read; what was not asked for by :meth:`sharded_state_dict` is Megatron-Core's."""
        answer = state_dict.get(ANSWER) if isinstance(state_dict, dict) else None
        if isinstance(answer, Answer):
            request = answer.request
            text = request.ranks.together(lambda: self._fill(request, state_dict))
            if request.ranks.is_first:
                print(text, flush=True)
            return
        from megatron_muon.checkpoint.request import Request
        from megatron_muon.checkpoint.saving import WEIGHTS

        if isinstance(state_dict, Request) or (isinstance(state_dict, dict) and {RECORD, WEIGHTS} & state_dict.keys()):
            raise CheckpointError(
                "load_state_dict() was given state that no checkpoint was read for. Give what optimizer."
                "sharded_state_dict(..., is_loading=True) returns, as it is, to megatron.core.dist_checkpointing.load, "
                "and what comes back in its place to load_state_dict(). (With --no-save-optim Megatron does not "
                "ask for it when it loads, either: add --no-load-optim.)"
            )
        self._upstream_load(_by_number(state_dict))

    def _fill(self, request: Request, state_dict: Any) -> str:
        from megatron_muon.checkpoint.weights import check_copies

        own = {id(leaf.optimizer) for leaf, _ in leaves(self._optimizer)}
        if not own.issuperset(id(held.inner) for held in request.held):
            raise CheckpointError("load_state_dict() was given the state that another optimizer has asked for.")
        request.fill(state_dict)
        if getattr(options.training_arguments(), "use_checkpoint_opt_param_scheduler", False):
            request.take_numbers(_SCHEDULED)
        if request.ranks == ranks_of(self._pg_collection):  # copies of ranks that did not read are their caller's
            check_copies(request.ranks, self._chunks, request.held, groups_or_default(self._pg_collection))
        return request.describe()

    def is_in(self, state: Any) -> bool:
        """Whether a state that is about to be saved has the optimizer's, or the weights of its model."""
        from megatron_muon.checkpoint.sharding import noted

        params = set(map(id, self._names()))
        return RECORD in keys_in(state) or any(id(base.data) in params for base in noted(state))


OURS: weakref.WeakSet[_CanonicalState] = weakref.WeakSet()
"""Of Muon's models of which this rank is the first."""


def _by_number(state_dict: Any) -> Any:
    """Chains say their state in lists, which Megatron-Core's layer-wise optimizer does not take back."""
    return {i: _by_number(each) for i, each in enumerate(state_dict)} if isinstance(state_dict, list) else state_dict


class Saved(dict[str, Any]):
    """State that is to be saved.

    Attributes:
        ranks: of the model, all of which have it.
    """

    def __init__(self, ranks: Ranks, state: dict[str, Any]) -> None:
        super().__init__(state)
        self.ranks = ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> Saved:
        return Saved(self.ranks, {key: copy.deepcopy(value, memo) for key, value in self.items()})


@dataclasses.dataclass(frozen=True)
class Answer:
    """Beside what was read, the request that it was read for: there may be several, in any order, or none."""

    request: Request


ANSWER = "megatron_muon_answer"


class Either(dict[str, Any]):
    """What an optimizer of Megatron-Core would read, until it is known whether the checkpoint is Muon's.

    Attributes:
        problem: what Megatron-Core has raised instead.
    """

    def __init__(self, ranks: Ranks, ask: Callable[[], Request]) -> None:
        super().__init__()
        self._ranks, self._ask = ranks, ask
        self.problem: Exception | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Either:
        found = copy.copy(self)
        found.update({key: copy.deepcopy(value, memo) for key, value in self.items()})
        return found

    def choose(self, folder: str, group: dist.ProcessGroup | None) -> Request | None:
        """Decide, alike on all ranks that read; they communicate only if the checkpoint is Muon's.

        Raises:
            Exception: what Megatron-Core has raised, if what it would read is asked for.
        """
        common = common_with_record(folder)
        if common is not None:
            ranks = self._ranks if group is None or group.size() == dist.get_world_size() else Ranks((group,))
            request = ranks.together(self._ask)
            request.ranks = ranks
            # In a checkpoint of several models, others may be Adam's.
            names = {name for place in request.places for name in place.members}
            found = ranks.from_first(lambda: records_in(folder, common))
            known = any(record.converted or not names.isdisjoint(record.weights) for record in found)
            if any(ranks.gather(lambda: known)):
                self.clear()
                return request
        self.fail()
        return None

    def fail(self) -> None:
        """Raise what Megatron-Core has raised, if it has: what it would read is asked for."""
        if self.problem is not None:
            raise self.problem


def common_with_record(folder: str) -> Any:
    """What is no tensor in the checkpoint, if it has a record of ours; else None."""
    from megatron.core import dist_checkpointing

    try:
        common = dist_checkpointing.load_common_state_dict(folder)
    except Exception:  # Megatron-Core, which reads it next, tells what is wrong
        return None
    return common if has_record(common) else None


def dictionaries(state: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries that are nested in a state, the outer first."""
    if isinstance(state, dict):
        yield state
        for value in state.values():
            yield from dictionaries(value)


def keys_in(state: Any) -> set[str]:
    """The keys of all nested dictionaries of a state."""
    return set().union(*dictionaries(state))

"""The optimizer factory: what is checked before and after it, and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon._patching import Original, Patch, Patches, PatchSet, in_place_of
from megatron_muon.agree import Ranks
from megatron_muon.choices import DECOUPLED
from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError, told_in_flags
from megatron_muon.optimizers.muon import Muon
from megatron_muon.plugin import options, precision_aware, recording
from megatron_muon.plugin.early_gather import gather_early
from megatron_muon.plugin.environment import agree_on_plans, agree_on_products, compare_environments
from megatron_muon.plugin.expert_scalars import set_apart, sum_once
from megatron_muon.plugin.groups import device_of, groups_of_model, ranks_of
from megatron_muon.plugin.holding import check_entered
from megatron_muon.plugin.kept import describe_kept
from megatron_muon.plugin.logged import mark_parts
from megatron_muon.plugin.measuring import Measuring
from megatron_muon.plugin.nonfinite import check_gradients
from megatron_muon.plugin.optimizer_config import check_optimizer_config, is_ours
from megatron_muon.plugin.optimizer_state import leaves, param_states
from megatron_muon.plugin.ownership import annotate_for_buffers, check_copies, is_in_layer_wise_buffer
from megatron_muon.plugin.state import guard
from megatron_muon.plugin.step_graph import adam_uncaptured, capture_steps
from megatron_muon.plugin.stiefel import check_stiefel, has_stiefel, watch
from megatron_muon.plugin.tables import routes_of
from megatron_muon.plugin.transfer import group_overrides, scalar_numbers, transfer_of
from megatron_muon.plugin.uneven_buckets import check_layout
from megatron_muon.plugin.variants import blockwise, check_adapters, describe
from megatron_muon.plugin.watching import Watching
from megatron_muon.plugin.wrapping import check_bucket_groups
from megatron_muon.refusals import MUON, refuse
from megatron_muon.routing import annotate, global_names, report
from megatron_muon.routing.blocks import no_numbers_of_its_own
from megatron_muon.routing.numbers import describe_numbers, numbers_of
from megatron_muon.routing.partition import refuse_uneven, refuse_unmatched
from megatron_muon.routing.predicate import is_expert_parallel
from megatron_muon.version import __version__

PATCHES = Patches()


@PATCHES.around(
    "megatron.core.optimizer:_get_megatron_emerging_optimizer",
    "layouts are put on the weights, what would diverge silently is refused, every weight is accounted for, "
    "and the user is told",
)
def _with_checks_and_report(
    original: Original,
    config: Any,
    model_chunks: list[torch.nn.Module],
    config_overrides: dict[Any, Any] | None = None,
    pg_collection: Any = None,
) -> Any:
    ranks = ranks_of(pg_collection)
    if not is_ours(config.optimizer):
        ranks.together(lambda: annotate_for_buffers(model_chunks))
        return original(config, model_chunks, config_overrides, pg_collection)

    @told_in_flags()
    def build() -> Any:
        check_entered()
        groups = groups_of_model(pg_collection, model_chunks)
        muon = check_optimizer_config(config)
        if precision_aware.take(config):  # set as attributes
            config.main_grads_dtype = precision_aware.clear(config)
            muon = check_optimizer_config(config)
        devices = compare_environments(muon, config, model_chunks, ranks, device_of(model_chunks))
        _route(config, model_chunks, muon, ranks)
        _check_groups(groups)
        check_copies(model_chunks)
        sum_once(model_chunks, getattr(groups, "expt_tp", None))
        by_layout = _check_buffers(config, model_chunks)
        # A copy: Megatron adds its own entries to the caller's dictionary.
        others = {_asking_our_predicates(key): value for key, value in (config_overrides or {}).items()}
        overrides = {**others, **group_overrides(config, muon, model_chunks, others)}
        with _aligning_among(ranks), adam_uncaptured(config), set_apart() if by_layout else contextlib.nullcontext():
            optimizer = original(config, model_chunks, overrides, groups)
        numbers = scalar_numbers(config, muon, model_chunks, others)
        for each in _muons(optimizer):
            each.is_complete = True
            for group in (each.defaults, *each.param_groups):
                group.update(numbers)
        _check_partition(optimizer, model_chunks, groups, ranks)
        mark_parts(optimizer, model_chunks)
        device = device_of(model_chunks)
        check = guard(optimizer, model_chunks, device)
        routes = routes_of(muon, model_chunks, groups, ranks)
        experts = getattr(groups, "ep", None)
        measuring, watching = Measuring([*_muons(optimizer)], ranks), None
        if muon.watches:
            watching = Watching(optimizer, model_chunks, groups, ranks, muon, routes, device)
        check_gradients(optimizer, model_chunks, ranks, muon.nonfinite, device, check, experts, measuring, watching)
        if config.optimizer.removeprefix("dist_") == "stiefel_muon":
            watch(optimizer, ranks, device)
        gather_early(optimizer, model_chunks)
        if config.optimizer_cuda_graph:
            capture_steps(optimizer, model_chunks, ranks)
        optimizer.step_with_ready_grads = functools.partial(measuring.first, optimizer.step_with_ready_grads)
        if watching is not None:
            optimizer.step_with_ready_grads = functools.partial(watching.step, optimizer.step_with_ready_grads)
        planned = [
            *devices,
            *_data_parallel(optimizer, groups, muon.layer_wise_param_layout == DECOUPLED),
            *next(filter(None, ranks.gather(lambda: describe_kept(optimizer))), []),
            *_numbers(muon, model_chunks, optimizer, ranks),
            *_planned(optimizer, ranks),
        ]
        only = [route for _, route in routes]
        recording.note_routes(optimizer, report.words(only, muon))
        if ranks.is_first:
            notes = [*_notes(muon, config, groups), *_transfer_notes(muon, model_chunks), *planned]
            text = report.render(only, muon, notes=notes, optimizer=config.optimizer)
            print(f"megatron_muon {__version__}\n{blockwise(muon, groups.tp.size())}{text}\n", flush=True)
        return optimizer

    return ranks.together(build)


def among_own_ranks(pg_collection: Any) -> AbstractContextManager[None]:
    """Within, param groups of a model with process groups of its own are agreed on over its ranks.

    Over all of the run, a model on some of them, beside one under another optimizer, would wait for ever.
    """
    return contextlib.nullcontext() if pg_collection is None else _aligning_among(ranks_of(pg_collection))


def _asking_our_predicates(key: Any) -> Any:
    """A key of overrides, whose predicates may be copies of Megatron-Core's from before ``install()``."""
    from megatron.core.optimizer.optimizer_config import ParamKey

    def of_now(predicate: Any) -> Any:
        if isinstance(predicate, tuple):
            return tuple(map(of_now, predicate))
        function = predicate.fn
        if isinstance(function, functools.partial):
            function = functools.partial(in_place_of(function.func), *function.args, **function.keywords)
        return dataclasses.replace(predicate, fn=in_place_of(function))

    if not isinstance(key, ParamKey):
        return key
    names = ("predicate", "with_name_predicate")
    return dataclasses.replace(key, **{name: of_now(getattr(key, name)) for name in names})


class _Alignment:
    """Has what Megatron-Core gathers from all ranks of the run, the keys of param groups, gathered from a model's.

    A rank that has failed before would leave the others there; and ranks that have no part in this model, or another
    optimizer for theirs, would have to come. What other threads gather meanwhile is as ever.
    """

    def __init__(self) -> None:
        self._ranks: ContextVar[Ranks | None] = ContextVar("megatron_muon_aligning", default=None)
        self._lock = threading.Lock()
        self._inside = 0
        patch = Patch("torch.distributed:all_gather_object", self._make, "a model need not live on all", copies_in=())
        self._patches = PatchSet("megatron_muon.factory", [patch])

    @contextlib.contextmanager
    def among(self, ranks: Ranks) -> Iterator[None]:
        """Within, in this thread, these are the ranks."""
        token = self._ranks.set(ranks)
        with self._lock:
            self._inside += 1
            self._patches.apply()
        try:
            yield
        finally:
            self._ranks.reset(token)
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._patches.revert()

    def _make(self, original: Callable[..., None]) -> Callable[..., None]:
        def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
            ranks = self._ranks.get()
            if group is None and ranks is not None:
                object_list[:] = ranks.gather(lambda: obj)
            else:
                original(object_list, obj, group)

        return all_gather_object


_aligning_among = _Alignment().among


def _route(config: Any, model_chunks: Sequence[torch.nn.Module], muon: MuonConfig, ranks: Ranks) -> None:
    """Decide about every weight; a rule of the user must match somewhere in the whole model.

    Raises:
        ConfigError: from :func:`annotate`. Or if the optimizer is for weights of a direction that no rank has, or all
            weights are frozen.
    """

    def route() -> tuple[set[str], bool, bool]:
        matched = set().union(*(annotate(chunk, muon) for chunk in model_chunks))
        for chunk in model_chunks:
            check_adapters(global_names(chunk), config, muon)
            _check_numbers(global_names(chunk))
        trained = any(param.requires_grad for chunk in model_chunks for param in chunk.parameters())
        return matched, any(map(has_stiefel, model_chunks)), trained

    gathered = ranks.gather(route)
    if not any(trained for _, _, trained in gathered):
        raise ConfigError(
            f"--optimizer {config.optimizer} has nothing to train: no weight of the model, on any rank, has "
            "requires_grad. Leave some of it trainable, or build no optimizer."
        )
    refuse_unmatched(muon, set().union(*(rules for rules, _, _ in gathered)))
    check_stiefel(config.optimizer, any(found for _, found, _ in gathered))


def _check_numbers(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    for name, param in named_parameters:
        if param.requires_grad and (problem := no_numbers_of_its_own(param)):
            raise ConfigError(
                f"{name} is {problem}. Build the model with bfloat16 or float32 weights (no fp8_param and fp4_param in "
                "its config or in --te-precision-config-file): FP8 computation goes on with them."
            )


def _check_groups(groups: Any) -> None:
    for name in ("gtp_remat", "expt_gtp_remat"):
        group = getattr(groups, name, None)
        if group is not None and group.size() > 1:
            raise ConfigError(
                f"Weight rematerialisation over {group.size()} ranks ({name}) with Muon: a weight cut that way cannot "
                f"be orthogonalized. Set the group's size to 1."
            )


def _check_buffers(config: Any, model_chunks: Sequence[torch.nn.Module]) -> bool:
    """DDP's reduce-scatter leaves each rank with a part of the gradients: only a layer-wise optimizer knows which.

    Returns:
        whether DDP does so: it has the layer-wise parameter layout.
    """
    by_layout = False
    for chunk in model_chunks:
        ddp_config = getattr(chunk, "ddp_config", None)
        if ddp_config is None:
            continue
        refuse(MUON, config, ddp_config)
        check_layout(chunk, config.muon_layer_wise_param_layout)
        if ddp_config.use_distributed_optimizer:
            _check_ownership(chunk)
            by_layout = True
    check_bucket_groups(model_chunks)
    return by_layout


def _check_ownership(chunk: torch.nn.Module) -> None:
    """Buffers were assigned when DDP was built: they must agree with the routes of now."""
    for name, param in chunk.named_parameters():
        owned = getattr(param, "is_managed_by_layer_wise_optimizer", None)
        if param.requires_grad and owned is not is_in_layer_wise_buffer(param):
            raise ConfigError(
                f"{name}: DistributedDataParallel was built "
                + ("without a layer-wise parameter layout" if owned is None else "before the weight's tags were set")
                + ", so its buffer is not the optimizer's. Wrap the model after megatron_muon.install(), given "
                "the same options, with megatron.training.training.wrap_model_chunks_with_ddp("
                "use_layer_wise_distributed_optimizer=True), or "
                "build DDP with use_distributed_optimizer=False."
            )


def _check_partition(optimizer: Any, model_chunks: Sequence[torch.nn.Module], groups: Any, ranks: Ranks) -> None:
    """Every trainable weight is updated by exactly one optimizer, on one rank if layer-wise and on all otherwise.

    Raises:
        RuntimeError: naming the weights that are held by none, or by several.
    """
    layer_wise = any(owned for _, owned in leaves(optimizer))
    updated = param_states(optimizer, refuse=False)
    held = Counter(each.param for each in updated if each.slices is None)
    sliced = {each.param for each in updated if each.slices is not None}
    counted: dict[str, int] = {}
    parts: list[tuple[list[tuple[str, torch.nn.Parameter]], torch.Tensor, Any]] = []
    for experts, group_name in ((False, "dp_cp"), (True, "expt_dp")):
        named = [
            (name, param)
            for chunk in model_chunks
            for name, param in chunk.named_parameters()
            if param.requires_grad and is_expert_parallel(param) == experts
        ]
        device = named[0][1].device if named else None
        counts = torch.tensor([held[param] for _, param in named], dtype=torch.int32, device=device)
        parts.append((named, counts, getattr(groups, group_name, None)))
    ranks.together(lambda: None)  # whoever has failed so far must not be missed in what follows
    for named, counts, group in parts:
        if layer_wise and len(named) > 0 and group is not None:
            dist.all_reduce(counts, group=group)  # each weight has one owner in the group
    for named, counts, _ in parts:
        # .tolist() waits for the device once, when the optimizer is built.
        for (name, param), count in zip(named, counts.tolist(), strict=True):
            counted[name] = count + (param in sliced)
    refuse_uneven(counted, "Plain --optimizer muon, without --use-distributed-optimizer, does not share them out.")


def _muons(optimizer: Any) -> Iterator[Muon]:
    for part, _ in leaves(optimizer):
        if isinstance(part.optimizer, Muon):
            yield part.optimizer


def _planned(optimizer: Any, ranks: Ranks) -> list[str]:
    """Plan the step on every rank, so that what cannot be done stops the run now; this rank's plan in words."""
    muons, lines = list(_muons(optimizer)), list[str]()
    products = agree_on_products(muons, ranks)
    for muon in muons:
        if (engine := muon.prepare()) is not None:
            lines += [*engine.describe(), muon.engines.elementwise_note]
        lines += muon.variant.notes([param for group in muon.param_groups for param in group["params"]])
    agree_on_plans(muons, ranks)
    return [line for line in dict.fromkeys([*lines, *products]) if line]


def _data_parallel(optimizer: Any, groups: Any, is_decoupled: bool) -> list[str]:
    """What replicas share of the step, and by which of Megatron-Core's ways, in words."""
    parts = (optimizer, *getattr(optimizer, "chained_optimizers", ()))
    dense = getattr(groups, "dp_cp", None) or groups.dp
    ranks, of_experts = dense.size(), (getattr(groups, "expt_dp", None) or dense).size()
    layer_wise = next((each for each in parts if hasattr(each, "use_buffer_param_sync")), None)
    if layer_wise is None:
        return [f"data parallel {ranks}: each rank holds all state and does the whole step"] if ranks > 1 else []
    way = "by the parameter layout (gradients are reduce-scattered, Adam's weights cut evenly)"
    if is_decoupled:
        way += ", Muon's without padding between owners"
    if not layer_wise.use_buffer_param_sync:
        asked = getattr(options.training_arguments(), "use_layer_wise_param_layout", True) is False
        why = "--no-use-layer-wise-param-layout" if asked else "DDP was built without a layer-wise parameter layout"
        way = f"by lists, {why} (gradients are all-reduced, Adam's weights whole on their owners)"
    experts = f", experts over {of_experts}" if of_experts != ranks else ""
    return [f"layer-wise over {ranks} data-parallel ranks{experts}, {way}"]


def _numbers(muon: MuonConfig, model_chunks: Sequence[torch.nn.Module], optimizer: Any, ranks: Ranks) -> list[str]:
    """Learning rates and weight decay of all param groups, in words."""
    names = {param: name for chunk in model_chunks for name, param in global_names(chunk)}
    groups = [(each.param, each.group) for each in param_states(optimizer) if each.group]
    own = {each for param, group in groups for each in numbers_of(names[param], param, group)}
    return describe_numbers(set().union(*ranks.gather(lambda: own)), muon)


def _transfer_notes(muon: MuonConfig, model_chunks: Sequence[torch.nn.Module]) -> list[str]:
    transfer = transfer_of(muon, model_chunks)
    if transfer is None:
        return []
    return [
        f"transfer from {muon.transfer}: {transfer.width:g} times wider, {transfer.depth:g} times deeper; learning "
        f"rate of Adam's matrices and the output layer / {transfer.width:g}, of what ends a residual branch / "
        f"{transfer.depth:g}; weight decay / {transfer.width:g}"
    ]


def _notes(muon: MuonConfig, config: Any, groups: Any) -> list[str]:
    notes = describe(config, muon)
    notes[1] += f"; tensor parallel {groups.tp.size()}: {muon.tp_mode}"
    return notes

"""Megatron-Core's layer-wise optimizer: float32 models, and owners that are balanced by what Newton-Schulz costs.

Megatron-Core shares weights out by their number of elements, in either of two ways: into the shards of DDP's buckets
(the parameter layout), or into a list for each rank (``--no-use-layer-wise-param-layout``). Both are left to it, and
then weights change places (:func:`megatron_muon.engine.balance.assign_owners`): inside a bucket, whose shards keep the
length that Megatron-Core gave them; or between lists, of which none becomes longer than the longest was.

So balance costs no padding. Longer shards would gain little: with 10 % more the busiest rank of the models in
``examples/models``, at 31 layouts, has at most 1 % less to do, and none at the layouts of the files.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon._patching import Original, Patches
from megatron_muon.choices import DECOUPLED
from megatron_muon.config import MuonConfig
from megatron_muon.engine.balance import Job, assign_owners, cost_of_weight
from megatron_muon.engine.shards import shard_of
from megatron_muon.errors import ConfigError, sizes
from megatron_muon.optimizers.stiefel_solvers import SOLVERS
from megatron_muon.plugin import options
from megatron_muon.plugin.groups import ranks_of
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.sharing import share_work
from megatron_muon.plugin.uneven_buckets import remove_padding, with_named_owners
from megatron_muon.plugin.within import within
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding

PATCHES = Patches()

_CLASS = "megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer"


@PATCHES.around(
    f"{_CLASS}.__init__",
    "fails with float32 models; goes by its own overlap_param_gather, not DDP's; counts undivided experts on one "
    "tensor-parallel rank only, and the norms of all models as one",
)
def _construct(
    original: Original,
    self: Any,
    optimizers: list[Any],
    config: Any,
    pg_collection: Any = None,
    init_state_fn_list: list[Any] | None = None,
    model_chunks: list[Any] | None = None,
) -> None:
    by_cost = is_ours(getattr(config, "optimizer", None)) and not keeps_upstream_lists(options.training_arguments())
    self.options_of_cost = options.of(config) if by_cost else None  # the older assignment is not told whose weights
    if not config.bf16:
        init_state = init_state_fn_list or [None] * len(optimizers)
        member = _fp32_member()
        optimizers = [member(inner, config, fn) for inner, fn in zip(optimizers, init_state, strict=True)]
    original(self, optimizers, config, pg_collection, init_state_fn_list, model_chunks)
    _gather_as_buffers(self)
    _take_own_groups(self, config)


@functools.cache
def _fp32_member() -> type:
    """The float32 wrapper whose state has the form that the layer-wise optimizer saves and loads; made on first use."""
    from megatron.core.optimizer.optimizer import FP32Optimizer

    class LayerWiseFP32Optimizer(FP32Optimizer):
        """``FP32Optimizer`` that saves its state under ``optimizer``, as ``Float16OptimizerWithFloat16Params`` does."""

        def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"optimizer": super().sharded_state_dict(*args, **kwargs)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict.get("optimizer", state_dict))  # --ckpt-format torch saves it flat

    return LayerWiseFP32Optimizer


def _gather_as_buffers(self: Any) -> None:
    """DDP's ``overlap_param_gather`` counts, as in Megatron-Core's distributed optimizer."""
    of_buffers = [chunk.ddp_config.overlap_param_gather for chunk in self.model_chunks if hasattr(chunk, "ddp_config")]
    if not of_buffers or self.overlap_param_gather is any(of_buffers):
        return
    self.overlap_param_gather = any(of_buffers)
    if self.overlap_param_gather and not self.use_buffer_param_sync:
        self.set_bucket_layerwise_params_list(self.model_chunks)


def _take_own_groups(self: Any, config: Any) -> None:
    """Norms and counts are sums over the model's ranks, experts by their own tensor-parallel group."""
    dense = getattr(self.pg_collection, "tp", None)
    for part in (self, *self.chained_optimizers):  # as Megatron-Core does for its other optimizers
        part.tp_group, part.expert_tp_group = dense, getattr(self.pg_collection, "expt_tp", dense)
        part.grad_stats_parallel_group = _group_of_some(self.pg_collection) or dist.group.WORLD
    for name in ("get_grad_norm", "_get_grad_norm_for_group", "has_grad_norm_group", "count_zeros"):
        # Of the base class: over the members' groups, where the layer-wise optimizer's own are over the whole run,
        # and take one tensor-parallel group for all weights.
        setattr(self, name, functools.partial(getattr(type(self).__base__, name), self))
    if not self.chained_optimizers:  # no weight of the model is Muon's: a link of the chain all the same
        self.config = config
        self.get_grad_stats_parallel_group = lambda: self.grad_stats_parallel_group
        self.has_grad_norm_group = lambda name: False
        self.get_grad_norm = self.count_zeros = lambda: 0


def _group_of_some(pg_collection: Any) -> Any:
    """The ranks of a model that is on some of the run's; None if it is on all."""
    ranks = 0 if pg_collection is None else math.prod(group.size() for group in ranks_of(pg_collection).groups)
    if ranks in (0, dist.get_world_size()):
        return None
    group = getattr(pg_collection, "intra_dist_opt", None)
    if group is None or group.size() != ranks:
        raise ConfigError(
            f"A layer-wise optimizer on {ranks} of {dist.get_world_size()} ranks without pg_collection.intra_dist_opt: "
            "the gradient's norm is a sum over the model's ranks alone. Give ProcessGroupCollection the group of these "
            f"{ranks} ranks as intra_dist_opt."
        )
    return group


def keeps_upstream_lists(args: Any) -> bool:
    """Whether the older assignment stays Megatron-Core's.

    ``--ckpt-format torch`` saves the state of each rank in the order of its list, without names. The list must not
    depend on this package's version and options, or a resumed run would give weights each other's state.

    Args:
        args: of ``megatron.training``, which may be a namespace of the caller's own; None in code that has none.
    """
    return getattr(args, "ckpt_format", None) == "torch"


@dataclass
class _Chunks:
    """Model chunks whose weights are shared out together."""

    count: int
    cost: Callable[[torch.Tensor], int]  # of a weight
    layouts: list[Any] = field(default_factory=list)  # of those that Megatron-Core has laid out so far

    def add(self, layout: Any) -> None:
        """Take the layout of the next chunk; the last one changes all of them, before DDP reads any."""
        self.layouts.append(layout)
        if len(self.layouts) < self.count:
            return
        for experts in (False, True):
            buffers = [
                buffer
                for each in self.layouts
                for key, buffer in each.layouts.items()
                if key.is_managed_by_layer_wise_optimizer and key.is_expert_parallel is experts
            ]
            _balance_shards(buffers, self.cost)
            if options.current().layer_wise_param_layout == DECOUPLED:
                for buffer in buffers:
                    remove_padding(buffer)


_CHUNKS: ContextVar[_Chunks | None] = ContextVar("megatron_muon_chunks", default=None)
"""Those that are being wrapped; None outside of that, where each is balanced alone."""


def balanced_together(count: int, pg_collection: Any = None) -> AbstractContextManager[None]:
    """Within, the layouts of the next ``count`` model chunks are balanced, when the last of them has been computed."""
    return within(_CHUNKS, _Chunks(count, _cost_in(pg_collection, options.current())))


@PATCHES.around(
    f"{_CLASS}.compute_full_param_layout",
    "the step waits for the rank with most Newton-Schulz to do, which is not the one with most elements",
)
def _with_balanced_shards(original: Original, *args: Any, **kwargs: Any) -> Any:
    layout = original(*args, **kwargs)
    name = getattr(options.training_arguments(), "optimizer", None)
    # Without arguments nobody knows yet which optimizer will come, and install() says that it is Muon. Any owner
    # is right for any optimizer: only the balance is Muon's.
    if name is None or is_ours(name):
        (_CHUNKS.get() or _Chunks(1, _cost_in(None, options.current()))).add(layout)
    return layout


def _balance_shards(buffers: Sequence[Any], cost: Callable[[torch.Tensor], int]) -> None:
    """Let weights change shards inside their buckets, in all ``PerBufferParamLayout`` s of one data-parallel group.

    Buckets stay what and where they are: no padding comes or goes.
    """
    from megatron.core.optimizer.param_layout import pad_param_start

    if not buffers or buffers[0].num_optimizer_shards == 1:
        return
    ranks = buffers[0].num_optimizer_shards
    jobs: list[Job] = []
    shards: list[tuple[int, int]] = []  # start of each bucket, and the length of its shards
    for buffer in buffers:
        first = len(shards)
        shards += [(start, (end - start) // ranks) for start, end in buffer.bucket_indices]
        for param, (start, end, bucket) in buffer.param_index_map.items():
            bucket_start, length = shards[first + bucket]
            # Megatron puts a shared embedding into the first shard of its bucket, where other stages expect it; what
            # costs nothing (Adam's weights among experts) is shared out by elements, as Megatron has done.
            movable = not (getattr(param, "shared_embedding", False) or _is_nonlinear_or_embedding(param))
            owner = (start - bucket_start) // length
            jobs.append(Job(cost(param), pad_param_start(end - start), first + bucket, owner, movable))
    owners = assign_owners(jobs, ranks, [length for _, length in shards])
    cursors = [[start + rank * length for rank in range(ranks)] for start, length in shards]
    weights = [(buffer, param) for buffer in buffers for param in buffer.param_index_map]
    for (buffer, param), job, owner in zip(weights, jobs, owners, strict=True):
        start, end, bucket = buffer.param_index_map[param]
        position = cursors[job.bucket][owner]
        buffer.param_index_map[param] = (position, position + end - start, bucket)
        cursors[job.bucket][owner] += job.size


def share_lists(optimizer: Any, optimizers: Sequence[Any], share: Callable[[], None]) -> None:
    """Have ``share`` make the older assignment, and balance it by the cost of Newton-Schulz where it is this package's.

    Args:
        optimizer: the layer-wise one, or what stands for it.
        optimizers: inside of it, whose param groups are narrowed to this rank's weights.
        share: Megatron-Core's assignment.
    """
    groups = [group for inner in optimizers for group in inner.param_groups]
    params = [list(group["params"]) for group in groups]
    share()
    if getattr(optimizer, "options_of_cost", None) is not None:
        _balance_lists(optimizer, groups, params)


def _balance_lists(optimizer: Any, groups: Sequence[dict[str, Any]], params: Sequence[list[torch.Tensor]]) -> None:
    """Let Muon's weights change lists in the older assignment; those of the scalar optimizer stay.

    ``params`` are what the param groups held before Megatron-Core has shared the weights out.
    """
    from megatron.core.utils import get_pg_rank

    cost = _cost_in(optimizer.pg_collection, optimizer.options_of_cost)
    for experts in (False, True):
        name = "expt_dp_params_list" if experts else "dp_cp_params_list"
        lists = getattr(optimizer, name)
        if lists is None:
            continue
        owner = {param: rank for rank, its in enumerate(lists) for param in its}
        mine = [index for index, group in enumerate(groups) if bool(group.get("is_expert_parallel")) is experts]
        weights = [param for index in mine for param in params[index]]
        jobs = [
            Job(cost(param), param.numel(), 0, owner[param], not _is_nonlinear_or_embedding(param)) for param in weights
        ]
        longest = max(sum(param.numel() for param in its) for its in lists)
        owner = dict(zip(weights, assign_owners(jobs, len(lists), [longest]), strict=True))
        setattr(optimizer, name, [[p for p in weights if owner[p] == rank] for rank in range(len(lists))])
        rank = get_pg_rank(optimizer.expt_dp if experts else optimizer.dp_cp)
        for index in mine:
            groups[index]["params"] = [param for param in params[index] if owner[param] == rank]


@PATCHES.around(
    f"{_CLASS}.shard_params",
    "lists are balanced by elements, not by the cost of Newton-Schulz; owners are found by one length of all shards; "
    "where dense weights have one copy, each copy of an expert would be updated by its own rank's gradients alone",
)
def _with_owners(
    original: Original, self: Any, optimizers: list[Any], full_param_layouts: list[Any] | None = None
) -> None:
    from megatron.core.utils import get_pg_size

    layouts = None if full_param_layouts is None else [with_named_owners(each) for each in full_param_layouts]
    dense, copies = get_pg_size(self.dp_cp), get_pg_size(self.expt_dp)

    def share() -> None:
        if dense > 1 or copies == 1:
            original(self, optimizers, layouts)
        elif layouts is None:
            self._shard_params_ping_pong(optimizers, 1, copies)
        else:
            self._shard_params_from_layout(optimizers, layouts, 1, copies)

    share_lists(self, optimizers, share) if layouts is None else share()
    if dense == 1:
        self.dp_cp_params_list = None  # as Megatron-Core has it for one copy: there is nothing to gather
    share_work(self, optimizers)


@PATCHES.around(
    f"{_CLASS}.allgather_params",
    "the first weight of the first rank's list speaks for all: a bfloat16 model's float32 weights would be "
    "gathered as bfloat16, and nothing where that rank has none",
)
def _with_every_dtype(original: Original, self: Any) -> None:
    shared_out = [(self.dp_cp_params_list, self.dp_cp), (self.expt_dp_params_list, self.expt_dp)]
    shared_out = [(lists, group) for lists, group in shared_out if lists]
    dtypes = [{param.dtype for its in lists for param in its} for lists, _ in shared_out]
    if all(lists[0] and len(found) == 1 for (lists, _), found in zip(shared_out, dtypes, strict=True)):
        original(self)
        return
    for (lists, group), found in zip(shared_out, dtypes, strict=True):
        for dtype in sorted(found, key=str):
            _gather([[param for param in its if param.dtype == dtype] for its in lists], group)


@torch.no_grad()
def _gather(lists: Sequence[list[torch.Tensor]], group: Any) -> None:
    """Give every rank of a group the weights of all, which are of one type, as their owners have them."""
    first, rank = next(param for its in lists for param in its), group.rank()
    parts = [first.new_empty(sum(param.numel() for param in its)) for its in lists]
    if lists[rank]:
        parts[rank] = torch.cat([param.reshape(-1) for param in lists[rank]])
    dist.all_gather(parts, parts[rank], group=group)
    for part, its in zip(parts, lists, strict=True):
        for param, values in zip(its, part.split([param.numel() for param in its]), strict=True):
            param.copy_(values.view_as(param))


@PATCHES.around(f"{_CLASS}.load_state_dict_from_file", "the counterpart of save_state_dict_to_file")
@PATCHES.around(
    f"{_CLASS}.save_state_dict_to_file",
    "with context parallelism several ranks are told one file, and each would write over the others'",
)
def _with_file_of_rank(original: Original, self: Any, filename: str) -> None:
    """Files are numbered by the data-parallel rank, but weights are shared out over the context's ranks too."""
    from megatron.core.utils import get_pg_rank

    path = Path(filename)
    name = re.sub(r"\d+$", str(get_pg_rank(self.dp_cp)), path.stem)
    original(self, str(path.with_name(name + path.suffix)))


def _cost_in(pg_collection: Any, muon: MuonConfig) -> Callable[[torch.Tensor], int]:
    """The cost of a weight under these process groups (None for those of ``parallel_state``) and options."""
    from megatron.core import parallel_state

    if pg_collection is None:
        dense = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
        expert = parallel_state.get_expert_tensor_parallel_group(check_initialized=False)
    else:
        dense = getattr(pg_collection, "tp", None)
        expert = getattr(pg_collection, "expt_tp", dense)
    solver = SOLVERS[muon.stiefel_solver]

    def stiefel(p: int, q: int) -> int:
        return solver.flops(p, q, muon.stiefel_iterations)

    def cost(param: torch.Tensor) -> int:
        divided = getattr(param, "tensor_model_parallel", False) and not _is_nonlinear_or_embedding(param)
        if divided and (expert if getattr(param, "expert_tp", False) else dense) is None:
            raise ConfigError(
                f"A weight of shape {sizes(param.shape)} is divided by tensor parallelism, over a group that neither "
                "parallel_state nor pg_collection has: its owner cannot be chosen. Give "
                "megatron.training.training.wrap_model_chunks_with_ddp a pg_collection with tp and expt_tp."
            )
        return cost_of_weight(param, shard_of(param, dense, expert), muon.iteration, stiefel)

    return cost

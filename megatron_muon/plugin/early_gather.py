"""Parameter all-gathers of a layer-wise run that start inside the optimizer's step, bucket after bucket.

Megatron-Core steps all optimizers, and gathers then: after the step, or with ``--overlap-param-gather`` in the next
forward pass, before the layers that need them. But what a rank sends of a bucket is final long before, when it has
orthogonalized its matrices in it. So Adam steps first here, which takes next to nothing, and its buckets are under way
while Muon goes through the others, in the order in which the forward pass will need them.

All ranks start the gathers in one order: a rank that is done with a bucket before an earlier one holds it back. Where
ranks orthogonalize for one another, no rank starts one of Muon's before its last message to the others.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.optimizers.engines import BUCKET_ATTRIBUTE
from megatron_muon.optimizers.muon import Muon
from megatron_muon.plugin.optimizer_state import leaves, param_states
from megatron_muon.routing.wrappers import unwrapped


def gather_early(optimizer: Any, chunks: Sequence[Any]) -> None:
    """Let the gathers of a layer-wise run on the parameter layout start inside its step."""
    if any(getattr(chunk.config, "cuda_graph_impl", "none") == "full_iteration" for chunk in chunks):
        return  # those that a captured forward pass starts are a part of the graph, and repeated with it
    parts = (optimizer, *getattr(optimizer, "chained_optimizers", ()))
    if any(getattr(part, "use_buffer_param_sync", False) for part in parts):
        _UNDER_WAY.add(_EarlyGathers(optimizer, parts, chunks))


def settle(*_: Any) -> None:
    """Wait for all gathers under way: somebody is about to write to weights."""
    for gathers in _UNDER_WAY:
        if gathers.world is dist.group.WORLD:  # those of a run that was torn down have nobody left to end them
            gathers.settle()


class _EarlyGathers:
    """The bucket groups of a model, and what they wait for in a step. Its optimizer keeps it alive.

    Attributes:
        world: the process group of the run.
    """

    def __init__(self, optimizer: Any, parts: Sequence[Any], chunks: Sequence[Any]) -> None:
        self.world = dist.group.WORLD
        self._groups = _in_order(chunks)
        self._overlaps = any(group.ddp_config.overlap_param_gather for group in self._groups)
        self._outermost, self._stepping = optimizer, False
        self._left: list[int] = []
        self._silent: set[Any] = set()  # those with messages to come
        self._next = 0
        places = {param: place for place, group in enumerate(self._groups) for param in group.params}
        self._held: dict[Any, dict[torch.Tensor, tuple[int, torch.Tensor]]] = {}
        for leaf, _ in leaves(optimizer):
            held = param_states(leaf, refuse=False)
            self._held[leaf] = {each.key: (places[each.param], each.param) for each in held if each.key is not None}
            if isinstance(leaf.optimizer, Muon):
                for tensor, (place, _) in self._held[leaf].items():
                    setattr(tensor, BUCKET_ATTRIBUTE, place)
                leaf.optimizer.finals.append(functools.partial(self._send, leaf))
                if copy_to_model := getattr(leaf, "_copy_main_params_to_model_params", None):  # done in _send()
                    leaf._copy_main_params_to_model_params = self._unless_stepping(copy_to_model)
        for part in parts:
            if hasattr(part, "start_param_sync_for_bucket_group_subset"):
                part.start_param_sync_for_bucket_group_subset = lambda: None  # _step() has done it
            if hasattr(part, "chained_optimizers"):
                part._step = functools.partial(self._step, part)
        for chunk in chunks:
            # Megatron-Core's own mark: forward passes, and their schedules, need not start what is under way.
            chunk.overlap_param_gather_with_optimizer_step = self._overlaps
            unwrapped(chunk).register_load_state_dict_pre_hook(settle)

    def _unless_stepping(self, function: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: None if self._stepping else function(*args)

    def settle(self) -> None:
        """Wait for what is under way."""
        for group in self._groups:
            if group.param_gather_handle is not None:
                group.param_gather_handle.wait()
                group.param_gather_handle = None
                group._post_param_sync()

    def _step(self, chain: Any) -> bool:
        """Of a chain of optimizers: those of Adam's weights come first."""
        if chain is not self._outermost:
            return self._step_members(chain)
        self.settle()  # of modules that no forward pass has come to
        self._left, self._next, self._stepping = [0] * len(self._groups), 0, True
        self._silent = {leaf for leaf in self._held if isinstance(leaf.optimizer, Muon) and leaf.optimizer.sends}
        for held in self._held.values():
            for place, _ in held.values():
                self._left[place] += 1
        try:
            self._start()
            success = self._step_members(chain)
        finally:
            self._stepping = False
        assert self._next == len(self._groups), "each weight has been told of"
        if not self._overlaps:
            self.settle()
        return success

    def _step_members(self, chain: Any) -> bool:
        success = True
        for member in sorted(chain.chained_optimizers, key=_has_muon):
            success &= member.step_with_ready_grads()
            if member in self._held:
                self._send(member, [] if isinstance(member.optimizer, Muon) else None)
        return success

    def _send(self, leaf: Any, final: Sequence[torch.Tensor] | None) -> None:
        """Take note of an optimizer's tensors that are final: these, or all, which Megatron-Core has copied."""
        held = self._held[leaf]
        self._silent.discard(leaf)
        if final is not None and hasattr(leaf, "_copy_main_params_to_model_params"):
            mains = [tensor for tensor in final if held[tensor][1] is not tensor]
            if mains:
                torch._foreach_copy_([held[main][1].data for main in mains], [main.data for main in mains])
        for tensor in held if final is None else final:
            self._left[held[tensor][0]] -= 1
        self._start()

    def _start(self) -> None:
        """Start the gathers of which this rank's part is final, in their order."""
        while self._next < len(self._groups) and not self._left[self._next]:
            group = self._groups[self._next]
            if self._silent and _waits_for_muon(group):
                return
            self._next += 1
            ddp_config = group.ddp_config
            # By this alone Megatron-Core decides whether it waits at once. DDP has filled in what dataclasses.replace()
            # would check anew: a bucket size beside --ddp-num-buckets.
            group.ddp_config = copy.copy(ddp_config)
            group.ddp_config.overlap_param_gather = True
            try:
                group.start_param_sync()
            finally:
                group.ddp_config = ddp_config


_UNDER_WAY: weakref.WeakSet[_EarlyGathers] = weakref.WeakSet()


def _in_order(chunks: Sequence[Any]) -> list[Any]:
    """All bucket groups: first those without weights of Muon, then as forward passes come to them."""
    found = []
    for number, chunk in enumerate(chunks):
        places = {param: place for place, param in enumerate(chunk.parameters())}
        found += [
            (_waits_for_muon(group), number, min(places[param] for param in group.params), group)
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        ]
    return [group for *_, group in sorted(found, key=lambda each: each[:3])]


def _waits_for_muon(group: Any) -> bool:
    return any(getattr(param, "is_managed_by_layer_wise_optimizer", True) for param in group.params)


def _has_muon(optimizer: Any) -> bool:
    return any(isinstance(leaf.optimizer, Muon) for leaf, _ in leaves(optimizer))

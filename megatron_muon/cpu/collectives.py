"""Process groups: gloo in the place of NCCL, and what NCCL does that gloo does not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon._patching import Original, Patches

_C10D = "torch.distributed.distributed_c10d"
_PATCHED_IN = ("torch", "megatron")
PATCHES = Patches()


def _gloo(backend: Any) -> Any:
    """``gloo`` where ``backend`` names NCCL (also ``cpu:gloo,cuda:nccl``), otherwise ``backend`` itself."""
    return "gloo" if isinstance(backend, str) and "nccl" in backend.lower() else backend


@PATCHES.around(
    f"{_C10D}:init_process_group", "the scripts ask for NCCL and bind the group to a GPU", copies_in=_PATCHED_IN
)
def _wrap_init_process_group(original: Original, backend: Any = None, *args: Any, **kwargs: Any) -> None:
    # device_id binds the group to a GPU; pg_options are NCCL's unless the caller asked for another backend.
    kwargs.pop("device_id", None)
    if backend is None or _gloo(backend) != backend:
        kwargs.pop("pg_options", None)
    original("gloo" if backend is None else _gloo(backend), *args, **kwargs)


@PATCHES.around(f"{_C10D}:new_group", "subgroups ask for NCCL or its options", copies_in=_PATCHED_IN)
def _wrap_new_group(
    original: Original,
    ranks: Any = None,
    timeout: Any = None,
    backend: Any = None,
    pg_options: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if backend is None or _gloo(backend) != backend:
        backend, pg_options = "gloo", None
    kwargs.pop("device_id", None)
    return original(ranks, timeout, backend, pg_options, *args, **kwargs)


@PATCHES.around(
    f"{_C10D}:all_gather",
    "gloo wants equal sizes; the layer-wise optimizer's legacy path gathers what each rank happens to own",
    copies_in=_PATCHED_IN,
)
def _wrap_all_gather(
    original: Original,
    tensor_list: Sequence[torch.Tensor],
    tensor: torch.Tensor,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    sizes = [out.numel() for out in tensor_list]
    # Every member sees the same list of sizes, so all of them take the same way.
    if len(set(sizes)) <= 1 or dist.get_backend(group) != "gloo":
        return original(tensor_list, tensor, group=group, async_op=async_op)
    longest = max(sizes)
    padded = tensor.new_zeros(longest)
    padded[: tensor.numel()] = tensor.reshape(-1)
    gathered = [tensor.new_empty(longest) for _ in sizes]
    work = _Padded(original(gathered, padded, group=group, async_op=async_op), tensor_list, gathered)
    if async_op:
        return work
    work.wait()
    return None


@PATCHES.around(
    f"{_C10D}:reduce_scatter",
    "gloo adds up parts of unequal lengths in an order that depends on where they lie; NCCL goes from rank to rank",
    copies_in=_PATCHED_IN,
)
def _wrap_reduce_scatter(
    original: Original,
    output: torch.Tensor,
    input_list: Sequence[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    sizes = [part.numel() for part in input_list]
    if len(set(sizes)) <= 1 or dist.get_backend(group) != "gloo":
        return original(output, input_list, op=op, group=group, async_op=async_op)
    longest = max(sizes)
    padded = output.new_zeros(len(sizes), longest)
    for row, part in zip(padded, input_list, strict=True):
        row[: part.numel()] = part.reshape(-1)
    mine = output.new_empty(longest)
    reduced = dist.reduce_scatter_tensor(mine, padded.view(-1), op=op, group=group, async_op=async_op)
    work = _Padded(reduced, [output], [mine])
    if async_op:
        return work
    work.wait()
    return None


class _Padded:
    """Handle of an exchange into buffers of one length, which are copied from when it is waited for."""

    def __init__(self, work: Any, outputs: Sequence[torch.Tensor], gathered: Sequence[torch.Tensor]) -> None:
        self._work, self._pairs = work, list(zip(outputs, gathered, strict=True))

    def wait(self) -> bool:
        if self._work is not None:
            self._work.wait()
        for out, whole in self._pairs:
            out.copy_(whole[: out.numel()].view_as(out))
        self._pairs = []  # what is done with the outputs afterwards stays
        return True


@PATCHES.around(
    "megatron.core.distributed.param_and_grad_buffer:_LayerwiseAllGatherHandle.wait",
    "the last of several gathers alone is waited for: NCCL ends them in order, gloo does not",
)
def _wrap_wait(original: Original, self: Any) -> None:
    for handle in (self.handles or ())[:-1]:
        handle.wait()
    original(self)


@PATCHES.around(
    f"{_C10D}:all_reduce",
    "gloo has no AVG in older torch versions; MoE logging, MTP and loss averaging ask for it",
    copies_in=_PATCHED_IN,
)
def _average_of_all(original: Original, *args: Any, **kwargs: Any) -> Any:
    return _average(original, 0, args, kwargs)


@PATCHES.around(
    f"{_C10D}:reduce_scatter_tensor",
    "gloo has no AVG in older torch versions; DDP asks for it with --ddp-average-in-collective",
    copies_in=_PATCHED_IN,
)
def _average_of_parts(original: Original, *args: Any, **kwargs: Any) -> Any:
    return _average(original, 1, args, kwargs)


def _average(reduce: Original, source: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Divide before a SUM where AVG is asked for; ``source`` is the position of the tensor that is reduced.

    Dividing first keeps asynchronous and coalesced calls as they are. What is only read, the input of a reduce-scatter,
    is divided in a copy.
    """
    name, position = ("tensor", "input")[source], source + 1
    op = kwargs.get("op", args[position] if len(args) > position else None)
    if op != dist.ReduceOp.AVG:
        return reduce(*args, **kwargs)
    tensor = args[source] if len(args) > source else kwargs[name]
    group = kwargs.get("group", args[position + 1] if len(args) > position + 1 else None)
    size = dist.get_world_size(group)
    divided = tensor.div_(size) if name == "tensor" else tensor / size
    if len(args) > source:
        args = (*args[:source], divided, *args[source + 1 :])
    else:
        kwargs[name] = divided
    if "op" in kwargs:
        kwargs["op"] = dist.ReduceOp.SUM
    else:
        args = (*args[:position], dist.ReduceOp.SUM, *args[position + 1 :])
    return reduce(*args, **kwargs)


@PATCHES.around(
    "megatron.core.parallel_state:destroy_model_parallel",
    "forgets its groups, which torch keeps: about 60 threads of gloo, which wake up all the time",
)
def _wrap_destroy_model_parallel(original: Original) -> None:
    """Destroy the groups as well; their threads end when no model holds them any more."""
    groups = importlib.import_module("megatron.core.parallel_state")._global_process_group_list or []
    for group in groups:
        if group is not None and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)
    # Their forward pass is cached together with the module, which has a group.
    for name in ("rotary_pos_embedding:RotaryEmbedding", "yarn_rotary_pos_embedding:YarnRotaryEmbedding"):
        module, _, each = name.partition(":")
        if (imported := sys.modules.get(f"megatron.core.models.common.embeddings.{module}")) is not None:
            getattr(imported, each).forward.cache_clear()
    original()

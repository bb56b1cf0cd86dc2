"""Ranks that share weights compare what they are about to do, so that they step together or stop together."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.agree import backends_of
from megatron_muon.errors import ConfigError, sizes
from megatron_muon.optimizers.engines import Engines, grouped_by_engine
from megatron_muon.optimizers.storage import gradients_of, having_gradients
from megatron_muon.routing.layout import layout_of


def unequal_gradients(weight: str, having: Sequence[int], lacking: Sequence[int], of: str = "") -> str:
    """Why ranks that share a weight stop together.

    Args:
        weight: its name.
        having: ranks with a gradient for it.
        lacking: ranks without.
        of: follows the lists of ranks, to say of which group these are the numbers.
    """
    return (
        f"{weight} has a gradient on ranks {list(having)}{of} and none on ranks {list(lacking)}, which hold parts or "
        "copies of it: they would take different steps. Weights and momentum are those of the last step. Give it a "
        "gradient on all of them (zeros where nothing came), or on none (grad = None)."
    )


def agree(
    engines: Engines,
    groups: Sequence[dict[str, Any]],
    directions: Sequence[str],
    check: Callable[[], None],
    options: Callable[[], Mapping[str, Any]],
    is_idle: Callable[[], bool],
) -> bool:
    """Have the ranks of each group that divides weights compare their plans of a step, before it.

    A rank whose weights with gradients are those of the last step cannot know that another's are not, and would wait
    for it in another collective, or take one weight's shard for another's. So all of them meet here, in each step
    unless ``engines.compared_elsewhere``: an all-gather of 33 bytes in each group, at which the host waits for the
    device once. Beside the first messages of the step it would be too late: momentum would have changed by then, and
    those messages would never be answered.

    Groups that exchange nothing meet in the first step alone: a rank cannot know whether another has something to send.

    Args:
        engines: of the optimizer.
        groups: its param groups.
        directions: kinds of updates, in the order of the step.
        check: raises what makes this rank refuse the step; all ranks of its groups refuse it then.
        options: gives the optimizer's options by their names.
        is_idle: whether this rank's step would change nothing; asked after ``check``.

    Returns:
        whether it would change nothing on any rank of this rank's group: the same on all of them. A rank of several
        groups says no, for their other ranks do not know of each other.

    Raises:
        RuntimeError: on all ranks of a group, if their gradients, options or plans differ.
        ConfigError: on all ranks of a group, if one of them cannot step.
    """
    names = [name for name, group in sorted(engines.groups.items()) if group.size() > 1]
    if not names or engines.compared_elsewhere:
        check()
        return is_idle()
    params = [param for group in groups for param in group["params"]]
    if engines.compared_groups is None:
        _agree_on_bfloat16(engines, params, names)
    failure: ConfigError | None = None
    idle = False
    sides: dict[str, tuple[list[torch.Tensor], bytes]] = {}
    said: Mapping[str, Any] = {}
    try:
        check()
        said, idle = options(), len(names) == 1 and is_idle()
        sides = _sides(engines, params, directions)
    except ConfigError as error:
        failure = error
    meeting = names
    if engines.compared_groups is not None:
        meeting = engines.compared_groups if failure else sorted(sides.keys() & {*names})
    differ = []
    for name in meeting:
        group, (shared, plans) = engines.groups[name], sides.get(name, ([], b""))
        digest = hashlib.sha256(repr((str(failure), said, _lacking(shared))).encode() + plans).digest()
        device = "cpu" if "cpu" in backends_of(group) else "cuda"
        mine = torch.frombuffer(bytearray(digest + bytes([not idle])), dtype=torch.uint8).to(device, non_blocking=True)
        every = mine.new_empty(group.size(), mine.numel())
        dist.all_gather_into_tensor(every.view(-1), mine, group=group)
        differ.append((every[:, :-1] != mine[:-1]).any() + 2 * every[:, -1].any())  # one number of each group
    # Waits for the device, once: what is sent next depends on it.
    found = torch.stack(differ).tolist() if differ else []
    wrong, busy = [bool(its & 1) for its in found], [its > 1 for its in found]
    told = sides if not any(wrong) or failure else _sides(engines, params, directions, complete=True)
    names_of = dict(zip(params, (name for group in groups for name in group.get("param_names", ())), strict=False))
    # The problems of all groups are found before one is raised: a rank of two groups must not be missed in the second.
    problems = [
        _problem(name, engines.groups[name], told.get(name, ([], b""))[0], names_of, said, str(failure or ""))
        for name, is_wrong in zip(meeting, wrong, strict=True)
        if is_wrong
    ]
    if failure or problems:
        raise failure or problems[0]
    engines.compared_groups = sorted(sides.keys() & {*names})
    return idle and not any(busy)


def _agree_on_bfloat16(engines: Engines, params: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """Before the first step on CPUs: ranks of groups, one of which has no fast bfloat16, all iterate in float32.

    Of GPUs it is known without timing; where those of a group are not alike, their plans differ, and are refused.
    """
    if params[0].is_cuda if params else torch.cuda.is_available():
        return
    is_slow = bool(engines.slow_bfloat16)  # Megatron-Core's ranks have agreed, on more than these groups
    with contextlib.suppress(ConfigError):  # what is wrong with a weight, the comparison that follows tells all ranks
        is_slow |= bool(params) and bool(engines.slowness([*map(engines.weight, params)], params[0].device))
    for name in names:
        slowest = torch.tensor(is_slow, dtype=torch.int32)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=engines.groups[name])
        is_slow = bool(slowest)
    engines.settle_bfloat16(is_slow)


def _sides(
    engines: Engines, params: Sequence[torch.Tensor], directions: Sequence[str], complete: bool = False
) -> dict[str, tuple[list[torch.Tensor], bytes]]:
    """For each group in which this rank exchanges something: the weights, and the digests of this step's plans.

    Where all weights have a gradient, they are listed only if ``complete``: the comparison needs them only to explain
    a difference.
    """
    found: dict[str, tuple[list[torch.Tensor], bytes]] = {}
    listed = complete or len(having_gradients(params)) < len(params)
    for (direction, _), some in grouped_by_engine(params, directions).items():
        whole, having = engines.of(some, direction), having_gradients(some)
        engine = whole if len(having) == len(some) else engines.of(having, direction) if having else None
        for name in whole.plan.groups():
            shared, digests = found.get(name, ([], b""))
            takes_part = engine is not None and name in engine.plan.groups()
            digests += engine.digest(name) if engine is not None and takes_part else b"none"
            exchanged = whole.plan.exchanged(name) if listed else ()
            found[name] = [*shared, *(some[index] for index in exchanged)], digests
    return found


def _lacking(shared: Sequence[torch.Tensor]) -> list[int]:
    return [index for index, grad in enumerate(gradients_of(shared)) if grad is None]


def _problem(
    name: str,
    group: dist.ProcessGroup,
    shared: Sequence[torch.Tensor],
    names: Mapping[Any, str],
    said: Mapping[str, Any],
    failure: str,
) -> Exception:
    """Why the ranks of a group cannot step together; all of them call this, and find the same."""
    gathered: list[Any] = [None] * group.size()
    budgets = {
        f"the budget of {names.get(param, f'weight {index} of {sizes(param.shape)}')}": layout_of(param).budget
        for index, param in enumerate(shared)
    }
    dist.all_gather_object(gathered, (failure, len(shared), _lacking(shared), {**said, **budgets}), group=group)
    if failures := [f"on rank {rank} of the {name} group: {its[0]}" for rank, its in enumerate(gathered) if its[0]]:
        return ConfigError(failures[0])
    for index, param in enumerate(shared):
        having, without = ([r for r, its in enumerate(gathered) if (index in its[2]) == no] for no in (False, True))
        if having and without and len({count for _, count, *_ in gathered}) == 1:
            what = names.get(param, f"a weight of {sizes(param.shape)} on this rank")
            return RuntimeError(f"Muon: {unequal_gradients(what, having, without, f' of the {name} group')}")
    for option in dict.fromkeys(option for *_, its in gathered for option in its):
        values: dict[str, list[int]] = {}
        for rank, (*_, its) in enumerate(gathered):
            values.setdefault(str(its.get(option)), []).append(rank)
        if len(values) > 1:
            found = " and ".join(f"{value} on ranks {ranks}" for value, ranks in values.items())
            return RuntimeError(f"Muon: {option} is {found} of the {name} group, which divides weights: give all one.")
    return RuntimeError(
        f"Muon: the ranks of the {name} group plan different steps (rank {group.rank()} has {len(shared)} weights to "
        "exchange): their weights, shapes, options, or the kernels that their devices have (--muon-ns-backend) differ. "
        "All ranks of a group must be given the same parameters in the same order."
    )

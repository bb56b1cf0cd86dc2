"""Several ranks: on one GPU by gloo, which takes CUDA tensors; on two GPUs, where there are two, by NCCL."""

from __future__ import annotations

from functools import partial

import torch

from tools.bench.start import RanksError
from tools.gpu_check import rank_megatron, rank_work
from tools.gpu_check.ranks import call_on_ranks
from tools.gpu_check.report import Item, NotRunError, Report, Setting, need

GLOO, NCCL = "gloo", "cpu:gloo,cuda:nccl"

BOUNDS = {"fp32": 2e-4, "bf16": 6e-2}
"""As in :mod:`tools.gpu_check.parts.steps`."""

RANKS = 2


def items(setting: Setting) -> list[Item]:
    """See :mod:`tools.gpu_check.parts`."""
    found = []
    for backend, name in ((GLOO, "gloo"), (NCCL, "NCCL")):
        found.append(Item(f"{name}: collectives", partial(_collectives, setting, backend), 60.0))
        found.append(Item(f"{name}: TP 2", partial(_modes, setting, backend), 90.0))
        found.append(Item(f"{name}: layouts and checkpoints", partial(_megatron, setting, backend), 140.0))
        found.append(Item(f"{name}: point to point", partial(_point_to_point, setting, backend), 60.0))
    return found


def _check_gpus(setting: Setting, backend: str) -> None:
    if backend == NCCL:
        gpus = torch.cuda.device_count() if setting.is_gpu else 0
        if gpus < RANKS:
            raise NotRunError(f"NCCL has a GPU for each rank: {RANKS} are needed, there are {gpus}")


def _collectives(setting: Setting, backend: str, report: Report) -> None:
    _check_gpus(setting, backend)
    found = call_on_ranks(rank_work.collectives, RANKS, setting.device, backend, setting.folder, setting.device)
    for name in found[0]:
        wrong = [each[name] for each in found if each[name]]
        report.check(f"{name} on {setting.device}", not wrong, "; ".join(wrong))


def _modes(setting: Setting, backend: str, report: Report) -> None:
    _check_gpus(setting, backend)
    arguments = (setting.device, backend == NCCL)
    found = call_on_ranks(rank_work.modes, RANKS, setting.device, backend, setting.folder, *arguments)
    for name in found[0]:
        each = [of_rank[name] for of_rank in found]
        report.at_most(f"error of three steps, {name}", max(one["error"] for one in each), BOUNDS[name[-4:]])
        if backend == NCCL:
            waits = [one["waits"] for one in each if one["waits"]]
            report.check(f"the host waits for nothing, {name}", not waits, "; ".join(waits))
        report.row("steps of two ranks", backend=backend, mode=name, ms=1e3 * each[0]["seconds"])


def _megatron(setting: Setting, backend: str, report: Report) -> None:
    """A step at each layout, and another from what was saved at another layout."""
    _check_gpus(setting, backend)
    need("megatron.core", "megatron.training", "emerging_optimizers")
    work, folder = rank_megatron, str(setting.folder)

    def call(function: object, ranks: int, *arguments: object) -> list[object]:
        return call_on_ranks(function, ranks, setting.device, backend, setting.folder, folder, *arguments)  # type: ignore[arg-type]

    call(work.save_start, 1)
    first = {name: call(work.step, ranks, name, name) for name, ranks in (("one", 1), ("tp2", 2), ("dp2", 2))}
    # From each layout to another: the second step, after a reload, is that of a run that stayed.
    call(work.step, 1, "one", "one-again", "one-run")
    moves = {"tp2 to one": ("tp2", "one", 1), "dp2 to tp2": ("dp2", "tp2", 2), "tp2 to dp2": ("tp2", "dp2", 2)}
    for name, (source, layout, ranks) in moves.items():
        call(work.step, ranks, layout, name, f"{source}-run")
    norms = {name: [each["norm"] for each in found] for name, found in first.items()}  # type: ignore[index]
    spread = [norm / norms["one"][0] - 1 for each in norms.values() for norm in each]
    report.at_most("norms of gradients differ", max(map(abs, spread)), 1e-5)
    found = call(work.compare, 1, "one", ["tp2", "dp2"])[0] | call(work.compare, 1, "one-again", list(moves))[0]  # type: ignore[operator]
    for name, difference in found.items():
        # float32: sums in another order, amplified by the slope of the iteration.
        report.at_most(f"weights after a step, {name}, off by a share of the update", difference, 2e-3)
    messages = sum(each["messages"] for found in first.values() for each in found)  # type: ignore[index]
    report.row("layouts", backend=backend, point_to_point_calls=messages, norm=norms["one"][0])


def _point_to_point(setting: Setting, backend: str, report: Report) -> None:
    """As a group's first messages. Last: a backend that cannot do it may end the process."""
    _check_gpus(setting, backend)
    try:
        found = call_on_ranks(rank_work.point_to_point, RANKS, setting.device, backend, setting.folder, setting.device)
    except RanksError as error:
        if setting.is_gpu and backend == GLOO:
            report.left_out(
                "messages of some ranks to each other", f"gloo does not send CUDA tensors so: {error}"[:300]
            )
            return
        raise
    report.check("messages of some ranks to each other", all(found))

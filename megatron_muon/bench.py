"""``python -m megatron_muon bench``: the optimizer step, timed against Megatron-Core's own Muon.

Both optimizers update the same weights (those of a dense transformer with grouped-query attention and SwiGLU) in the
same process, in alternation, so that a machine whose speed drifts treats them alike. Under ``torchrun`` the weights are
divided over all ranks by tensor parallelism.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.optimizers.muon import Muon
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, MatrixLayout, Section

__all__ = ["main"]

HEAD = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Time and print.

    Args:
        argv: arguments of the command; those of the process by default.
    """
    args = _parser().parse_args(argv)
    if args.hidden_size % 512:
        raise SystemExit(f"megatron_muon bench: --hidden-size {args.hidden_size}: give a multiple of 512")
    device, group = _set_up()
    precision = args.precision or ("medium" if device.type == "cuda" else "high")
    options = {"lr": 1e-3, "momentum": 0.95, "fp32_matmul_prec": precision, "tp_mode": args.tp_mode}
    ours_params, theirs_params = (_weights(args, group, device) for _ in range(2))
    ours = Muon(ours_params, **options, tp_group=group, expert_tp_group=group)
    theirs = _upstream(theirs_params, options, group)
    pairs = [(_timed(ours, device), _timed(theirs, device)) for _ in range(args.steps + 3)][3:]
    _check_same_update(ours_params, theirs_params, precision)
    if group is None or group.rank() == 0:
        _print(args, device, group, precision, ours_params, pairs)
    if group is not None:
        dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_muon bench",
        description="Time the optimizer step of this package's Muon against Megatron-Core's own, in one process, in "
        "alternation. Prints the median times and the ratio with its spread. Under torchrun: with tensor parallelism.",
    )
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 512; default %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each; default %(default)s")
    parser.add_argument("--tp-mode", choices=("duplicated", "distributed"), default="duplicated")
    parser.add_argument(
        "--precision", choices=("medium", "high"), help="of the products; default: medium on GPUs, high on CPUs"
    )
    return parser


def _set_up() -> tuple[torch.device, dist.ProcessGroup | None]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, None
    dist.init_process_group("nccl" if cuda else "gloo")
    return device, dist.group.WORLD


def _weights(
    args: argparse.Namespace, group: dist.ProcessGroup | None, device: torch.device
) -> list[torch.nn.Parameter]:
    """This rank's shards of the weights of all layers, with gradients."""
    hidden, ffn = args.hidden_size, args.hidden_size * 11 // 4
    heads_per_group = 4
    query, key = heads_per_group * HEAD, HEAD
    groups = hidden // query
    layout = MatrixLayout("qkv", (Section("q", query), Section("k", key), Section("v", key)))
    shapes = [(groups * layout.period, hidden, 0), (hidden, hidden, 1), (2 * ffn, hidden, 0), (hidden, ffn, 1)]
    size = 1 if group is None else group.size()
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(args.layers):
        for m, n, dim in shapes:
            local = (m // size, n) if dim == 0 else (m, n // size)
            param: Any = torch.nn.Parameter(torch.randn(local, generator=generator).to(device))
            param.grad = torch.randn(local, generator=generator).to(device)
            param.tensor_model_parallel, param.partition_dim = True, dim
            if (m, n) == shapes[0][:2]:
                setattr(param, LAYOUT_ATTRIBUTE, layout)
                param.is_qkv, param.qkv_split_shapes = True, [section.rows for section in layout.sections]
            params.append(param)
    return params


def _upstream(params: list[torch.nn.Parameter], options: dict[str, Any], group: dist.ProcessGroup | None) -> Any:
    from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

    groups = None
    if group is not None:
        groups = SimpleNamespace(tp=group, expt_tp=group, gtp_remat=None, expt_gtp_remat=None)
    else:  # without a group upstream gathers over it all the same
        for param in params:
            param.partition_dim = -1  # type: ignore[attr-defined]
    return TensorParallelMuon(
        params,
        **options,
        nesterov=False,
        split_qkv=True,
        is_qkv_fn=lambda p: hasattr(p, "is_qkv"),
        pg_collection=groups,
    )


def _timed(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    optimizer.step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_same_update(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], precision: str) -> None:
    """A step that is fast and wrong must not win."""
    tolerance = 5e-2 if precision == "medium" else 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        difference = (mine - other).norm() / other.norm()
        if difference > tolerance:
            raise SystemExit(
                f"The two optimizers disagree: relative difference {difference:.1e} in {tuple(mine.shape)}"
            )


def _print(
    args: argparse.Namespace,
    device: torch.device,
    group: dist.ProcessGroup | None,
    precision: str,
    params: list[torch.nn.Parameter],
    pairs: list[tuple[float, float]],
) -> None:
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = 1 if group is None else group.size()
    elements = sum(param.numel() for param in params) * size
    print(f"{name}; {elements / 1e6:.1f} M weights in {len(params)} matrices; tensor parallel {size} ({args.tp_mode})")
    print(f"products {precision}; {len(pairs)} steps of each in alternation, after 3 to warm up")
    for label, times in zip(("megatron_muon", "megatron-core"), zip(*pairs, strict=True), strict=True):
        median = statistics.median(times) * 1e3
        print(f"{label:14} {median:9.2f} ms/step   ({min(times) * 1e3:.2f} to {max(times) * 1e3:.2f})")
    print(f"speed-up       {statistics.median(ratios):9.2f} x          ({ratios[0]:.2f} to {ratios[-1]:.2f})")

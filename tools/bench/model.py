"""The weights that Muon updates in one pipeline stage of a Megatron model, from a file of its flags."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_muon.errors import ConfigError
from megatron_muon.routing.layout import layout_of
from tools.bench.cases import Case, WeightSpec

__all__ = ["case_of_model", "first_layers"]


def case_of_model(path: str, tp: int | None, ep: int | None, layers: int | None) -> Case:
    """The case of ``--model``: the first pipeline stage, built by Megatron-Core on the meta device.

    The file's other parallel sizes do not count; its pipeline does.

    Args:
        path: of a file of Megatron flags, as ``plan`` takes it.
        tp: tensor-parallel size; 1 by default.
        ep: expert-parallel size; 1 by default.
        layers: take this many, from the first on; all by default.

    Raises:
        ConfigError: for flags that cannot be trained with, and weights that Muon does not update alone.
    """
    tp, ep = tp or 1, ep or 1
    with _runtime():
        weights = _weights(path, tp, ep)
    if layers is not None:
        weights = first_layers(weights, layers)
    if not weights:
        raise ConfigError(f"--model {path}: its first pipeline stage has no weights for Muon. Give another file.")
    return Case(Path(path).stem, tp, ep, tuple(weights), f"--model {path}")


def first_layers(weights: list[WeightSpec], layers: int) -> list[WeightSpec]:
    """The weights of the ``layers`` layers with the lowest numbers; those outside of layers are left out."""
    numbers = [_layer(weight.name) for weight in weights]
    kept = sorted({number for number in numbers if number is not None})[:layers]
    return [weight for weight, number in zip(weights, numbers, strict=True) if number in kept]


def _layer(name: str) -> int | None:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _weights(path: str, tp: int, ep: int) -> list[WeightSpec]:
    from megatron_muon.planning.flags import as_config_error, parse, read_flags
    from megatron_muon.planning.model import build_stages
    from megatron_muon.plugin.arguments import from_arguments
    from megatron_muon.plugin.optimizer_config import is_ours
    from megatron_muon.routing import annotate, global_names
    from megatron_muon.routing.predicate import exclusion_reason

    expert_tp = tp if ep == 1 else 1
    sizes = {"tensor-model": tp, "expert-model": ep, "expert-tensor": expert_tp, "context": 1}
    flags = [*read_flags(path).flags]
    for name, size in sizes.items():
        flags += [f"--{name}-parallel-size", str(size)]
    args, _, _ = parse(flags, None)
    if not is_ours(args.optimizer):
        raise ConfigError(f"--model {path}: --optimizer {args.optimizer}, but Muon is measured. Add --optimizer muon.")
    found = []
    with as_config_error(), contextlib.closing(build_stages(args)) as stages:  # type: ignore[type-var]
        for chunk in next(stages).chunks:
            annotate(chunk, from_arguments(args))
            for name, param in global_names(chunk):
                if param.requires_grad and exclusion_reason(param) is None:
                    found.append(_spec(name, param, tp, expert_tp))
    return found


def _spec(name: str, param: torch.nn.Parameter, tp: int, expert_tp: int) -> WeightSpec:
    layout, expert = layout_of(param), bool(getattr(param, "expert_tp", False))
    if layout.has_scalar_rows:
        raise ConfigError(
            f"--model: {name} has rows that the scalar optimizer updates, which others cannot do in one weight. "
            "Use --muon-gdn-in-proj adam and --muon-mamba-in-proj adam in the file."
        )
    ranks, dim, shape = expert_tp if expert else tp, getattr(param, "partition_dim", -1), list(param.shape)
    if ranks == 1 or dim not in (0, 1) or not getattr(param, "tensor_model_parallel", False):
        return WeightSpec(name, tuple(shape), layout, None, expert)
    shape[dim - 2] *= ranks
    return WeightSpec(name, tuple(shape), layout, dim - 2, expert)


@contextlib.contextmanager
def _runtime() -> Iterator[None]:
    """The CPU runtime and the plug-in, quietly; both are taken back, since they must not be there while we measure."""
    # Imports of Megatron-Core warn of every optional package that is missing.
    warnings.simplefilter("ignore")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    import megatron_muon
    from megatron_muon import cpu

    try:
        with cpu.enabled(), contextlib.redirect_stdout(io.StringIO()):
            megatron_muon.install()
            try:
                yield
            finally:
                megatron_muon.uninstall()
    finally:
        logging.disable(before)

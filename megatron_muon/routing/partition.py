"""Every trainable weight has exactly one optimizer: the check, and checked groups for any model."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_muon.choices import kind_of, parse_param_rule
from megatron_muon.config import MuonConfig, flag
from megatron_muon.errors import ConfigError, in_python, sizes, told_in_python
from megatron_muon.options import UpdateKnobs
from megatron_muon.routing import report
from megatron_muon.routing.annotate import OVERRIDE_ATTRIBUTE, annotate, global_names, treatments_in
from megatron_muon.routing.beside import note as note_beside
from megatron_muon.routing.layout import WHOLE, layout_of
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding
from megatron_muon.routing.rules.linear import is_linear
from megatron_muon.routing.told import Layouts
from megatron_muon.routing.wrappers import pattern, strip_wrappers


class ParamGroups(NamedTuple):
    """The groups of a model: each a dictionary with ``params``, ``param_names`` and ``weight_decay``.

    Attributes:
        muon: for :class:`megatron_muon.Muon`.
        scalar: for AdamW (or another): matrices and tables with weight decay, vectors and scalars without.
        table: who updates what, as text.
    """

    muon: list[dict[str, Any]]
    scalar: list[dict[str, Any]]
    table: str


@told_in_python()
def param_groups(
    module: torch.nn.Module,
    options: MuonConfig | None = None,
    *,
    weight_decay: float = 0.1,
    layouts: Layouts | None = None,
) -> ParamGroups:
    """Checked groups for our optimizers, of any ``torch.nn.Module``.

    ::

        groups = megatron_muon.param_groups(model, weight_decay=0.1)
        print(groups.table)
        muon = megatron_muon.Muon(groups.muon, lr=3e-4, scale_mode="spectral", extra_scale_factor=0.2)
        adam = torch.optim.AdamW(groups.scalar, lr=3e-4)

    A plain model does not tell which of its linear layers is the output layer, unless it ties the layer to an
    embedding or has ``get_output_embeddings`` (Hugging Face's transformers): name it,
    ``MuonConfig(param_rule=("lm_head.weight=adam",))``.

    Args:
        module: the model. Tags and layouts are written on its parameters.
        options: the routing options; the defaults if None.
        weight_decay: of the groups that decay.
        layouts: what fused weights of your own are, by globs of their names: a
            :class:`megatron_muon.routing.MatrixLayout`, or the :class:`megatron_muon.routing.Section` of one period of
            rows, in memory order: ``{"*.qkv.weight": (Section("q", 512), Section("k", 128), Section("v", 128))}``.

    Raises:
        ConfigError: as :func:`megatron_muon.routing.annotate` does; for a ``param_rule`` or a name of ``layouts`` that
            matches nothing; for an option that is the optimizer's.

    Warns:
        UserWarning: naming layers that look fused (``qkv``, ``gate_up_proj``, ...) and that no rule knows; naming what
            looks like an output layer and is Muon's.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"{type(module).__name__} in place of a model: give the torch.nn.Module itself, not its parameters. Who "
            "updates a weight depends on the layer that has it."
        )
    if any(type(each).__module__ == _FSDP1 for each in module.modules()):  # imports of it take seconds
        raise ConfigError(
            "FullyShardedDataParallel (FSDP1) flattens weights, and no matrix is left: use fully_shard (FSDP2), or DDP."
        )
    options = (options or MuonConfig()).validate()
    usual = MuonConfig()
    for name in _OF_MUON:
        if (value := getattr(options, name)) != getattr(usual, name):
            raise ConfigError(
                f"{name} {value!r} in the options of param_groups, which say who updates which weights, and not how: "
                f"give it to the optimizer, Muon(groups.muon, {name}={value!r})."
            )
    matched = annotate(module, options, layouts=layouts)
    trainable = {name: param for name, param in module.named_parameters() if param.requires_grad}
    refuse_unmatched(options, matched, trainable)
    for name in (layouts or {}).keys() - matched:
        meant = _meant(name, trainable)
        raise ConfigError(f"layouts: no trainable weight has the name {name!r}{meant}. * stands for any text.")
    looks = [in_python(each) for each in (fused_looking(module, options), output_looking(module)) if each]
    for each in looks:
        warnings.warn(each, skip_file_prefixes=_OURS)
    parts: dict[str, dict[str, torch.nn.Parameter]] = {"muon": {}, "decayed": {}, "rest": {}}
    for name, param in trainable.items():
        decays = param.dim() > 1 and not name.endswith("bias")  # experts have biases of two dimensions
        part = "muon" if not _is_nonlinear_or_embedding(param) else "decayed" if decays else "rest"
        parts[part][name] = param
    muon, decayed, rest = (_group(parts[part], weight_decay) for part in ("muon", "decayed", "rest"))
    for group in rest:
        group["weight_decay"] = 0.0
    routes = report.collect(trainable.items(), options)
    notes = [f"WARNING {each}" for each in looks]
    groups = ParamGroups(muon, decayed + rest, report.told_in_python(routes, options, notes=notes))
    check_partition(trainable, [*groups.muon, *groups.scalar])
    note_beside(parts["muon"].values(), [*parts["decayed"].items(), *parts["rest"].items()])
    return groups


_FUSED = re.compile(r"(^|_)(w?qkvz?|query_key_value|kv|gate_up|up_gate|in_proj|w12|w13|c_attn)(_|$)", re.IGNORECASE)
"""In names of layers that often hold several matrices: attention's, gated MLPs', and those of state-space models."""


def fused_looking(module: torch.nn.Module, options: MuonConfig) -> str:
    """Names the linear layers, one matrix each to Muon, whose names say that they hold several; empty if none does.

    An output of no more than the input (``kv_a_proj``, ``in_proj`` of an MLP that narrows) may well be one matrix.
    """
    found: dict[str, None] = {}
    claims = treatments_in(module, options)
    for name, param in global_names(module):
        layer = name.removesuffix(".weight").rpartition(".")[2]
        rows, columns = param.shape if param.dim() == 2 else (0, 0)
        if not param.requires_grad or _is_nonlinear_or_embedding(param) or layout_of(param) != WHOLE:
            continue
        is_known = hasattr(param, OVERRIDE_ATTRIBUTE) or (param in claims and claims[param].kind != "linear")
        if _FUSED.search(layer) and rows > columns and not is_known:
            found[f"{pattern(name)} ({sizes(param.shape)})"] = None
    if not found:
        return ""
    first = next(iter(found)).split()[0]
    return (
        f"{', '.join(found)}: by the name several matrices in one weight, which no rule knows, so that Muon takes it "
        f"for one. Name its rows: layouts={{'{first}': (Section('q', 64), ...)}}, or "
        f"{flag('param_rule')} '{first}=split(q 64, k 64, v 64)'; '{first}=whole' if it is one."
    )


def output_looking(module: torch.nn.Module) -> str:
    """Names the last linear layer if it is Muon's and has an output for each row of an embedding; empty otherwise.

    Layers whose class, ties or rule have said what they are are none of them.
    """
    linears = {name: layer for name, layer in module.named_modules() if is_linear(layer)}
    tables = {layer.num_embeddings for layer in module.modules() if isinstance(layer, torch.nn.Embedding)}
    name, layer = next(reversed(linears.items()), ("", None))
    weight = getattr(layer, "weight", None)
    if weight is None or not weight.requires_grad or _is_nonlinear_or_embedding(weight):
        return ""
    if (
        weight.dim() != 2
        or weight.size(0) not in tables
        or hasattr(weight, OVERRIDE_ATTRIBUTE)
        or layout_of(weight) != WHOLE
    ):
        return ""
    name = strip_wrappers(f"{name}.weight".lstrip("."))
    return (
        f"{name} ({sizes(weight.shape)}) is the last linear layer, with an output for each row of an embedding, "
        f"and Muon's. Output layers are better AdamW's: param_rule=('{name}=adam',); '{name}=muon' if it is none."
    )


_OURS = (str(Path(__file__).parents[1]), contextlib.__file__.removesuffix(".py"))
"""Files that warnings are not about: those of this package, and that of decorators."""


def _meant(name: str, names: Iterable[str]) -> str:
    """A name that may have been meant, to follow one that there is not."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"

_OF_MUON = sorted(
    {*(field.name for field in dataclasses.fields(UpdateKnobs)), "momentum", "nesterov"}
    # Which the routes, and what is said of them, depend on.
    - {"scale_mode", "weight_decay_method", "scalar_optimizer", "custom_coefficients"}
)
"""Options that act in :class:`megatron_muon.Muon` alone."""


def _group(params: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    if not params:
        return []
    return [{"params": list(params.values()), "param_names": list(params), "weight_decay": weight_decay}]


def check_partition(named: Mapping[str, torch.nn.Parameter], groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that ``groups`` hold every parameter of ``named`` exactly once, and nothing else.

    Raises:
        RuntimeError: naming the parameters that are in no group, or in several, and counting foreign ones.
    """
    counts = Counter(param for group in groups for param in group["params"])
    refuse_uneven({name: counts[param] for name, param in named.items()})
    foreign = set(counts) - set(named.values())
    if foreign:
        shapes = ", ".join(sizes(param.shape) for param in foreign)
        raise RuntimeError(f"{len(foreign)} parameters in optimizers are not the model's trainable ones: {shapes}")


def refuse_uneven(counts: Mapping[str, int], hint: str = "") -> None:
    """Refuse a number of optimizers other than 1; ``hint`` is a way out, to end the message with.

    Raises:
        RuntimeError: naming each with its count.
    """
    wrong = [f"{name} ({count})" for name, count in counts.items() if count != 1]
    if wrong:
        raise RuntimeError(
            f"These weights are not updated by exactly one optimizer (number of optimizers in brackets): "
            f"{', '.join(wrong)}. {hint}".rstrip()
        )


def refuse_unmatched(options: MuonConfig, matched: set[str], names: Collection[str] = ()) -> None:
    """Refuse a ``param_rule`` that matches no weight of the whole model, which has ``names``: it is misspelt.

    Raises:
        ConfigError: naming it.
    """
    for rule in options.param_rule:
        if rule not in matched:
            if kind_of(parse_param_rule(rule)[1]):
                raise ConfigError(
                    f"{flag('param_rule')} {rule!r}: no weight of such a name is orthogonalized, which is what has "
                    "steps and coefficients. The report says who updates each weight, and the names of all; * stands "
                    "for any text. Leave the rule out, or mend the pattern."
                )
            tied = " An output layer that is tied to the embedding goes by embedding.word_embeddings.weight."
            meant = _meant(parse_param_rule(rule)[0], names)
            raise ConfigError(
                f"{flag('param_rule')} {rule!r}: no trainable weight has such a name{meant}. Names are those of the "
                "report, with layer numbers of the whole model; * stands for any text."
                f"{tied if 'output' in rule else ''}"
            )

"""Every trainable weight has exactly one optimizer: the check, and checked groups for any model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from megatron_muon.choices import kind_of, parse_param_rule
from megatron_muon.config import MuonConfig, flag
from megatron_muon.errors import ConfigError, sizes
from megatron_muon.routing import report
from megatron_muon.routing.annotate import annotate
from megatron_muon.routing.beside import note as note_beside
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding


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


def param_groups(
    module: torch.nn.Module, options: MuonConfig | None = None, *, weight_decay: float = 0.1
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

    Raises:
        ConfigError: as :func:`megatron_muon.routing.annotate` does; or for a ``param_rule`` that matches nothing.
    """
    options = (options or MuonConfig()).validate()
    refuse_unmatched(options, annotate(module, options))
    trainable = {name: param for name, param in module.named_parameters() if param.requires_grad}
    parts: dict[str, dict[str, torch.nn.Parameter]] = {"muon": {}, "decayed": {}, "rest": {}}
    for name, param in trainable.items():
        part = "muon" if not _is_nonlinear_or_embedding(param) else "decayed" if param.dim() > 1 else "rest"
        parts[part][name] = param
    muon, decayed, rest = (_group(parts[part], weight_decay) for part in ("muon", "decayed", "rest"))
    for group in rest:
        group["weight_decay"] = 0.0
    groups = ParamGroups(muon, decayed + rest, report.render(report.collect(trainable.items(), options), options))
    check_partition(trainable, [*groups.muon, *groups.scalar])
    note_beside(parts["muon"].values(), [*parts["decayed"].items(), *parts["rest"].items()])
    return groups


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


def refuse_unmatched(options: MuonConfig, matched: set[str]) -> None:
    """Refuse a ``param_rule`` that matches no weight of the whole model: it is misspelt.

    Raises:
        ConfigError: naming it.
    """
    for rule in options.param_rule:
        if rule not in matched:
            if kind_of(parse_param_rule(rule)[1]):
                raise ConfigError(
                    f"{flag('param_rule')} {rule!r}: no weight of such a name is orthogonalized, which is what has "
                    "steps and coefficients. The report says who updates each weight, and the names of all; * stands "
                    "for any text. Leave the rule away, or mend the pattern."
                )
            tied = " An output layer that is tied to the embedding goes by embedding.word_embeddings.weight."
            raise ConfigError(
                f"{flag('param_rule')} {rule!r}: no trainable weight has such a name. Names are those of the report, "
                f"with layer numbers of the whole model; * stands for any text.{tied if 'output' in rule else ''}"
            )

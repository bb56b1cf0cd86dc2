"""The flags by which a run would go on with the rules of a checkpoint, from the weights whose rules have changed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.record import ACCEPT, Rule, layout_text
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.choices import DIRECTIONS, OPTIMIZERS, SECOND_MOMENTS, VARIANTS
from megatron_muon.config import MuonConfig, flag
from megatron_muon.plugin import options
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.routing.annotate import OVERRIDE_ATTRIBUTE, global_names, treatments_in
from megatron_muon.routing.layout import WHOLE
from megatron_muon.routing.treatment import ADAM, SPLIT, WHOLE_MATRIX, Treatment

if TYPE_CHECKING:
    from megatron_muon.checkpoint.request import Change


_LOST = {(True, False): "second moments are estimated", (False, True): "second moments are dropped"}
"""By whether a weight was Muon's, and is."""


def way_back(
    chunks: Sequence[torch.nn.Module], config: Any, ranks: Ranks, stored: Stored, changed: Sequence[Change]
) -> str:
    """With which flags a run can go on: with the rules of the checkpoint, or with its own.

    All ranks of the model must call this, under :meth:`Ranks.together`, with their weights that have changed.
    """
    changes = [(param, its, now) for param, its, now in changed if its is not None]
    names = {param: name for chunk in chunks for name, param in global_names(chunk)}

    def look() -> tuple[list[str], list[tuple[str, str]], set[tuple[bool, bool]]]:
        kinds = {(bool(its.layout), bool(now.layout)) for _, its, now in changes}
        return list(names.values()), list(_flags(chunks, config, stored, changes, names)), kinds

    everywhere = ranks.gather(look)
    known = [name for found, _, _ in everywhere for name in found]
    asked: dict[str, list[str]] = {}
    for flag_text, name in (each for _, flags, _ in everywhere for each in flags):
        asked.setdefault(flag_text, []).append(name)
    flags = [text.replace("GLOB", glob) for text, its in asked.items() for glob in _globs(set(its), known)]
    lost = [_LOST[kind] for kind in _LOST if any(kind in kinds for _, _, kinds in everywhere)]
    return (
        (f"To go on with the checkpoint's rules: {'; '.join(dict.fromkeys(flags))}. " if flags else "")
        + f"To go on with those of now: {flag('ckpt_changes')} {ACCEPT}, which keeps weights and moving averages of "
        + f"gradients; {', '.join(lost or ['what belongs to single matrices starts anew'])}."
    )


def _flags(
    chunks: Sequence[torch.nn.Module],
    config: Any,
    stored: Stored,
    changes: Sequence[tuple[torch.nn.Parameter, Rule, Rule]],
    names: Mapping[torch.nn.Parameter, str],
) -> Iterator[tuple[str, str]]:
    """What to give, or to leave out, for each weight; GLOB stands for its name."""
    if not is_ours(config.optimizer):
        yield from ((_optimizer(its.name, ""), names[param]) for param, its, _ in changes if its.layout)
        return
    record = stored.record
    if record is None:
        had_muon = any("momentum_buffer" in key for key in stored.shapes)
    else:
        had_muon = any(rule.layout for rule in record.rules)
    muon = options.of(config)
    claims = {param: treatment for chunk in chunks for param, treatment in treatments_in(chunk, muon).items()}
    for param, its, now in changes:
        if not had_muon:
            yield f"--optimizer {its.name}", names[param]
        elif its.name != now.name and bool(its.layout) == bool(now.layout):
            yield _optimizer(its.name, now.name), names[param]
        if had_muon and its.layout != now.layout:
            yield _split(param, claims.get(param), its), names[param]


def _optimizer(name: str, now: str) -> str:
    """The flags of an optimizer, by what checkpoints call its rule."""
    if name in SECOND_MOMENTS:
        return f"--optimizer adaptive_muon --adaptive-muon-moment2-method {name}"
    if name in VARIANTS or now in VARIANTS:
        return f"{flag('variant')} {name if name in VARIANTS else 'none'}"
    return f"--optimizer {name}" if name in OPTIMIZERS else f"{flag('scalar_optimizer')} {name}"


def _split(param: torch.nn.Parameter, treatment: Treatment | None, before: Rule) -> str:
    """Of one weight: the option of its kind, or a rule for it alone."""
    rule, treatment = flag("param_rule"), treatment or Treatment("other", WHOLE_MATRIX)
    ways = dict(_ways(treatment))
    ways[ADAM] = ""
    override = getattr(param, OVERRIDE_ATTRIBUTE, None)
    if override is not None and ways.get(treatment.choice) == before.layout:
        return f"leave out {rule} '{override}'"
    way = next((way for way, layout in ways.items() if layout == before.layout), None)
    if way is None:
        return f"{rule} 'GLOB=...' as in the run that saved it"
    if treatment.option and override is None and _takes(treatment.option, way):
        return f"{flag(treatment.option)} {way}"
    return f"{rule} 'GLOB={way}'"


def _ways(treatment: Treatment) -> Iterator[tuple[str, str]]:
    """What ``--muon-param-rule`` may say of a weight, and what checkpoints say of it then."""
    for way, layout in treatment.variants.items():
        yield way, layout_text(layout)
    own = next((treatment.variants[way] for way in (treatment.choice, SPLIT) if way in treatment.variants), WHOLE)
    for direction in DIRECTIONS:
        kind = own.kind if own.sections else treatment.kind
        yield direction, layout_text(dataclasses.replace(own, kind=kind, direction=direction))


def _takes(option: str, value: str) -> bool:
    """Whether a flag may have this value."""
    field = next(field for field in dataclasses.fields(MuonConfig) if field.name == option)
    return field.metadata["check"](value) is None


def _globs(names: set[str], known: Sequence[str]) -> list[str]:
    """Names of weights; for all layers and experts at once where each of them is among these."""
    found = {name: re.sub(r"\.\d+(?=\.)", ".*", name) for name in sorted(names)}
    whole = {glob for glob in found.values() if all(name in names for name in known if fnmatchcase(name, glob))}
    return list(dict.fromkeys(glob if glob in whole else name for name, glob in found.items()))

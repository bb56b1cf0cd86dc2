"""The flags by which a run would go on with the rules of a checkpoint, from the weights whose rules have changed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from megatron_muon.checkpoint.record import Rule, layout_text
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.choices import DIRECTIONS, OPTIMIZERS, SECOND_MOMENTS, VARIANTS
from megatron_muon.config import MuonConfig, flag
from megatron_muon.plugin import options
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.routing.annotate import OVERRIDE_ATTRIBUTE, claims_on, global_names
from megatron_muon.routing.layout import WHOLE
from megatron_muon.routing.treatment import ADAM, SPLIT, WHOLE_MATRIX, Treatment

if TYPE_CHECKING:
    from megatron_muon.checkpoint.canonical import Change

__all__ = ["flags_back"]


def flags_back(
    chunks: Sequence[torch.nn.Module], config: Any, stored: Stored, changed: Sequence[Change]
) -> dict[str, None]:
    """What to give, or to leave out; empty if no flag says it.

    Args:
        chunks: of the model on this rank.
        config: the ``OptimizerConfig``.
        stored: the checkpoint's contents.
        changed: weights of this rank; a rule without layout is not one of Muon's.
    """
    changes = [(param, its, now) for param, its, now in changed if its is not None]
    before = [its for _, its, _ in changes]
    if not changes:
        return {}
    if not is_ours(config.optimizer):
        return dict.fromkeys(_optimizer(rule.name, "") for rule in before if rule.layout)
    record = stored.record
    had_muon = (
        any("momentum_buffer" in key for key in stored.shapes)
        if record is None
        else any(rule.layout for rule in record.rules)
    )
    if not had_muon:
        return dict.fromkeys(f"--optimizer {rule.name}" for rule in before)
    names = {param: name for chunk in chunks for name, param in global_names(chunk)}
    muon = options.of(config)
    claims = {param: treatment for chunk in chunks for param, treatment in claims_on(chunk, muon).items()}
    found: dict[str, None] = {}
    for param, its, now in changes:
        if its.name != now.name and bool(its.layout) == bool(now.layout):
            found[_optimizer(its.name, now.name)] = None
        if its.layout != now.layout:
            glob = _glob(names, param, {each for each, rule, _ in changes if rule == its})
            found[_split(param, claims.get(param), its, glob)] = None
    return found


def _optimizer(name: str, now: str) -> str:
    """The flags of an optimizer, by what checkpoints call its rule."""
    if name in SECOND_MOMENTS:
        return f"--optimizer adaptive_muon --adaptive-muon-moment2-method {name}"
    if name in VARIANTS or now in VARIANTS:
        return f"{flag('variant')} {name if name in VARIANTS else 'none'}"
    return f"--optimizer {name}" if name in OPTIMIZERS else f"{flag('scalar_optimizer')} {name}"


def _split(param: torch.nn.Parameter, treatment: Treatment | None, before: Rule, glob: str) -> str:
    """Of one weight: the option of its kind, or a rule for it alone."""
    rule, treatment = flag("param_rule"), treatment or Treatment("other", WHOLE_MATRIX)
    ways = dict(_ways(treatment))
    ways[ADAM] = ""
    override = getattr(param, OVERRIDE_ATTRIBUTE, None)
    if override is not None and ways.get(treatment.choice) == before.layout:
        return f"leave {rule} '{override}' away"
    way = next((way for way, layout in ways.items() if layout == before.layout), None)
    if way is None:
        return f"{rule} '{glob}=...' as in the run that saved it"
    if treatment.option and override is None and _takes(treatment.option, way):
        return f"{flag(treatment.option)} {way}"
    return f"{rule} '{glob}={way}'"


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


def _glob(names: dict[torch.nn.Parameter, str], param: torch.nn.Parameter, changed: set[torch.nn.Parameter]) -> str:
    """The weight's name, with any number of a layer or expert if all of them have changed."""
    glob = re.sub(r"\.\d+(?=\.)", ".*", names[param])
    return glob if all(each in changed for each, name in names.items() if fnmatchcase(name, glob)) else names[param]

"""Decides for every weight who updates it and as which matrices, and writes that on the weight.

Rules (:mod:`megatron_muon.routing.rules`) say what a module's weights are; options choose among the ways in which a
weight can be treated; ``--muon-param-rule`` overrides both; what is left unknown stops the run. Only attributes are
written, so :func:`annotate` may run any number of times: before DDP lays out its buffers, and in the optimizer factory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch

from megatron_muon.choices import (
    AUTO_STEPS,
    DIRECTIONS,
    STACK,
    STEPS,
    TRANSPOSED_STACK,
    budget_of,
    kind_of,
    parse_form,
    parse_param_rule,
)
from megatron_muon.config import MuonConfig, flag
from megatron_muon.errors import ConfigError, sizes
from megatron_muon.routing.adapters import check_adapters
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, MSIGN, MatrixLayout, layout_of
from megatron_muon.routing.predicate import REASON_ATTRIBUTE, _is_nonlinear_or_embedding, is_divided, is_vector
from megatron_muon.routing.rules import is_expert_container, rules_of
from megatron_muon.routing.rules.embedding import output_embeddings
from megatron_muon.routing.rules.linear import LORA_FACTOR, adapted, is_convolution, is_linear, linear
from megatron_muon.routing.told import Layouts, given_layout, said_by_rule
from megatron_muon.routing.treatment import ADAM, SPLIT, UNKNOWN, WHOLE_MATRIX, Treatment
from megatron_muon.routing.wrappers import pattern, restore_attributes, strip_wrappers

_MEGATRON = ("megatron.core.", "megatron.legacy.", "transformer_engine.")

OVERRIDE_ATTRIBUTE = "muon_override"
"""Attribute that names the ``--muon-param-rule`` which decided about a weight."""

BUDGET_RULES_ATTRIBUTE = "muon_budget_rules"
"""Attribute that names those which decided about its budget."""

_BY_HAND = "skip_orthogonalization_by_hand"
"""Attribute that keeps a tag of the user while a ``--muon-param-rule`` outweighs it."""

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT_LAYER = "output_layer.weight"
"""Names, in a model of Megatron-Core, of what ``share_embeddings_and_output_weights`` makes one weight."""

Treatments = dict[torch.Tensor, Treatment]


def annotate(
    module: torch.nn.Module,
    options: MuonConfig | None = None,
    *,
    adapters: bool = True,
    layouts: Layouts | None = None,
) -> set[str]:
    """Put layouts and tags on the trainable weights of ``module``.

    Sets ``matrix_layout`` on every weight that Muon updates, ``skip_orthogonalization`` (with
    ``skip_orthogonalization_reason``) on weights that Muon must not touch, and ``expert_tp`` on the weights of experts,
    which are cut over the expert tensor-parallel group. A tag ``skip_orthogonalization = True`` that was set by hand
    stays, unless a ``param_rule`` names the weight.

    Args:
        module: a model chunk, wrapped or not, or any ``torch.nn.Module``.
        options: the routing options; the defaults if None.
        adapters: whether to look if Muon can do its work on adapters; not before it is known that Muon will come.
        layouts: of fused weights that no rule knows; the last one that matches counts, in place of the weight's own
            rule, and a ``param_rule`` outweighs it.

    Returns:
        Those of ``options.param_rule`` that match a weight of this module; of budgets, one that is orthogonalized. And
        those names of ``layouts``.

    Raises:
        ConfigError: naming every weight that no rule can classify, with the option that decides it; the weight whose
            shape does not allow the split that is asked for; or adapters with magnitudes of their own (DoRA).
    """
    options = options or MuonConfig()
    restore_attributes(module)
    mark_experts(module)
    claims = treatments_in(module, options)
    # Rules that decide by name must decide alike about all copies of a table: they get the same gradients, and with
    # different updates would drift apart.
    copies = {param for param, is_output in _tied_weights(module) if is_output}
    stacks = set() if options.unknown_2d != "error" else set(unknown_stacks(module))
    unknown, matched = [], set()
    for wrapped_name, param in _wrapped_names(module):
        if not param.requires_grad:
            continue
        own_name = strip_wrappers(wrapped_name)
        name = own_name.removesuffix(_OUTPUT_LAYER) + _EMBEDDING if param in copies else own_name
        treatment = claims.get(param)
        if treatment is None or treatment.choice == UNKNOWN:
            treatment = _unclaimed(param, options, treatment, param in stacks)
        names = {name} if param in copies else {name, wrapped_name}  # as in the report, and in named_parameters()
        if given := [glob for glob in layouts or () if _matches(names, glob)]:
            matched.update(given)
            treatment = given_layout(name, param, treatment, (layouts or {})[given[-1]])
        rules = [rule for rule in options.param_rule if _matches(names, parse_param_rule(rule)[0])]
        budgets = [rule for rule in rules if kind_of(parse_param_rule(rule)[1])]
        if routes := [rule for rule in rules if rule not in budgets]:
            matched.update(routes)
            choice = parse_param_rule(routes[-1])[1]
            if parse_form(choice):
                treatment, choice = said_by_rule(name, param, treatment, choice, routes[-1]), SPLIT
            _write(name, param, treatment, choice, routes[-1])
        elif treatment.choice == UNKNOWN:
            unknown.append((name, param))
            continue
        else:
            _write(name, param, treatment, treatment.choice, None)
        if budgets and _is_orthogonalized(param):
            matched.update(budgets)
            _give_budget(name, param, budgets)
    if unknown:
        _refuse(unknown)
    if adapters:
        check_adapters(module, _factors_of_muon(module))
    return matched


def _matches(names: set[str], glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in names)


def _factors_of_muon(module: torch.nn.Module) -> dict[torch.Tensor, str]:
    """Trainable factors of adapters that are not the scalar optimizer's, with their names."""
    return {
        param: name
        for name, param in global_names(module)
        if param.requires_grad and hasattr(param, LORA_FACTOR) and not _is_nonlinear_or_embedding(param)
    }


def tag(module: torch.nn.Module, options: MuonConfig) -> None:
    """Put the tags of ``module``'s own rules on its weights, when it is built; nothing else, and no refusals."""
    for param, treatment in _treatments_by_rules(module, options):
        if treatment.choice == ADAM:
            _skip(param, True, treatment.reason)


def mark_experts(module: torch.nn.Module) -> None:
    """Set ``expert_tp`` on the weights in containers of experts: the expert tensor-parallel group divides them."""
    for submodule in module.modules():
        if is_expert_container(submodule):
            for param in submodule.parameters():
                param.expert_tp = True  # type: ignore[attr-defined]


def global_names(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with their names in the whole model: without wrappers, with layers numbered over all stages.

    A layer of a pipeline stage counts from 0 in its container, but knows its number in the model (``layer_number``).
    """
    for name, param in _wrapped_names(module):
        yield strip_wrappers(name), param


def _wrapped_names(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """As :func:`global_names`, with the wrappers in the names."""
    numbers = {
        name: f"{name.rpartition('.')[0]}.{submodule.layer_number - 1}"
        for name, submodule in module.named_modules()
        if re.search(r"(^|\.)layers\.\d+$", name) and isinstance(getattr(submodule, "layer_number", None), int)
    }
    for name, param in module.named_parameters():
        yield _renumber(name, numbers), param


def _tied_weights(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, bool]]:
    """Tables that are an output layer, too, and whether it is by that name alone that a weight is known here.

    The last pipeline stage has a copy of the table under the name of the output layer.
    """
    for model in module.modules():
        if getattr(model, "share_embeddings_and_output_weights", False):
            for name, param in model.named_parameters():
                own_name = strip_wrappers(name)
                if own_name == _OUTPUT_LAYER or own_name.endswith("word_embeddings.weight"):
                    yield param, own_name == _OUTPUT_LAYER


def _renumber(name: str, numbers: dict[str, str]) -> str:
    for found in re.finditer(r"\.layers\.\d+(?=\.)|^layers\.\d+(?=\.)", name):
        prefix = name[: found.end()]
        if prefix in numbers:
            return numbers[prefix] + name[found.end() :]
    return name


def treatments_in(module: torch.nn.Module, options: MuonConfig) -> Treatments:
    """The first claim on each weight; a module comes before the modules in it, a special rule before a general one."""
    claims: Treatments = {}
    for submodule in module.modules():
        for param, treatment in _treatments_by_rules(submodule, options):
            claims.setdefault(param, treatment)
    # After all others: a linear layer that is tied to an embedding is a table, wherever in the model it stands.
    for submodule in filter(is_linear, module.modules()):
        for param, treatment in linear(submodule, options):
            claims.setdefault(param, treatment)
    for param, treatment in output_embeddings(module):
        claims[param] = treatment
    _adapters_follow_their_base(module, claims)
    for param, _ in _tied_weights(module):
        if param in claims:  # it multiplies features, on every pipeline stage that has a copy of it
            claims[param] = dataclasses.replace(claims[param], kind="output")
    return claims


def _treatments_by_rules(module: torch.nn.Module, options: MuonConfig) -> Iterator[tuple[torch.Tensor, Treatment]]:
    for rule in rules_of(module):
        yield from rule(module, options)


def _adapters_follow_their_base(module: torch.nn.Module, claims: Treatments) -> None:
    """The B factor of an adapter has the rows of the layer that it adapts, and is split as they are."""
    for wrapper in module.modules():
        base, factors = adapted(wrapper)
        if base is None or base not in claims:
            continue
        its = claims[base]
        own = next(iter(its.variants.values()))
        for factor in factors:
            mine = claims[factor]
            turns = next(iter(mine.variants.values())).turns
            its_rows = own.stacked == (turns > 0) and _has_rows_of(factor, base, own.transposed)
            if not its_rows or mine.choice == ADAM:
                continue
            variants = {
                name: dataclasses.replace(layout, transposed=False, turns=turns)
                for name, layout in its.variants.items()
            }
            kind = f"{mine.kind} of {its.kind}"
            claims[factor] = dataclasses.replace(its, kind=kind, variants=variants, tags=mine.tags)


def _has_rows_of(factor: torch.Tensor, base: torch.Tensor, transposed: bool) -> bool:
    """Whether the rows of a B factor are those of its base, as whole weights.

    Megatron-Bridge divides the B of a layer that every rank holds whole (a router, ``linear_proj``).
    """
    if is_divided(factor, 0) and not is_divided(base, 0):
        return base.size(0) % factor.size(0) == 0
    return factor.size(0) == (base.size(-1) if transposed else base.size(-2))


def unknown_stacks(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Bare weights of three dimensions that may be a matrix for each expert: of no convolution, and not Megatron's."""
    for holder in module.modules():
        if is_convolution(holder) or any(cls.__module__.startswith(_MEGATRON) for cls in type(holder).__mro__):
            continue
        for param in holder.parameters(recurse=False):
            if param.dim() == 3 and not is_vector(param):
                yield param


def _unclaimed(param: torch.Tensor, options: MuonConfig, claim: Treatment | None, stack: bool) -> Treatment:
    """What happens to a weight that no rule claims, or one only to say so: 2-D ones, and stacks, raise a question."""
    if stack and not _has_tag(param):
        return Treatment("3-D parameter", UNKNOWN, {STACK: MatrixLayout("whole", stacked=True)})
    if param.dim() != 2 or is_vector(param):
        return Treatment("other", WHOLE_MATRIX)
    choices = {"adam": ADAM, "muon": WHOLE_MATRIX, "error": UNKNOWN}
    settled = getattr(param, "is_embedding_or_output_parameter", False) or _has_tag(param)
    choice = WHOLE_MATRIX if settled else choices[options.unknown_2d]
    kind = claim.kind if claim else "2-D parameter"
    return Treatment(kind, choice, reason=f"unknown 2-D weight ({flag('unknown_2d')} {options.unknown_2d})")


def _has_tag(param: torch.Tensor) -> bool:
    """Whether somebody (not this module) has said by a tag that Muon leaves ``param`` alone."""
    by_hand = getattr(param, "skip_orthogonalization", False) and not hasattr(param, REASON_ATTRIBUTE)
    return by_hand or getattr(param, "use_muon", True) is False


def _is_orthogonalized(param: torch.Tensor) -> bool:
    layout = layout_of(param)
    return not _is_nonlinear_or_embedding(param) and layout.direction == MSIGN and layout.has_matrices


def _give_budget(name: str, param: torch.Tensor, rules: list[str]) -> None:
    """What these rules together say: of each kind the last."""
    choices = {rule: parse_param_rule(rule)[1] for rule in rules}
    last = {kind_of(choice): rule for rule, choice in choices.items()}
    budget = budget_of(choices.values())
    if budget is not None and budget.steps == AUTO_STEPS:  # of one operator, in the layers that the rule names
        globs = ", ".join(filter(None, (parse_param_rule(last[STEPS])[0], budget.coefficients)))
        budget = dataclasses.replace(budget, measured=f"{pattern(name)} ({globs})")
    setattr(param, LAYOUT_ATTRIBUTE, dataclasses.replace(layout_of(param), budget=budget))
    setattr(param, BUDGET_RULES_ATTRIBUTE, tuple(last.values()))


def _write(name: str, param: torch.Tensor, treatment: Treatment, choice: str, override: str | None) -> None:
    """Put the decision on the parameter, in place of any earlier one."""
    _clear(param)
    for attribute, value in treatment.tags.items():
        setattr(param, attribute, value)
    if override is not None:
        setattr(param, OVERRIDE_ATTRIBUTE, override)
    elif getattr(param, "skip_orthogonalization", False):
        return  # a tag set by hand
    if choice == ADAM:
        _skip(param, True, f"{flag('param_rule')} {override}" if override else treatment.reason)
        return
    if param.dim() not in {layout.dims for layout in treatment.variants.values()}:
        if override is not None:
            raise ConfigError(
                f"{flag('param_rule')} {override}: {name} has shape {sizes(param.shape)}; Muon updates matrices."
            )
        return  # by its shape the predicate leaves it to the scalar optimizer
    direction = choice if choice in DIRECTIONS else MSIGN
    layout = treatment.variants[_variant(name, param, treatment, "muon" if direction != MSIGN else choice, override)]
    if direction != MSIGN:
        kind = layout.kind if layout.sections else treatment.kind
        layout = dataclasses.replace(layout, kind=kind, direction=direction)
    setattr(param, LAYOUT_ATTRIBUTE, layout)
    if override is not None or treatment.forced:
        _skip(param, False, "")


def _variant(name: str, param: torch.Tensor, treatment: Treatment, choice: str, override: str | None) -> str:
    """The variant that ``choice`` means, which the weight must have."""
    if choice == "muon":
        own = treatment.choice if treatment.choice in treatment.variants else SPLIT
        choice = own if own in treatment.variants else WHOLE_MATRIX
    if choice in treatment.variants:
        return choice
    what = f"{name} {treatment.problem}" if treatment.problem else f"{name} ({treatment.kind}) cannot be split that way"
    option = f"{flag(treatment.option)} {choice}" if treatment.option else f"{choice} (by the rule of its module)"
    asked = f"{flag('param_rule')} {override}" if override else option
    known = ", ".join(treatment.variants)
    raise ConfigError(
        f"{what}; its shape is {sizes(param.shape)}, {asked} is asked for, and there is: {known}, adam. "
        f"Decide with {flag('param_rule')} '{name}=whole' or '{name}=adam'."
    )


def _skip(param: torch.Tensor, skip: bool, reason: str) -> None:
    """Set ``skip_orthogonalization``; what was there is kept for :func:`_clear`, for it was set by hand."""
    if not hasattr(param, REASON_ATTRIBUTE) and hasattr(param, "skip_orthogonalization"):
        setattr(param, _BY_HAND, param.skip_orthogonalization)
    param.skip_orthogonalization = skip  # type: ignore[attr-defined]
    setattr(param, REASON_ATTRIBUTE, reason)


def _clear(param: torch.Tensor) -> None:
    """Take away what an earlier call has written; a tag without a reason was set by hand, and is put back."""
    written = [OVERRIDE_ATTRIBUTE, BUDGET_RULES_ATTRIBUTE, LAYOUT_ATTRIBUTE]
    if hasattr(param, REASON_ATTRIBUTE):
        written += ["skip_orthogonalization", REASON_ATTRIBUTE]
    for attribute in written:
        if attribute in vars(param):
            delattr(param, attribute)
    if hasattr(param, _BY_HAND):
        param.skip_orthogonalization = getattr(param, _BY_HAND)  # type: ignore[attr-defined]
        delattr(param, _BY_HAND)


def _refuse(unknown: list[tuple[str, torch.nn.Parameter]]) -> None:
    """Stop for weights that no rule knows: matrices first, then stacks of them, which have choices of their own."""
    matrices = [(name, param) for name, param in unknown if param.dim() == 2]
    some = matrices or unknown
    named = ", ".join(f"{name} ({sizes(param.shape)})" for name, param in some[:8])
    more, first = f" and {len(some) - 8} more" if len(some) > 8 else "", some[0][0]
    if matrices:
        raise ConfigError(
            f"No rule knows these 2-D weights: {named}{more}. Say who updates each with {flag('param_rule')} "
            f"'{first}=muon' or '{first}=adam' (a pattern may stand for many), or all with {flag('unknown_2d')} muon "
            "or adam."
        )
    rule = flag("param_rule")
    raise ConfigError(
        f"No rule knows these 3-D weights, which are no convolutions: {named}{more}. If each is a matrix for every "
        f"expert, say which way they lie: {rule} '{first}={STACK}' for (experts, outputs, inputs), "
        f"'{first}={TRANSPOSED_STACK}' for (experts, inputs, outputs), '{first}={STACK}(gate 1, up 1)' with the "
        f"sections of their rows; or '{first}=adam'. A pattern may stand for many."
    )

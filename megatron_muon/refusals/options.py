"""This package's options with each other, and with the optimizer that reads them."""

from __future__ import annotations

from math import inf
from typing import Any

from megatron_muon.choices import BALLS, OPTIMIZERS, SECOND_MOMENTS, parse_param_rule
from megatron_muon.refusals.rule import (
    Condition,
    Refusal,
    given,
    missing,
    one_of,
    optimizer,
    other_than,
    ours,
    quietly,
    that,
    turned_off,
)

_HYPERBALL = one_of("muon_variant", "hyperball")
_MEASURED = ("update_norm", "spectral_norm")
_ADAPTIVE = quietly(optimizer("adaptive_muon"))


def _rule_gives(*choices: str) -> Condition:
    """A rule of ``--muon-param-rule`` that gives weights to one of these choices."""

    def matching(rules: Any) -> list[str]:
        return [rule for rule in rules if parse_param_rule(rule)[1] in choices]

    return Condition(
        "muon_param_rule",
        lambda settings: bool(matching(settings["muon_param_rule"])),
        lambda settings: " ".join(f"--muon-param-rule '{rule}'" for rule in matching(settings["muon_param_rule"])),
        f"`--muon-param-rule` {', '.join(f'`GLOB={choice}`' for choice in choices)}",
    )


def _no_rule_gives(*choices: str) -> Condition:
    gives = _rule_gives(*choices)
    return Condition(
        gives.name,
        lambda settings: not gives.holds(settings),
        lambda settings: "without a weight that reads it",
        f"without {gives.words}",
    )


def _is_no_fraction(value: Any) -> bool:
    return not (isinstance(value, (int, float)) and 0.0 <= value < 1.0)


def _is_not_positive(value: Any) -> bool:
    return not (isinstance(value, (int, float)) and 0.0 < value < inf)


OPTIONS: tuple[Refusal, ...] = (
    Refusal(
        (one_of("muon_qkv", "per_head"), turned_off("muon_split_qkv", "--muon-no-split-qkv")),
        "these contradict each other",
        "give one",
    ),
    Refusal(
        (one_of("muon_coefficient_type", "custom"), missing("muon_custom_coefficients")),
        "nothing says what they are",
        "give --muon-custom-coefficients a,b,c at least once, or another type",
    ),
    Refusal(
        (given("muon_custom_coefficients"), other_than("muon_coefficient_type", "custom")),
        "the coefficients of that type are its own",
        "add --muon-coefficient-type custom, or leave out --muon-custom-coefficients",
    ),
    *(
        Refusal(
            (one_of("muon_tp_mode", "gram"), *bits),
            "Gram Newton-Schulz needs more bits than bfloat16 has",
            "add --muon-ns-dtype fp16 (or fp32), or use --muon-tp-mode auto",
        )
        for bits in (
            (one_of("muon_ns_dtype", "bf16"),),
            (one_of("muon_ns_dtype", "auto"), one_of("muon_fp32_matmul_prec", "medium")),
        )
    ),
    *(
        Refusal((other_than("muon_blockwise_period", 1), other), because, instead)
        for other, because, instead in (
            (one_of("muon_tp_mode", "blockwise"), "no step would take whole matrices", "use --muon-tp-mode auto"),
            (
                other_than("muon_variant", "none"),
                "what it measures of a matrix is of the whole one, which block steps do not see",
                "leave one of the two out",
            ),
        )
    ),
    Refusal(
        (other_than("muon_blockwise_lr_mult", 1.0), one_of("muon_blockwise_period", 1)),
        "there are no steps that it is for",
        "add --muon-blockwise-period 5, or leave it out",
    ),
    Refusal(
        (_HYPERBALL, other_than("muon_scale_mode", "none")),
        "the radius of the weight decides about the size of its updates",
        "add --muon-scale-mode none",
    ),
    *(
        Refusal(
            (_HYPERBALL, condition),
            "weights keep their norm, and the learning rate alone is the angle by which they turn",
            "leave it out",
        )
        for condition in (
            other_than("muon_extra_scale_factor", 1.0),
            other_than("muon_weight_decay_method", "decoupled"),
        )
    ),
    Refusal(
        (one_of("muon_variant", "polargrad"), one_of("muon_scale_mode", *_MEASURED)),
        "the mode divides out the number by which PolarGrad multiplies each update, so that nothing is left of it",
        "add --muon-scale-mode none",
    ),
    Refusal(
        (
            that(
                "adaptive_muon_moment2_method",
                lambda value: value not in SECOND_MOMENTS,
                f"other than {', '.join(f'`{name}`' for name in SECOND_MOMENTS)}",
            ),
            _ADAPTIVE,
        ),
        "",
        f"choose one of {', '.join(SECOND_MOMENTS)} (adamuon is the paper's, adamuon_eo emerging-optimizers')",
    ),
    Refusal(
        (that("adaptive_muon_beta2", _is_no_fraction, "below 0, or 1 and more"), _ADAPTIVE),
        "",
        "give a number from 0 to below 1 (0.95 is usual)",
    ),
    Refusal(
        (that("adaptive_muon_eps", _is_not_positive, "of 0 and less"), _ADAPTIVE),
        "",
        "give a positive number (1e-8 is usual)",
    ),
    Refusal(
        (one_of("adaptive_muon_moment2_method", "namo"), one_of("muon_scale_mode", *_MEASURED), _ADAPTIVE),
        "the mode divides out the number by which NAMO multiplies each update, so that nothing is left of it",
        "use a scale by shape, such as --muon-scale-mode spectral or moonlight, or --adaptive-muon-moment2-method "
        "normuon or adamuon",
    ),
    Refusal(
        (_rule_gives("stiefel"), optimizer(*(name for name in OPTIMIZERS if name != "stiefel_muon"))),
        "it keeps no weight on a manifold",
        "use --optimizer stiefel_muon, or another choice",
    ),
    Refusal(
        (_rule_gives("coefficients:custom"), other_than("muon_coefficient_type", "custom")),
        "--muon-custom-coefficients are those of the whole optimizer",
        "add --muon-coefficient-type custom, and give the other weights their set by a rule before this one, such as "
        "'*=coefficients:quintic'",
    ),
    Refusal(
        (_rule_gives("steps:auto"), optimizer("spectral_sphere")),
        "it iterates each matrix several times, and not the momentum, which is what is measured",
        "give a number, such as steps:7",
    ),
    *(
        Refusal(
            (_rule_gives(*BALLS), keeper),
            "what keeps its norm has no weight decay, and such a weight would leave its ball",
            "give it to Adam, or use --optimizer muon",
        )
        for keeper in (optimizer("spectral_sphere"), _HYPERBALL)
    ),
    Refusal(
        (other_than("muon_ball_radius", 1.0), _no_rule_gives(*BALLS), ours()),
        f"it is the radius of what --muon-param-rule gives to {', '.join(BALLS)}",
        "give them some weights (--muon-param-rule 'GLOB=CHOICE'), or leave it out",
    ),
    Refusal(
        (one_of("muon_alarm", "stop"), missing("muon_log_interval"), missing("muon_check_replicas_interval")),
        "nothing is measured that could raise one",
        "add --muon-log-interval 10, or --muon-check-replicas-interval 1000, or leave it out",
    ),
    Refusal(
        (given("muon_check_replicas_interval"), one_of("muon_alarm", "off")),
        "nobody would be told of replicas that differ",
        "use --muon-alarm warn (or stop), or leave one of the two out",
    ),
    *(
        Refusal(
            (given(name), missing("muon_log_interval")),
            "nothing is measured that could be written",
            "add --muon-log-interval 10, or leave it out",
        )
        for name in ("muon_log_per_layer", "muon_log_console")
    ),
)
"""Rows that ask for the optimizer's name are left to those who know it: :meth:`megatron_muon.MuonConfig.validate` does
not."""

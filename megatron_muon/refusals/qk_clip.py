"""QK-clip, with any optimizer."""

from __future__ import annotations

from megatron_muon.choices import OPTIMIZERS
from megatron_muon.refusals.rule import (
    Condition,
    Refusal,
    given,
    missing,
    one_of,
    other_optimizer,
    other_than,
    quietly,
    that,
)

_CLIP = given("qk_clip")

QK_CLIP: tuple[Refusal, ...] = (
    Refusal(
        (that("qk_clip_alpha", lambda alpha: not 0.0 < alpha < 1.0, "of 0 and less, or 1 and more"), quietly(_CLIP)),
        "",
        "give a number between 0 and 1 (0.5 is usual)",
    ),
    Refusal(
        (that("qk_clip_threshold", lambda value: not 0.0 < value < float("inf"), "of 0 and less"), quietly(_CLIP)),
        "",
        "give a positive number (100 is usual)",
    ),
    Refusal(
        (one_of("muon_qk_logits", "lse"), that("context_parallel_size", lambda size: size > 1, "above 1")),
        "the flash kernel sees the keys of one rank",
        "use --muon-qk-logits exact",
    ),
    *(
        Refusal((given(name), _CLIP), "FSDP's shards are not clipped", "use --use-distributed-optimizer")
        for name in ("use_torch_fsdp2", "use_megatron_fsdp")
    ),
    *(
        Refusal((given(name), _CLIP, other_optimizer(*OPTIMIZERS)), because, "leave one of the two off")
        for name, because in (
            ("use_precision_aware_optimizer", "its master weights are out of reach"),
            ("optimizer_cpu_offload", "its master weights are out of reach"),
        )
    ),
    Refusal(
        (given("optimizer_cuda_graph"), _CLIP, other_optimizer(*OPTIMIZERS)),
        "Megatron-Core captures the whole step, which would not clip",
        "leave one of the two off (with --optimizer muon both work)",
    ),
    *(
        Refusal(
            (captured, that("muon_qk_logits_interval", lambda steps: steps > 1, "above 1")),
            "a captured forward pass measures in each step, or in none",
            "use --muon-qk-logits-interval 1",
        )
        for captured in (
            that("cuda_graph_impl", lambda value: value not in (None, "none"), "other than `none`"),
            *map(given, ("enable_cuda_graph", "external_cuda_graph")),  # which Megatron-Core turns into it later
        )
    ),
)

_UNMEASURED = Condition(
    "log_max_attention_logit",
    lambda settings: not settings["qk_clip"] and not settings["log_max_attention_logit"],
    lambda _: "without --qk-clip or --log-max-attention-logit",
    "without `--qk-clip` or `--log-max-attention-logit`",
)

UNMEASURED: tuple[Refusal, ...] = (
    *(
        Refusal((other_than(name, default), missing("qk_clip")), "nothing is clipped", "add --qk-clip, or leave it out")
        for name, default in (("muon_qk_clip_rule", "q_only"), ("muon_qk_clip_norm", "skip"))
    ),
    *(
        Refusal((other_than(name, default), _UNMEASURED), "nothing is measured", "add one of them, or leave it out")
        for name, default in (("muon_qk_logits", "auto"), ("muon_qk_logits_interval", 1), ("muon_qk_log_layers", 0))
    ),
)
"""Flags that would act on nobody. A config made in code may have them without: recipes set them for all models."""

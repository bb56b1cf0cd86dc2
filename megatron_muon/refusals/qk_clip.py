"""QK-clip, with any optimizer."""

from __future__ import annotations

from megatron_muon.refusals.rule import Refusal, given, one_of, quietly, that

__all__ = ["QK_CLIP"]

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
        Refusal((given(name), _CLIP), because, "leave one of the two off")
        for name, because in (
            ("use_precision_aware_optimizer", "its master weights are out of reach"),
            ("optimizer_cpu_offload", "its master weights are out of reach"),
            ("optimizer_cuda_graph", "the captured step would not clip"),
        )
    ),
)

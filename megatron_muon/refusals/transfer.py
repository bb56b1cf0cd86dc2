"""Options that set up param groups: ``--muon-transfer``, ``--muon-scalar-lr``, ``--muon-scalar-weight-decay-method``.

What they do to groups, and to initial weights, outweighs what other settings do, or contradicts it.
"""

from __future__ import annotations

from megatron_muon.refusals.rule import (
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

_TRANSFER = given("muon_transfer")
_STATIC = other_than("muon_scalar_weight_decay_method", "decoupled")
_SCALAR_LR = given("muon_scalar_lr")
_SCHEDULED = one_of("muon_weight_decay_method", "independent_scheduled")

TRANSFER: tuple[Refusal, ...] = (
    Refusal(
        (_TRANSFER, other_than("muon_scale_mode", "unit_rms_norm", "spectral_norm")),
        "its best learning rate changes with the width",
        "add --muon-scale-mode unit_rms_norm (or spectral_norm), on the tuned model and on this one",
    ),
    Refusal(
        (_TRANSFER, other_than("muon_weight_decay_method", "independent_scheduled")),
        "only independent_scheduled does not depend on learning rates that differ",
        "add --muon-weight-decay-method independent_scheduled, on the tuned model and on this one",
    ),
    Refusal((_TRANSFER, other_than("muon_variant", "none")), "there is no rule for it", "use none"),
    Refusal(
        (_TRANSFER, one_of("adaptive_muon_moment2_method", "namo"), quietly(optimizer("adaptive_muon"))),
        "there is no rule for it, since the size of its updates depends on that of gradients",
        "use --adaptive-muon-moment2-method normuon or adamuon, with --muon-scale-mode spectral_norm",
    ),
    Refusal(
        (_TRANSFER, optimizer("adaptive_muon"), other_than("muon_scale_mode", "spectral_norm")),
        "second moments change the spectral norm of updates",
        "add --muon-scale-mode spectral_norm",
    ),
    *(
        Refusal((_TRANSFER, given(name)), "these are two rules for one thing", "give one")
        for name in ("use_mup", "init_method_xavier_uniform")
    ),
    Refusal(
        (_TRANSFER, given("moe_latent_size")),
        "experts and the projection from their latent space would both start from zeros, and stay there",
        "train such a model without the flag",
    ),
    Refusal(
        (_TRANSFER, missing("untie_embeddings_and_output_weights")),
        "the output layer is the embedding, too, and the rule has another learning rate for each",
        "add --untie-embeddings-and-output-weights",
    ),
    Refusal(
        (_TRANSFER, that("decoupled_lr", lambda rate: rate is not None, "")),
        "the rule gives embeddings and output layers their rates",
        "leave out --decoupled-lr; --muon-scalar-lr is the base of Adam's rates",
    ),
    *(
        Refusal((asked, missing("lr"), ours()), "", "give --lr, the peak rate of Muon's weights")
        for asked in (_SCHEDULED, _SCALAR_LR, _STATIC)
    ),
    *(
        Refusal(
            (asked, other_than("weight_decay_incr_style", "constant"), ours()),
            "the weight decay of each param group is fixed then",
            "use constant",
        )
        for asked in (_TRANSFER, _STATIC)
    ),
    *(
        Refusal(
            (
                turned_off("OptimizerConfig.decoupled_weight_decay", "OptimizerConfig.decoupled_weight_decay False"),
                asked,
            ),
            "weight decay that is added to gradients depends on the learning rate",
            "leave it True",
        )
        for asked in (_TRANSFER, _STATIC)
    ),
    *(
        Refusal(
            (asked, given("lr_warmup_init"), ours()),
            "Megatron-Core starts all param groups from it, whatever their own peak is",
            "use 0",
        )
        for asked in (_TRANSFER, _SCALAR_LR)
    ),
)

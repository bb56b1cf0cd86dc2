"""How matrices are updated: the options of :class:`megatron_muon.Muon`, each with its default.

Those of :class:`UpdateKnobs` are flags, too (``--muon-<name>``), by way of :class:`megatron_muon.MuonConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_muon.choices import (
    MASTERS,
    MOMENTUM_DTYPES,
    NS_BACKENDS,
    OFFLOADS,
    SCALAR_OPTIMIZERS,
    SCALE_MODES,
    TP_MODES,
    WEIGHT_DECAY_METHODS,
    Budget,
)
from megatron_muon.knobs import coefficient_triples, knob, known_coefficients, not_negative, one_of, positive, whole
from megatron_muon.orthogonalize.coefficients import CUSTOM, Iteration, iteration, parse_triple
from megatron_muon.orthogonalize.newton_schulz import EPS

_SIZED = ("muon", "adaptive_muon", "stiefel_muon")
"""Values of ``--optimizer`` with which flags decide about the size of updates."""

_BY_RADIUS = {"spectral_sphere": "the radius decides about the size of updates (--muon-sphere-radius)"}


@dataclass(kw_only=True)
class UpdateKnobs:
    """Options that are both of the optimizer and of the command line."""

    scale_mode: str = knob(
        "spectral",
        "Factor on the orthogonalized update of an m x n matrix: spectral sqrt(max(m, n)), moonlight 0.2 times that "
        "(Adam's update size), moonlight_hidden 0.2 sqrt(hidden size), update_norm whatever gives it an RMS of 1, "
        "shape_scaling sqrt(max(1, m/n)), unit_rms_norm sqrt(m/n), spectral_norm the same over the measured spectral "
        "norm, aspect_ratio sqrt(max(m, n)/min(m, n)), none 1. "
        "m and n are those of the whole logical matrix, never of a shard.",
        check=one_of(*SCALE_MODES),
        readers=_SIZED,
        reasons=_BY_RADIUS,
    )
    extra_scale_factor: float = knob(
        1.0,
        "A further factor on the update. 0.2 with scale mode spectral gives Adam's update size, so that one learning "
        "rate serves both (Moonlight, arXiv 2502.16982).",
        check=positive,
        readers=_SIZED,
        reasons=_BY_RADIUS,
    )
    coefficient_type: str = knob(
        "quintic",
        "Coefficient set of the Newton-Schulz iteration: one of emerging-optimizers'; cubic5, ten products in five "
        "steps instead of fifteen (arXiv 2606.00371); turbo_muon, balanced rows and then four steps, so give "
        "--muon-num-ns-steps 4 (arXiv 2512.04632); custom: those of --muon-custom-coefficients.",
        check=known_coefficients,
    )
    custom_coefficients: tuple[str, ...] = knob(
        (),
        "a,b,c: coefficients of one Newton-Schulz step, with --muon-coefficient-type custom. Repeatable, one for each "
        "step in order; they start again if there are fewer than --muon-num-ns-steps.",
        check=coefficient_triples,
    )
    num_ns_steps: int = knob(5, "Number of Newton-Schulz steps.", check=whole(1, "5"))
    eps: float = knob(
        EPS,
        "Lower bound of the Frobenius norm that a matrix is divided by before the Newton-Schulz iteration: matrices of "
        "smaller norm get smaller updates. The default keeps float32's range, so that updates do not depend on the "
        "scale of gradients; Megatron-Core's is 1e-7.",
        check=positive,
    )
    fp32_matmul_prec: str = knob(
        "medium",
        "Precision that the matrix products in Newton-Schulz need at least: medium bfloat16, high TF32 where the "
        "device has it, highest float32. --muon-ns-dtype says more.",
        check=one_of(
            "medium",
            "high",
            "highest",
            hints={"low": "torch has no such precision; use medium (bfloat16), high (TF32) or highest (float32)"},
        ),
    )
    ns_dtype: str = knob(
        "auto",
        "Type of numbers in Newton-Schulz: fp32, bf16, fp16 (Gram Newton-Schulz: fewer operations than bf16 and more "
        "exact, but rows and columns a millionth of the largest are lost), or auto: by --muon-fp32-matmul-prec, bf16 "
        "for medium (fp32 if the processor of a rank has no fast bf16) and otherwise the weight's own.",
        check=one_of("auto", "fp32", "bf16", "fp16"),
    )
    ns_backend: str = knob(
        "auto",
        "Kernels of the products in Newton-Schulz: torch, triton (this package's), emerging (emerging-optimizers'), "
        "gram_newton_schulz (that package's), onednn (float32 on CPUs), or auto: the fastest of those on this device "
        "that pass a numeric check.",
        check=one_of(*NS_BACKENDS),
    )
    tp_mode: str = knob(
        "auto",
        "How tensor-parallel ranks share the work: owner (each gets some matrices whole), gram (each gets some Gram "
        "matrices), duplicated (all get everything), distributed (Gram matrices are summed), auto (the cheapest of "
        "owner, gram and distributed for each shape); all of these give the update of one device. blockwise (each "
        "shard by itself) is another update, which depends on the tensor-parallel size. Megatron's default is "
        "blockwise.",
        check=one_of(*TP_MODES),
    )
    blockwise_period: int = knob(
        1,
        "P: tensor-parallel shards are orthogonalized each by itself, as in mode blockwise and without messages, but "
        "in every P-th step whole matrices, in the mode of --muon-tp-mode (MuonBP, arXiv 2510.16981; 5 there). For "
        "slow links: another update, which depends on the tensor-parallel size. 1: whole matrices in every step.",
        check=whole(1, "5"),
        readers=("muon",),
        reasons=dict.fromkeys(
            ("adaptive_muon", "spectral_sphere", "stiefel_muon"),
            "what it keeps of a matrix is of the whole one, which block steps do not see",
        ),
    )
    blockwise_lr_mult: float = knob(
        1.0,
        "Learning rate of the shards in steps that orthogonalize them each by itself, as a multiple of the group's, "
        "with --muon-blockwise-period. Scale factors are by the shard's own shape there, so that 1 matches the RMS of "
        "updates; weight decay stays.",
        check=positive,
        readers=("muon",),
    )
    tp_wire_dtype: str = knob(
        "auto",
        "Type of numbers in which tensor-parallel ranks send each other matrices: fp32 (as they are), bf16, or auto: "
        "bf16 if Newton-Schulz rounds to 16 bits anyway.",
        check=one_of("auto", "fp32", "bf16"),
    )
    chunk_mb: float = knob(
        0.0,
        "Bound in MiB of the float32 matrices that a rank orthogonalizes at once. Larger chunks mean fewer messages, "
        "smaller ones less memory and more overlap. A larger matrix is a chunk of its own. 0: 256 on GPUs, 16 on CPUs "
        "(4 where nothing is sent).",
        check=not_negative,
    )
    scalar_optimizer: str = knob(
        "adam",
        "Optimizer of the weights (and of rows within weights) that Muon does not update: adam or lion.",
        check=one_of(*SCALAR_OPTIMIZERS),
        readers=("muon", "adaptive_muon"),
    )
    weight_decay_method: str = knob(
        "decoupled",
        "Weight decay of matrices: decoupled by learning rate x weight decay; independent by the weight decay alone; "
        "independent_scheduled by weight decay x learning rate / peak learning rate; l2 added to the gradient; "
        "cautious as decoupled, where weight and update agree in sign.",
        check=one_of(*WEIGHT_DECAY_METHODS),
        readers=_SIZED,
        reasons={"spectral_sphere": "weights keep their norm, and do not decay"},
    )
    master: str = knob(
        "fp32",
        "Master weights of bfloat16 weights: fp32, the float32 copies that Megatron-Core keeps (4 bytes a parameter); "
        "or remainder, what float32 has beside the bfloat16 weight (2 1/8 bytes), with the same results bit for bit.",
        check=one_of(*MASTERS),
    )
    momentum_dtype: str = knob(
        "auto",
        "Type of numbers in which momentum is kept between steps, rounded to nearest: fp32 (4 bytes a parameter); bf16 "
        "(2 bytes; updates change by 5.7e-3 where gradients are noise, as by an iteration in bfloat16); int8 in blocks "
        "of 256 columns (1 byte; 2.4e-2 there, up to 0.9, nearly all of an update, where momentum is of low rank: what "
        "is below 1/254 of the largest entry of its block is lost); auto: fp32, of weights without masters their own. "
        "With --muon-momentum of 0.99 errors are twice as large, and more: keep fp32.",
        check=one_of(*MOMENTUM_DTYPES),
    )
    offload: str = knob(
        "none",
        "State that lives in pinned memory of the host, and comes to the device through two windows of --muon-chunk-mb "
        "at most while a step needs it, with the same results bit for bit: none; momentum; or all, remainders of "
        "masters (--muon-master remainder), too.",
        check=one_of(*OFFLOADS),
    )
    ball_radius: float = knob(
        1.0,
        "Size of the updates of weights that --muon-param-rule gives to sign, row_norm or col_norm: their RMS; of "
        "weights other than tables, over the number of their columns (not for col_norm).",
        check=positive,
    )

    @property
    def ns_type(self) -> str:
        """``bf16``, ``fp16``, ``fp32``, or ``own`` for the weight's, from :attr:`ns_dtype` and Megatron's precision."""
        if self.ns_dtype != "auto":
            return self.ns_dtype
        return "bf16" if self.fp32_matmul_prec == "medium" else "own"

    def iteration(self, budget: Budget | None = None) -> Iteration:
        """What Newton-Schulz does to matrices of a budget; None: to those of no budget of their own.

        Steps that are still to be measured are as many as of those.

        Raises:
            ValueError: see :func:`megatron_muon.orthogonalize.coefficients.iteration`.
        """
        own = budget or Budget()
        steps = own.steps if isinstance(own.steps, int) else self.num_ns_steps
        name = own.coefficients or self.coefficient_type
        triples = tuple(map(parse_triple, self.custom_coefficients)) if name == CUSTOM else ()
        return iteration(name, steps, triples)


@dataclass(kw_only=True)
class MuonOptions(UpdateKnobs):
    """Options of :class:`megatron_muon.Muon` beside those that torch's optimizers have.

    ``Muon(params, options=MuonOptions(scale_mode="moonlight"))`` and ``Muon(params, scale_mode="moonlight")`` are the
    same. Values are checked by the optimizer.

    Those that are flags, too, are explained by their help texts above, and in ``docs/flags.md``.

    Attributes:
        scalar_betas: betas of the scalar optimizer.
        scalar_eps: its eps (Adam).
        scalar_lr_mult: its learning rate, as a multiple of the group's.
        scalar_wd_mult: its weight decay, as a multiple of the group's.
        hidden_size: of the model, for ``scale_mode="moonlight_hidden"``.
        damping_depth: not 0: ``eps`` is damping that fits models of all sizes: eps sqrt(n / m) / damping_depth is added
            to the norm of an m x n matrix (arXiv 2512.05620), see :mod:`megatron_muon.transfer`.
    """

    scalar_betas: tuple[float, float] = (0.9, 0.999)
    scalar_eps: float = 1e-8
    scalar_lr_mult: float = 1.0
    scalar_wd_mult: float = 1.0
    hidden_size: int = 0
    damping_depth: float = 0.0

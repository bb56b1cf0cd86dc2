"""Every knob of the Muon optimizers: its default, its check, its flag.

:class:`MuonConfig` is the only source. The command-line flags are generated from its fields (``--muon-<name>``), the
optimizer reads it back from Megatron-Core's ``OptimizerConfig`` (attribute ``muon_<name>``), and
:meth:`MuonConfig.validate` checks it wherever it came from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from megatron_muon.errors import ConfigError

__all__ = ["MuonConfig"]

PREFIX = "muon_"


def _knob(
    default: Any,
    help: str,
    *,
    check: Callable[[Any], str | None] | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """A field of :class:`MuonConfig`.

    Args:
        default: its default value.
        help: one sentence for ``--help``.
        check: returns what is wrong with a value and how to mend it, or None.
        aliases: further option strings for the value False of a boolean (Megatron's own spelling).
    """
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "aliases": aliases})


def _one_of(*values: str, hints: dict[str, str] | None = None) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value in values:
            return None
        return (hints or {}).get(value, f"choose one of {', '.join(values)}")

    return check


def _at_least_one(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return None
    return "give a whole number of at least 1 (5 is usual)"


def _interval(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return None if whole and value >= 1 else "give a whole number of at least 1"


def _interval_or_never(value: Any) -> str | None:
    return None if value == 0 and not isinstance(value, bool) else _interval(value)


def _unit_interval(value: Any) -> str | None:
    return None if _is_number(value) and 0.0 <= value < 1.0 else "give a number from 0 to below 1 (0.95 is usual)"


def _positive(value: Any) -> str | None:
    return None if _is_number(value) and value > 0.0 and math.isfinite(value) else "give a positive number"


def _tolerance(value: Any) -> str | None:
    return None if _is_number(value) and 0.0 < value <= 1.0 else "give a number above 0, at most 1 (0.1 is usual)"


def _not_negative(value: Any) -> str | None:
    return None if _is_number(value) and value >= 0.0 and math.isfinite(value) else "give a number of at least 0"


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "give True or False"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _coefficient_type(value: Any) -> str | None:
    from megatron_muon.orthogonalize.coefficients import CUSTOM, coefficient_types

    names = (*coefficient_types(), CUSTOM)
    return None if value in names else f"choose one of {', '.join(names)} (as emerging-optimizers names them)"


def _variant(value: Any) -> str | None:
    from megatron_muon.optimizers.sizes import VARIANTS

    return _one_of("none", *VARIANTS)(value)


def _qk_clip_rule(value: Any) -> str | None:
    from megatron_muon.qk_clip.factors import RULES

    return _one_of(*RULES)(value)


def _qk_logits(value: Any) -> str | None:
    from megatron_muon.qk_clip.measure import SOURCES

    return _one_of(*SOURCES)(value)


def _stiefel_solver(value: Any) -> str | None:
    from megatron_muon.optimizers.stiefel_solvers import SOLVERS

    return _one_of(*SOLVERS)(value)


def _scale_mode(value: Any) -> str | None:
    from megatron_muon.orthogonalize.scale import SCALE_MODES

    return _one_of(*SCALE_MODES)(value)


def _custom_coefficients(value: Any) -> str | None:
    from megatron_muon.orthogonalize.coefficients import parse_triple

    if not isinstance(value, (tuple, list)) or not all(isinstance(triple, str) for triple in value):
        return "give a list of a,b,c strings"
    try:
        list(map(parse_triple, value))
    except ValueError:
        return "give three numbers a,b,c for each step, such as 3.4445,-4.775,2.0315"
    return None


DIRECTIONS = ("stiefel", "sign", "row_norm", "col_norm")
"""Choices of ``param_rule`` that change how the update of a matrix is found; its split stays that of its own rule."""


def parse_transfer(base: str) -> tuple[int, int]:
    """Width and depth of a ``WIDTHxDEPTH``.

    Raises:
        ValueError: if it is none.
    """
    width, _, depth = base.partition("x")
    found = int(width), int(depth)
    if min(found) < 1:
        raise ValueError(base)
    return found


def _transfer(value: Any) -> str | None:
    if value == "":
        return None
    try:
        parse_transfer(value)
    except (AttributeError, ValueError):
        return "give WIDTHxDEPTH, hidden size and layers of the model that was tuned, such as 256x4"
    return None


PARAM_CHOICES = ("adam", "muon", "split", "whole", "per_head", *DIRECTIONS)
"""What ``param_rule`` can decide; ``muon`` leaves the way to the weight's own rule."""


def parse_param_rule(rule: str) -> tuple[str, str]:
    """``(glob, choice)`` of a ``GLOB=CHOICE``."""
    glob, _, choice = rule.rpartition("=")
    return glob.strip(), choice.strip()


def _param_rules(value: Any) -> str | None:
    if not isinstance(value, (tuple, list)) or not all(isinstance(rule, str) for rule in value):
        return "give a list of GLOB=CHOICE strings"
    for rule in value:
        glob, choice = parse_param_rule(rule)
        if not glob or choice not in PARAM_CHOICES:
            return f"{rule!r} is not GLOB=CHOICE with a choice of {', '.join(PARAM_CHOICES)}"
    return None


@dataclasses.dataclass
class MuonConfig:
    """What the Muon optimizer does, for a whole run.

    Learning rate and weight decay are not here: they are Megatron's ``--lr`` and ``--weight-decay`` and follow its
    scheduler. Fields that Megatron-Core has too keep its name; where the default differs, the help text says so.
    """

    momentum: float = _knob(
        0.95,
        "Decay of the momentum buffer, an exponential moving average of the gradient. "
        "Megatron's flag defaults to 0.9, its config class to 0.95.",
        check=_unit_interval,
    )
    nesterov: bool = _knob(
        False, "Orthogonalize the Nesterov mix of gradient and momentum instead of the momentum.", check=_boolean
    )
    split_qkv: bool = _knob(
        True,
        "Orthogonalize the query, key, value (and gate) rows of linear_qkv as matrices of their own. "
        "--muon-no-split-qkv is --muon-qkv whole.",
        check=_boolean,
        aliases=("--muon-no-split-qkv",),
    )
    qkv: str = _knob(
        "split",
        "How attention's linear_qkv (linear_kv of cross-attention) is orthogonalized: split q, k, v (and gate) over "
        "all heads; per_head each head of each; whole as one matrix.",
        check=_one_of("split", "per_head", "whole"),
    )
    mla_up: str = _knob(
        "per_head",
        "Up projections of multi-latent attention: per_head the nope, rope (k, v) rows of each head; split the same "
        "rows over all heads; whole.",
        check=_one_of("per_head", "split", "whole"),
    )
    mla_down: str = _knob(
        "split",
        "Down projections of multi-latent attention: split the latent(s) from the rotary key; whole.",
        check=_one_of("split", "whole"),
    )
    glu: str = _knob(
        "split",
        "linear_fc1 of gated MLPs and experts: split gate and up; whole.",
        check=_one_of("split", "whole"),
    )
    gdn_in_proj: str = _knob(
        "adam",
        "in_proj of GatedDeltaNet layers: adam the whole weight; split q, k, v and z as matrices of their own, with "
        "the gates' rows by the scalar optimizer's rule; per_head each head of q, k, v and z; whole.",
        check=_one_of("adam", "split", "per_head", "whole"),
    )
    mamba_in_proj: str = _knob(
        "adam",
        "in_proj of Mamba layers: adam the whole weight; split z, x, B and C as matrices of their own, with the dt "
        "rows by the scalar optimizer's rule; whole.",
        check=_one_of("adam", "split", "whole"),
    )
    router: str = _knob("muon", "Who updates the routers of experts: muon or adam.", check=_one_of("muon", "adam"))
    lora_a: str = _knob(
        "muon",
        "Who updates the A factors (rank x inputs) of LoRA adapters: muon, or adam, since they are very wide and "
        "ill-conditioned. B factors stay Muon's.",
        check=_one_of("muon", "adam"),
    )
    param_rule: tuple[str, ...] = _knob(
        (),
        "GLOB=CHOICE: decide about the weights whose names match, whatever the other rules say. adam; muon (by its own "
        "rule), split, whole, per_head; sign, row_norm, col_norm: moved within a ball of --muon-ball-radius (Scion); "
        "stiefel: singular values stay at 1 (--optimizer stiefel_muon). Repeatable; the last match counts. Layers are "
        "numbered over the whole model.",
        check=_param_rules,
    )
    unknown_2d: str = _knob(
        "error",
        "What to do with a 2-D parameter of a module that no rule knows: error (stop and name it), adam or muon.",
        check=_one_of("error", "adam", "muon"),
    )
    scale_mode: str = _knob(
        "spectral",
        "Factor on the orthogonalized update of an m x n matrix: spectral sqrt(max(m, n)), moonlight 0.2 times that "
        "(Adam's update size), moonlight_hidden 0.2 sqrt(hidden size), update_norm whatever gives it an RMS of 1, "
        "shape_scaling sqrt(max(1, m/n)), unit_rms_norm sqrt(m/n), spectral_norm the same over the measured spectral "
        "norm, aspect_ratio sqrt(max(m, n)/min(m, n)), none 1. "
        "m and n are those of the whole logical matrix, never of a shard.",
        check=_scale_mode,
    )
    extra_scale_factor: float = _knob(
        1.0,
        "A further factor on the update. 0.2 with scale mode spectral gives Adam's update size, so that one learning "
        "rate serves both (Moonlight, arXiv 2502.16982).",
        check=_positive,
    )
    coefficient_type: str = _knob(
        "quintic",
        "Coefficient set of the Newton-Schulz iteration, as named by emerging-optimizers; custom: those of "
        "--muon-custom-coefficients.",
        check=_coefficient_type,
    )
    custom_coefficients: tuple[str, ...] = _knob(
        (),
        "a,b,c: coefficients of one Newton-Schulz step, with --muon-coefficient-type custom. Repeatable, one for each "
        "step in order; they start again if there are fewer than --muon-num-ns-steps.",
        check=_custom_coefficients,
    )
    num_ns_steps: int = _knob(5, "Number of Newton-Schulz steps.", check=_at_least_one)
    eps: float = _knob(
        1e-7,
        "Lower bound of the Frobenius norm that a matrix is divided by before the Newton-Schulz iteration.",
        check=_positive,
    )
    fp32_matmul_prec: str = _knob(
        "medium",
        "Precision that the matrix products in Newton-Schulz need at least: medium bfloat16, high TF32 where the "
        "device has it, highest float32. --muon-ns-dtype says more.",
        check=_one_of(
            "medium",
            "high",
            "highest",
            hints={"low": "torch has no such precision; use medium (bfloat16), high (TF32) or highest (float32)"},
        ),
    )
    ns_dtype: str = _knob(
        "auto",
        "Type of numbers in Newton-Schulz: fp32, bf16, fp16 (Gram Newton-Schulz; more exact than bf16 and faster where "
        "the device has fast fp16), or auto: by --muon-fp32-matmul-prec, bf16 for medium and otherwise the weight's "
        "own.",
        check=_one_of("auto", "fp32", "bf16", "fp16"),
    )
    ns_backend: str = _knob(
        "auto",
        "Kernels of the products in Newton-Schulz: torch, triton (this package's), emerging (emerging-optimizers'), "
        "gram_newton_schulz (that package's), or auto: the best that the device has and that passes a numeric check.",
        check=_one_of("auto", "torch", "triton", "emerging", "gram_newton_schulz"),
    )
    tp_mode: str = _knob(
        "auto",
        "How tensor-parallel ranks share the work: owner (each gets some matrices whole), gram (each gets some Gram "
        "matrices), duplicated (all get everything), distributed (Gram matrices are summed), auto (the cheapest of "
        "these for each shape; all give the update of one device), blockwise (each shard by itself: another update, "
        "which depends on the tensor-parallel size). Megatron's default is blockwise.",
        check=_one_of("auto", "owner", "gram", "duplicated", "distributed", "blockwise"),
    )
    tp_wire_dtype: str = _knob(
        "auto",
        "Type of numbers in which tensor-parallel ranks send each other matrices: fp32 (as they are), bf16, or auto: "
        "bf16 if Newton-Schulz rounds to 16 bits anyway.",
        check=_one_of("auto", "fp32", "bf16"),
    )
    chunk_mb: float = _knob(
        0.0,
        "Bound in MiB of the float32 matrices that a rank orthogonalizes at once. Larger chunks mean fewer messages, "
        "smaller ones less memory and more overlap. A larger matrix is a chunk of its own. 0: 256 on GPUs, 16 on CPUs.",
        check=_not_negative,
    )
    scalar_optimizer: str = _knob(
        "adam",
        "Optimizer of the weights (and of rows within weights) that Muon does not update: adam or lion.",
        check=_one_of("adam", "lion"),
    )
    scalar_lr: float = _knob(
        0.0,
        "Peak learning rate of what the scalar optimizer updates; the minimum is scaled alike. 0: that of Muon, --lr.",
        check=_not_negative,
    )
    variant: str = _knob(
        "none",
        "What differs from plain Muon: polargrad, the update times the nuclear norm of the momentum; hyperball, "
        "weights keep their Frobenius norm and the learning rate is an angle; none.",
        check=_variant,
    )
    sphere_radius: float = _knob(
        2.0,
        "Spectral norm of m x n matrices with --optimizer spectral_sphere, in units of sqrt(m / n). 0: what each has "
        "at the start.",
        check=_not_negative,
    )
    sphere_tolerance: float = _knob(
        0.1,
        "How closely --optimizer spectral_sphere solves for its multiplier: 3 + log2(1 / tolerance) iterations a step; "
        "1: one, without the multiplier (MuonSphere).",
        check=_tolerance,
    )
    stiefel_solver: str = _knob(
        "admm",
        "How --optimizer stiefel_muon finds the direction along the manifold for weights that --muon-param-rule gives "
        "to stiefel: admm, dual_ascent or fixed_point.",
        check=_stiefel_solver,
    )
    stiefel_iterations: int = _knob(
        0,
        "Iterations of that solver in each step. 0: its own default, 10 for admm, 100 for dual_ascent, 20 for "
        "fixed_point.",
        check=_interval_or_never,
    )
    stiefel_radius: float = _knob(
        1.0,
        "All singular values of matrices on the manifold, with --optimizer stiefel_muon; --lr is relative to it.",
        check=_positive,
    )
    ball_radius: float = _knob(
        1.0,
        "Size of the updates of weights that --muon-param-rule gives to sign, row_norm or col_norm: their RMS; of "
        "weights other than tables, over the number of their columns (not for col_norm).",
        check=_positive,
    )
    weight_decay_method: str = _knob(
        "decoupled",
        "Weight decay of matrices: decoupled by learning rate x weight decay; independent by the weight decay alone; "
        "independent_scheduled by weight decay x learning rate / peak learning rate; l2 added to the gradient; "
        "cautious as decoupled, where weight and update agree in sign.",
        check=_one_of("decoupled", "independent", "independent_scheduled", "l2", "cautious"),
    )
    scalar_weight_decay_method: str = _knob(
        "decoupled",
        "Weight decay of what the scalar optimizer updates: decoupled by its learning rate x weight decay; "
        "independent_scheduled by weight decay x learning rate / peak learning rate, whatever the peak is.",
        check=_one_of("decoupled", "independent_scheduled"),
    )
    transfer: str = _knob(
        "",
        "WIDTHxDEPTH: hidden size and layers of the model on which learning rate, weight decay, eps and "
        "--init-method-std were tuned; this run's are scaled to its own size (arXiv 2512.05620). Needs "
        "--muon-scale-mode unit_rms_norm or spectral_norm and --muon-weight-decay-method independent_scheduled.",
        check=_transfer,
    )
    ckpt_changes: str = _knob(
        "error",
        "A checkpoint that was trained with other rules than the flags ask for (Adam instead of Muon, other splits): "
        "error, or accept: go on with the new rules; weights and the state that both have are kept.",
        check=_one_of("error", "accept"),
    )
    qk_clip_rule: str = _knob(
        "q_only",
        "--qk-clip of query heads that share a key head (GQA, MQA): q_only scales a head's query rows alone; group, "
        "Megatron's rule, all heads of a group by its loudest; exact scales the key and makes up for it in the other "
        "heads' queries.",
        check=_qk_clip_rule,
    )
    qk_clip_norm: str = _knob(
        "skip",
        "--qk-clip of layers with --qk-layernorm, where the size of query and key weights does not matter: skip them, "
        "or clip the gains of the norms.",
        check=_one_of("skip", "gains"),
    )
    qk_logits: str = _knob(
        "auto",
        "Where --qk-clip and --log-max-attention-logit get attention logits from: scores of Megatron's local "
        "attention; te, TransformerEngine's own maxima; exact, queries times keys in chunks, with any attention; lse, "
        "the log-sum-exp of a flash kernel (an upper bound); own, the core attention calls "
        "megatron_muon.qk_clip.record; auto: scores or te, and exact where TransformerEngine has no maxima.",
        check=_qk_logits,
    )
    qk_logits_interval: int = _knob(1, "Measure attention logits, and clip, in every so many-th step.", check=_interval)
    qk_log_layers: int = _knob(
        0,
        "Iterations between records of each attention layer's largest logit (TensorBoard, W&B, --muon-log-jsonl); 0: "
        "never.",
        check=_interval_or_never,
    )
    log_jsonl: str = _knob(
        "",
        "File to which losses and times are written, one JSON line an iteration, for any optimizer. Empty: none.",
        check=lambda value: None if isinstance(value, str) else "give a path, or an empty string for none",
    )

    def validate(self, *, pairs: bool = True) -> MuonConfig:
        """Check every value.

        Args:
            pairs: whether to check values that must go together, too; not while some are still to be set.

        Returns:
            itself.

        Raises:
            ConfigError: naming the flag, the value and what to give instead.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            problem = field.metadata["check"](value)
            if problem is not None:
                raise ConfigError(f"{flag(field.name)} {value}: {problem}.")
        if pairs:
            self._check_pairs()
        return self

    def _check_pairs(self) -> None:
        if not self.split_qkv and self.qkv == "per_head":
            raise ConfigError("--muon-qkv per_head with --muon-no-split-qkv: these contradict each other; give one.")
        if (self.coefficient_type == "custom") != bool(self.custom_coefficients):
            raise ConfigError(
                f"--muon-coefficient-type {self.coefficient_type} with {len(self.custom_coefficients)} "
                "--muon-custom-coefficients: give custom and at least one a,b,c, or neither."
            )
        if self.variant == "hyperball" and self.scale_mode != "none":
            raise ConfigError(
                f"--muon-variant hyperball with --muon-scale-mode {self.scale_mode}: the radius of the weight decides "
                "about the size of its updates. Add --muon-scale-mode none."
            )
        for name, default in (("extra_scale_factor", 1.0), ("weight_decay_method", "decoupled")):
            if self.variant == "hyperball" and getattr(self, name) != default:
                raise ConfigError(
                    f"--muon-variant hyperball with {flag(name)} {getattr(self, name)}: weights keep their norm, and "
                    "the learning rate alone is the angle by which they turn. Leave it away."
                )
        if self.transfer:
            self._check_transfer()
        if self.variant == "polargrad" and self.scale_mode in ("update_norm", "spectral_norm"):
            raise ConfigError(
                f"--muon-variant polargrad with --muon-scale-mode {self.scale_mode}: the mode divides out the number "
                "by which PolarGrad multiplies each update, so that nothing is left of it. Add --muon-scale-mode none."
            )
        if self.tp_mode == "gram" and self.ns_type == "bf16":
            raise ConfigError(
                "--muon-tp-mode gram in bfloat16: Gram Newton-Schulz needs more bits. Add --muon-ns-dtype fp16 (or "
                "fp32), or use --muon-tp-mode auto."
            )

    def _check_transfer(self) -> None:
        given = f"{flag('transfer')} {self.transfer}"
        if self.scale_mode not in ("unit_rms_norm", "spectral_norm"):
            raise ConfigError(
                f"{given} with --muon-scale-mode {self.scale_mode}: its best learning rate changes with the width. Add "
                "--muon-scale-mode unit_rms_norm (or spectral_norm), on the tuned model and on this one."
            )
        if self.weight_decay_method != "independent_scheduled":
            raise ConfigError(
                f"{given} with --muon-weight-decay-method {self.weight_decay_method}: only independent_scheduled does "
                "not depend on learning rates that differ. Add --muon-weight-decay-method independent_scheduled, on "
                "the tuned model and on this one."
            )
        if self.variant != "none":
            raise ConfigError(f"{given} with --muon-variant {self.variant}: there is no rule for it; use none.")

    @property
    def ns_type(self) -> str:
        """``bf16``, ``fp16``, ``fp32``, or ``own`` for the weight's, from :attr:`ns_dtype` and Megatron's precision."""
        if self.ns_dtype != "auto":
            return self.ns_dtype
        return "bf16" if self.fp32_matmul_prec == "medium" else "own"

    @property
    def qkv_choice(self) -> str:
        """``split``, ``per_head`` or ``whole``, from :attr:`qkv` and Megatron's :attr:`split_qkv`."""
        return self.qkv if self.split_qkv else "whole"

    @classmethod
    def from_optimizer_config(cls, config: Any, *, pairs: bool = True) -> MuonConfig:
        """Read and check the ``muon_*`` attributes of a Megatron-Core ``OptimizerConfig``.

        Args:
            config: the ``OptimizerConfig``. Its class has the knobs as fields from ``install()`` on. Lists count as
                tuples, which YAML does not know.
            pairs: see :meth:`validate`.

        Raises:
            ConfigError: for a wrong value, for a knob that is missing, or for a ``muon_*`` attribute that is no knob (a
                misspelt one would otherwise be ignored).
        """
        known = {PREFIX + field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(name for name in vars(config) if name.startswith(PREFIX) and name not in known)
        if unknown:
            raise ConfigError(
                f"OptimizerConfig.{unknown[0]} {getattr(config, unknown[0])}: no such Muon option; "
                f"there are {', '.join(sorted(known))}."
            )
        missing = sorted(name for name in known if not hasattr(config, name))
        if missing:
            raise ConfigError(
                f"{type(config).__name__} has no {missing[0]}{' and others' if len(missing) > 1 else ''}: nobody knows "
                "what was chosen. Call megatron_muon.install() before the config is built, or "
                "MuonConfig(...).apply_to(config)."
            )
        values: dict[str, Any] = {field.name: getattr(config, name) for name, field in known.items()}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**values).validate(pairs=pairs)

    def apply_to(self, config: Any) -> Any:
        """Set every knob on a Megatron-Core ``OptimizerConfig``, for code that has built it.

        Returns:
            ``config``, so that the call can be nested.
        """
        self.validate()
        for field in dataclasses.fields(self):
            setattr(config, PREFIX + field.name, getattr(self, field.name))
        return config


def flag(name: str) -> str:
    """The command-line flag of a field of :class:`MuonConfig`: ``"num_ns_steps"`` -> ``"--muon-num-ns-steps"``."""
    return "--" + (PREFIX + name).replace("_", "-")

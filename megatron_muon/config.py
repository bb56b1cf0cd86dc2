"""Every knob of the Muon optimizers: its default, its check, its flag.

:class:`MuonConfig` is the only source. The command-line flags are generated from its fields (``--muon-<name>``), the
optimizer reads it back from Megatron-Core's ``OptimizerConfig`` (attribute ``muon_<name>``), and
:meth:`MuonConfig.validate` checks it wherever it came from.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_muon.choices import ALARMS, NONFINITE, PARAM_LAYOUTS, QK_CLIP_RULES, QK_LOGITS, STIEFEL_SOLVERS
from megatron_muon.errors import ConfigError, shown
from megatron_muon.knobs import (
    EVERY_OPTIMIZER,
    boolean,
    decay,
    knob,
    known_variant,
    not_negative,
    number,
    one_of,
    param_rules,
    positive,
    text,
    transfer_base,
    whole,
)
from megatron_muon.options import UpdateKnobs
from megatron_muon.refusals import MUON, Refusal, refuse
from megatron_muon.refusals.rule import flag_of, unread

PREFIX = "muon_"

SECOND_MOMENT: dict[str, tuple[Any, str]] = {
    "adaptive_muon_moment2_method": (
        "adamuon",
        "Variant of --optimizer adaptive_muon: adamuon (the paper's), adamuon_eo (emerging-optimizers'), normuon or "
        "namo.",
    ),
    "adaptive_muon_beta2": (0.95, "Decay of the second moment of --optimizer adaptive_muon, from 0 to below 1."),
    "adaptive_muon_eps": (1e-8, "Keeps the division by the second moment of --optimizer adaptive_muon finite."),
}
"""Fields of Megatron-Core's ``OptimizerConfig`` that ``--optimizer adaptive_muon`` alone reads, and that are no flags
of Megatron's: default and help text."""


@dataclasses.dataclass(kw_only=True)
class MuonConfig(UpdateKnobs):
    """What the Muon optimizer does, for a whole run.

    Learning rate and weight decay are not here: they are Megatron's ``--lr`` and ``--weight-decay`` and follow its
    scheduler. Fields that Megatron-Core has too keep its name; where the default differs, the help text says so.
    """

    momentum: float = knob(
        0.95,
        "Decay of the momentum buffer, an exponential moving average of the gradient. "
        "Megatron's flag defaults to 0.9, its config class to 0.95.",
        check=decay,
    )
    nesterov: bool = knob(
        False, "Orthogonalize the Nesterov mix of gradient and momentum instead of the momentum.", check=boolean
    )
    split_qkv: bool = knob(
        True,
        "Orthogonalize the query, key, value (and gate) rows of linear_qkv as matrices of their own. "
        "--muon-no-split-qkv is --muon-qkv whole.",
        check=boolean,
        aliases=("--muon-no-split-qkv",),
    )
    qkv: str = knob(
        "split",
        "How attention's linear_qkv (linear_kv of cross-attention) is orthogonalized: split q, k, v (and gate) over "
        "all heads; per_head each head of each; whole as one matrix.",
        check=one_of("split", "per_head", "whole"),
    )
    mla_up: str = knob(
        "per_head",
        "Up projections of multi-latent attention: per_head the nope, rope (k, v) rows of each head; split the same "
        "rows over all heads; whole.",
        check=one_of("per_head", "split", "whole"),
    )
    mla_down: str = knob(
        "split",
        "Down projections of multi-latent attention: split the latent(s) from the rotary key; whole.",
        check=one_of("split", "whole"),
    )
    glu: str = knob(
        "split", "linear_fc1 of gated MLPs and experts: split gate and up; whole.", check=one_of("split", "whole")
    )
    gdn_in_proj: str = knob(
        "adam",
        "in_proj of GatedDeltaNet layers: adam the whole weight; split q, k, v and z as matrices of their own, with "
        "the gates' rows by the scalar optimizer's rule; per_head each head of q, k, v and z; whole.",
        check=one_of("adam", "split", "per_head", "whole"),
    )
    mamba_in_proj: str = knob(
        "adam",
        "in_proj of Mamba layers: adam the whole weight; split z, x, B and C as matrices of their own, with the dt "
        "rows by the scalar optimizer's rule; whole.",
        check=one_of("adam", "split", "whole"),
    )
    router: str = knob("muon", "Who updates the routers of experts: muon or adam.", check=one_of("muon", "adam"))
    lora_a: str = knob(
        "muon",
        "Who updates the A factors (rank x inputs) of LoRA adapters: muon, or adam, since they are very wide and "
        "ill-conditioned. B factors stay Muon's.",
        check=one_of("muon", "adam"),
    )
    param_rule: tuple[str, ...] = knob(
        (),
        "GLOB=CHOICE: decide about the weights whose names match, whatever the other rules say. adam; muon (by its own "
        "rule), split, whole, per_head; split(q 64, k 16, v 16), stack, transposed, transposed_stack: what a weight of "
        "one's own is; sign, row_norm, col_norm: moved within a ball of --muon-ball-radius (Scion); "
        "stiefel: singular values stay at 1 (--optimizer stiefel_muon). steps:N, coefficients:NAME: what Newton-Schulz "
        "takes for them, in place of --muon-num-ns-steps and --muon-coefficient-type; steps:auto: measured early in "
        "training. Repeatable; of each of the three kinds the last match counts. Layers are numbered over the whole "
        "model.",
        check=param_rules,
    )
    unknown_2d: str = knob(
        "error",
        "What to do with a 2-D parameter of a module that no rule knows: error (stop and name it), adam or muon.",
        check=one_of("error", "adam", "muon"),
    )
    scalar_lr: float = knob(
        0.0,
        "Peak learning rate of what the scalar optimizer updates; the minimum is scaled alike. 0: that of Muon, --lr.",
        check=not_negative,
    )
    variant: str = knob(
        "none",
        "What differs from plain Muon: polargrad, the update times the nuclear norm of the momentum; hyperball, "
        "weights keep their Frobenius norm and the learning rate is an angle; none.",
        check=known_variant,
        readers=("muon",),
    )
    sphere_radius: float = knob(
        2.0,
        "Spectral norm of m x n matrices with --optimizer spectral_sphere, in units of sqrt(m / n). 0: what each has "
        "at the start.",
        check=not_negative,
        readers=("spectral_sphere",),
    )
    sphere_tolerance: float = knob(
        0.1,
        "How closely --optimizer spectral_sphere solves for its multiplier: 3 + log2(1 / tolerance) iterations a step; "
        "1: one, without the multiplier (MuonSphere).",
        check=number(lambda value: 0 < value <= 1, "number above 0, at most 1 (0.1 is usual)"),
        readers=("spectral_sphere",),
    )
    stiefel_solver: str = knob(
        "admm",
        "How --optimizer stiefel_muon finds the direction along the manifold for weights that --muon-param-rule gives "
        "to stiefel: admm, dual_ascent or fixed_point.",
        check=one_of(*STIEFEL_SOLVERS),
        readers=("stiefel_muon",),
    )
    stiefel_iterations: int = knob(
        0,
        "Iterations of that solver in each step. 0: its own default, 10 for admm, 100 for dual_ascent, 20 for "
        "fixed_point.",
        check=whole(0),
        readers=("stiefel_muon",),
    )
    stiefel_radius: float = knob(
        1.0,
        "All singular values of matrices on the manifold, with --optimizer stiefel_muon; --lr is relative to it.",
        check=positive,
        readers=("stiefel_muon",),
    )
    scalar_weight_decay_method: str = knob(
        "decoupled",
        "Weight decay of what the scalar optimizer updates: decoupled by its learning rate x weight decay; "
        "independent_scheduled by weight decay x learning rate / peak learning rate, whatever the peak is.",
        check=one_of("decoupled", "independent_scheduled"),
    )
    transfer: str = knob(
        "",
        "WIDTHxDEPTH: hidden size and layers of the model on which learning rate, weight decay, eps and "
        "--init-method-std were tuned; this run's are scaled to its own size (arXiv 2512.05620). Needs "
        "--muon-scale-mode unit_rms_norm or spectral_norm and --muon-weight-decay-method independent_scheduled.",
        check=transfer_base,
        readers=("muon", "adaptive_muon"),
    )
    layer_wise_param_layout: str = knob(
        "padded",
        "How a layer-wise run lays out Muon's weights and gradients in DDP's buckets: padded, as Megatron-Core does, "
        "each owner's part as long as the longest; decoupled, each as long as its weights, without padding.",
        check=one_of(*PARAM_LAYOUTS, hints={"legacy": "give --no-use-layer-wise-param-layout instead"}),
    )
    ckpt_changes: str = knob(
        "error",
        "A checkpoint that was trained with other rules than the flags ask for (Adam instead of Muon, other splits): "
        "error, or accept: go on with the new rules; weights and the state that both have are kept.",
        check=one_of("error", "accept"),
        readers=EVERY_OPTIMIZER,
    )
    nonfinite: str = knob(
        "skip",
        "What happens when a gradient that Megatron let through (see --no-check-for-nan-in-loss-and-grad) has NaN or "
        "infinity: skip the step on all ranks of the model, for Adam's weights too; stop the run, naming the weight; "
        "propagate: nobody looks, as in Megatron-Core.",
        check=one_of(*NONFINITE),
    )
    qk_clip_rule: str = knob(
        "q_only",
        "--qk-clip of query heads that share a key head (GQA, MQA): q_only scales a head's query rows alone; group, "
        "Megatron's rule, all heads of a group by its loudest; exact scales the key and makes up for it in the other "
        "heads' queries.",
        check=one_of(*QK_CLIP_RULES),
        readers=EVERY_OPTIMIZER,
    )
    qk_clip_norm: str = knob(
        "skip",
        "--qk-clip of layers with --qk-layernorm, where the size of query and key weights does not matter: skip them, "
        "or clip the gains of the norms.",
        check=one_of("skip", "gains"),
        readers=EVERY_OPTIMIZER,
    )
    qk_logits: str = knob(
        "auto",
        "Where --qk-clip and --log-max-attention-logit get attention logits from: scores of Megatron's local "
        "attention; te, TransformerEngine's own maxima; exact, queries times keys in chunks, with any attention; lse, "
        "the log-sum-exp of a flash kernel (an upper bound); own, the core attention calls "
        "megatron_muon.qk_clip.record; auto: scores or te, and exact where TransformerEngine has no maxima.",
        check=one_of(*QK_LOGITS),
        readers=EVERY_OPTIMIZER,
    )
    qk_logits_interval: int = knob(
        1, "Measure attention logits, and clip, in every so many-th step.", check=whole(1), readers=EVERY_OPTIMIZER
    )
    qk_log_layers: int = knob(
        0,
        "Iterations between records of each attention layer's largest logit (TensorBoard, W&B, --muon-log-jsonl); 0: "
        "never.",
        check=whole(0),
        readers=EVERY_OPTIMIZER,
    )
    log_interval: int = knob(
        0,
        "Measure Muon's work in the first and every so many-th step: norms and ranks of momentum, what the iteration "
        "leaves, sizes of updates, times. To --muon-log-jsonl, TensorBoard and W&B, by class of weight. 0: never, at "
        "no cost.",
        check=whole(0, "10"),
    )
    log_per_layer: bool = knob(
        False, "Write these numbers for each layer, too, and not only by class of weight.", check=boolean
    )
    log_console: bool = knob(False, "Print a line of these numbers after each measured step.", check=boolean)
    alarm: str = knob(
        "warn",
        "What happens when measured numbers, or replicas, show that something is wrong: warn, once, with weights, "
        "usual cause and a flag to try; stop the run on all ranks; off: nobody judges.",
        check=one_of(*ALARMS),
    )
    check_replicas_interval: int = knob(
        0,
        "Compare weights and Muon's state of all ranks that hold copies of them, bit by bit, after every so many-th "
        "step. 0: never.",
        check=whole(0, "1000"),
    )
    dry_run: bool = knob(
        False,
        "Stop with status 0 when model and optimizer are built and the report is printed: nothing is trained.",
        check=boolean,
    )
    log_jsonl: str = knob(
        "",
        "File to which losses and times are written, one JSON line an iteration, for any optimizer. Empty: none.",
        check=text,
        readers=EVERY_OPTIMIZER,
    )

    def validate(self, *, pairs: bool = True) -> MuonConfig:
        """Check every value.

        Args:
            pairs: whether to check values that must go together, too; not while some are still to be set.

        Returns:
            itself.

        Raises:
            ConfigError: naming flags, values and what to give instead.
        """
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            problem = field.metadata["check"](value)
            if problem is not None:
                told = " ".join(value) if isinstance(value, tuple) and set(map(type, value)) == {str} else value
                told = shown(value) if isinstance(field.default, int | float) else told
                problems.append(f"{flag(field.name)} {told}: {problem}.")
        if problems:
            raise ConfigError("\n".join(problems))
        if pairs:
            refuse(MUON, self.as_settings())
        return self

    def as_settings(self) -> dict[str, Any]:
        """Every value by the name that parsed arguments and ``OptimizerConfig`` have for it: ``muon_eps``."""
        return {PREFIX + field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def watches(self) -> bool:
        """Whether steps are measured, or replicas compared."""
        return bool(self.log_interval or self.check_replicas_interval)

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
    return flag_of(PREFIX + name)


UNREAD: tuple[Refusal, ...] = tuple(
    row
    for name, default, readers, reasons in (
        *(
            (PREFIX + field.name, field.default, field.metadata["readers"], field.metadata["reasons"])
            for field in dataclasses.fields(MuonConfig)
        ),
        *((name, default, ("adaptive_muon",), {}) for name, (default, _) in SECOND_MOMENT.items()),
    )
    if readers != EVERY_OPTIMIZER
    for row in unread(name, default, readers, reasons)
)
"""Refuses flags that the optimizer of a run does not read, whosever it is."""

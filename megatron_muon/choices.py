"""Names that flags take as values, and how their text is read. Imports nothing, so that every package may import it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

OPTIMIZERS = ("muon", "adaptive_muon", "spectral_sphere", "stiefel_muon")
"""Values of ``--optimizer`` that are this package's; ``dist_<name>`` is Megatron's older spelling for the layer-wise
form."""

VARIANTS = ["none", "polargrad", "hyperball"]
"""``--muon-variant``: see :data:`megatron_muon.optimizers.registry.VARIANTS`. Those that users register are added."""

SECOND_MOMENTS = ("adamuon", "adamuon_eo", "normuon", "namo")
"""``--adaptive-muon-moment2-method``: those of :mod:`megatron_muon.optimizers.adaptive`."""

SCALE_MODES = (
    "spectral",
    "moonlight",
    "moonlight_hidden",
    "update_norm",
    "shape_scaling",
    "unit_rms_norm",
    "spectral_norm",
    "aspect_ratio",
    "none",
)
"""``--muon-scale-mode``: see :func:`megatron_muon.orthogonalize.scale.scale_factor`."""

TP_MODES = ("auto", "owner", "gram", "duplicated", "distributed", "blockwise")
"""``--muon-tp-mode``: see :mod:`megatron_muon.engine.modes`."""

NS_BACKENDS = ("auto", "torch", "triton", "emerging", "gram_newton_schulz", "onednn")
"""``--muon-ns-backend``: see :mod:`megatron_muon.orthogonalize.backends`."""

NONFINITE = ("skip", "propagate", "stop")
"""``--muon-nonfinite``: see :mod:`megatron_muon.plugin.nonfinite`."""

ALARMS = ("off", "warn", "stop")
"""``--muon-alarm``: see :mod:`megatron_muon.plugin.watching`."""

PADDED, DECOUPLED = PARAM_LAYOUTS = ("padded", "decoupled")
"""``--layer-wise-param-layout``: see :mod:`megatron_muon.plugin.uneven_buckets`."""

SCALAR_OPTIMIZERS = ("adam", "lion")
"""``--muon-scalar-optimizer``: see :mod:`megatron_muon.optimizers.scalar_rows`."""

WEIGHT_DECAY_METHODS = ("decoupled", "independent", "independent_scheduled", "l2", "cautious")
"""``--muon-weight-decay-method``: see :func:`megatron_muon.optimizers.rates.options_of`."""

MASTERS = ("fp32", "remainder")
"""``--muon-master``: see :mod:`megatron_muon.optimizers.storage`."""

MOMENTUM_DTYPES = ("auto", "fp32", "bf16", "int8")
"""``--muon-momentum-dtype``: see :func:`megatron_muon.optimizers.storage.init_momentum`."""

OFFLOADS = ("none", "momentum", "all")
"""``--muon-offload``: see :mod:`megatron_muon.optimizers.windows`."""

STIEFEL_SOLVERS = ("admm", "dual_ascent", "fixed_point")
"""``--muon-stiefel-solver``: those of :mod:`megatron_muon.optimizers.stiefel_solvers`."""

QK_CLIP_RULES = ("q_only", "group", "exact")
"""``--muon-qk-clip-rule``: see :mod:`megatron_muon.qk_clip.factors`."""

QK_LOGITS = ("auto", "scores", "te", "exact", "lse", "own")
"""``--muon-qk-logits``: see :mod:`megatron_muon.qk_clip.measure`."""

BALLS = ("sign", "row_norm", "col_norm")
"""Choices of ``--muon-param-rule`` whose updates stay in a ball of ``--muon-ball-radius``."""

STIEFEL = "stiefel"
"""Choice of ``--muon-param-rule`` for weights that stay on the Stiefel manifold."""

DIRECTIONS = (STIEFEL, *BALLS)
"""Choices of ``--muon-param-rule`` that change how the update of a matrix is found; its split stays that of its own
rule."""

STACK, TRANSPOSED, TRANSPOSED_STACK = "stack", "transposed", "transposed_stack"

FORMS = (STACK, TRANSPOSED, TRANSPOSED_STACK)
"""Choices of ``--muon-param-rule`` that say what a weight is: (experts, outputs, inputs); (inputs, outputs); (experts,
inputs, outputs)."""

PARAM_CHOICES = ("adam", "muon", "split", "whole", "per_head", *FORMS, *DIRECTIONS)
"""What ``--muon-param-rule`` can decide; ``muon`` leaves the way to the weight's own rule."""

STEPS, COEFFICIENTS = "steps", "coefficients"
"""Kinds of ``GLOB=KIND:VALUE``, which decides about the :class:`Budget` of weights, and about nothing else."""

AUTO_STEPS: Literal["auto"] = "auto"
"""Number of steps that is measured."""


@dataclass(frozen=True)
class Budget:
    """What Newton-Schulz may take for the matrices of a weight, where that is not what it takes for others.

    Attributes:
        steps: how many; :data:`AUTO_STEPS`, as many as are measured to be enough; None, as many as for others.
        coefficients: name of their set; None: that of others.
        measured: the class of weights whose steps are measured together; empty if they are given. It makes no
            difference between budgets.
    """

    steps: int | Literal["auto"] | None = None
    coefficients: str | None = None
    measured: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        steps = f"{self.steps} step{'' if self.steps == 1 else 's'}" if self.steps else ""
        return ", ".join(filter(None, (steps, self.coefficients)))


def dtype_name(dtype: object) -> str:
    """The name that flags have for a type of numbers, of torch or by this name already."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "fp8"}.get(name, name)


def parse_param_rule(rule: str) -> tuple[str, str]:
    """``(glob, choice)`` of a ``GLOB=CHOICE``."""
    glob, _, choice = rule.rpartition("=")
    return glob.strip(), choice.strip()


def kind_of(choice: str) -> str:
    """What a choice of ``--muon-param-rule`` decides about: a kind of budget; empty: who updates a weight, and how."""
    kind, colon, _ = choice.partition(":")
    return kind if colon else ""


class Rows(NamedTuple):
    """Consecutive rows in a choice such as ``split(q 64/16, dt 4 adam)``.

    Attributes:
        name: of the block that they belong to.
        rows: how many.
        each: rows of one matrix; 0: they are one.
        adam: whether the scalar optimizer updates them.
    """

    name: str
    rows: int
    each: int
    adam: bool


_SECTIONS = re.compile(r"(split|stack|transposed|transposed_stack)\((.*)\)")
_ROWS = re.compile(r"(\w+) +(\d+)(?:/(\d+))?( +adam)?")


def parse_form(choice: str) -> tuple[str, tuple[Rows, ...]] | None:
    """What a choice of ``--muon-param-rule`` says that a weight is, and its sections; None if it says nothing of that.

    ``split(q 64, k 16, v 16)`` names the rows of one period, which repeats; ``q 64/16`` has matrices of 16 rows, ``dt 4
    adam`` is the scalar optimizer's. The other words are :data:`FORMS`, with sections or without.

    Raises:
        ValueError: saying what is wrong with the sections.
    """
    if choice in FORMS:
        return choice, ()
    if (match := _SECTIONS.fullmatch(choice)) is None:
        return None
    found = []
    for part in match[2].split(","):
        rows = _ROWS.fullmatch(part.strip())
        if rows is None:
            raise ValueError(
                f"{part.strip()!r}: give a name and a number of rows, such as 'q 64', 'q 64/16', 'dt 4 adam'"
            )
        found.append(Rows(rows[1], int(rows[2]), int(rows[3] or 0), rows[4] is not None))
    for each in found:
        if not each.rows or (each.each and each.rows % each.each):
            raise ValueError(f"{each.name} of {each.rows} rows in matrices of {each.each or each.rows}")
    if all(each.adam for each in found):
        raise ValueError("all rows are adam's: give the weight to adam")
    return match[1], tuple(found)


def budget_of(choices: Iterable[str]) -> Budget | None:
    """The budget that some choices of ``--muon-param-rule`` make; the last of each kind counts. None if none does."""
    values = {kind_of(choice): choice.partition(":")[2] for choice in choices}
    steps, coefficients = values.get(STEPS), values.get(COEFFICIENTS)
    if steps is None and coefficients is None:
        return None
    return Budget(None if steps is None else AUTO_STEPS if steps == AUTO_STEPS else int(steps), coefficients)


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

"""What the record of a run says about Muon's work: every number by its name, for all who write, judge or draw it.

A line of kind ``muon`` has the numbers of one measured step (``--muon-log-interval``)::

    {"kind": "muon", "iteration": 120, "classes": {CLASS: {"matrices": 24, STAT: [least, mean, largest], ...}, ...},
     "layers": {LAYER: {STAT: [least, mean, largest], ...}, ...}, "times": {TIME: [least, mean, largest], ...},
     "rates": {"lr": 0.02, "weight_decay": 0.1, ...}, "max_attention_logit": 12.3, "heads_clipped": 0}

CLASS is a weight's name with ``*`` in place of numbers, and the name of the block of its rows if it has several:
``decoder.layers.*.self_attention.linear_qkv.weight[q]``. LAYER is the same with its number
(``--muon-log-per-layer``). A number that was not measured is left out; one that is not finite is null.

A line of kind ``alarm`` has what was noticed (``--muon-alarm``)::

    {"kind": "alarm", "iteration": 130, "since": 100, "alarm": "dead_experts", "weights": [NAME, ...], "count": 12,
     "value": 0.0, "limit": 0.0, "text": "..."}

A line of kind ``start`` begins each process's part, with what two runs are compared by: ``versions`` (package:
version), ``flags`` (flag: value, of those that are not default) and ``routes`` (CLASS: who updates it, in words).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["STATS", "TIMES", "Stat"]


@dataclass(frozen=True)
class Stat:
    """A number of each matrix in a measured step.

    Attributes:
        title: for pictures.
        meaning: in one sentence.
        is_logarithmic: whether its axis should be.
    """

    title: str
    meaning: str
    is_logarithmic: bool = False


STATS: Mapping[str, Stat] = {
    "gradient_norm": Stat("Gradient", "Frobenius norm of the gradient, as the optimizer reads it (clipped).", True),
    "zero_gradient": Stat(
        "Gradients of zeros", "1 for a matrix whose gradient is all zeros, such as an expert without tokens; else 0."
    ),
    "momentum_norm": Stat("Momentum", "Frobenius norm of what is orthogonalized, u.", True),
    "at_bound": Stat("At the bound", "1 where that norm is below --muon-eps, so that the update shrinks; else 0."),
    "stable_rank": Stat("Stable rank of the momentum", "Squared Frobenius norm of u over its largest square.", True),
    "unlifted": Stat(
        "Directions not lifted",
        "Share of the directions (the shorter side) whose singular value the iteration leaves below 1/2.",
    ),
    "defect": Stat("Orthogonality defect", "Root mean square of the singular values of the result, less 1."),
    "largest_singular": Stat("Largest singular value", "Of the result: 1.2 at most for the usual coefficients."),
    "update_rms": Stat("Update", "Root mean square of what is added to the weight, with rate and scale.", True),
    "weight_rms": Stat("Weight", "Root mean square of the weight before the step.", True),
    "update_ratio": Stat("Update over weight", "The ratio of the two.", True),
    "cosine": Stat("Successive updates", "Cosine between the result and that of the step before."),
    "spectral_norm": Stat("Spectral norm of the weight", "Its largest singular value, before the step.", True),
    "nonfinite": Stat("Not finite", "1 for a matrix with NaN or infinity in its momentum or its result; else 0."),
}
"""All numbers of matrices, by name."""

TIMES: Mapping[str, str] = {
    "pack": "seconds in which momentum takes in gradients and matrices are packed",
    "exchange": "seconds of waiting for matrices of other ranks",
    "products": "seconds of Newton-Schulz",
    "waiting": "seconds of waiting for owners to send results back",
    "write": "seconds in which results are added to the weights",
    "step": "seconds of the whole step",
    "bytes": "sent by this rank",
    "collectives": "started by this rank",
    "chunks": "that this rank works on",
}
"""What each rank knows of its part of a measured step, by name; over all ranks: least, mean, largest. Their imbalance
is largest over mean."""

"""Pure mathematics on tensors: coefficient sets and the Newton-Schulz iteration. Knows nothing of Megatron."""

from megatron_muon.orthogonalize.coefficients import Iteration, coefficient_types, iteration
from megatron_muon.orthogonalize.newton_schulz import newton_schulz
from megatron_muon.orthogonalize.orthogonalizer import Method, Orthogonalizer

__all__ = ["Iteration", "Method", "Orthogonalizer", "coefficient_types", "iteration", "newton_schulz"]

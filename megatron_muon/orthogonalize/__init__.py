"""Pure mathematics on tensors: coefficient sets and the Newton-Schulz iteration. Knows nothing of Megatron."""

from megatron_muon.orthogonalize.coefficients import coefficient_types, coefficients
from megatron_muon.orthogonalize.newton_schulz import newton_schulz
from megatron_muon.orthogonalize.orthogonalizer import Method, Orthogonalizer

__all__ = ["Method", "Orthogonalizer", "coefficient_types", "coefficients", "newton_schulz"]

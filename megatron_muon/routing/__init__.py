"""Which optimizer updates which weight, and as which matrices."""

from megatron_muon.routing.annotate import annotate
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, WHOLE, MatrixLayout, Section, layout_of
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding

__all__ = [
    "LAYOUT_ATTRIBUTE",
    "WHOLE",
    "MatrixLayout",
    "Section",
    "_is_nonlinear_or_embedding",
    "annotate",
    "layout_of",
]

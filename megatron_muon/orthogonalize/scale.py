"""Factors that give an orthogonalized update its size."""

from __future__ import annotations

import math

from megatron_muon.choices import SCALE_MODES

UPDATE_NORM = "update_norm"
SPECTRAL_NORM = "spectral_norm"
"""The modes whose factors depend on the update, not on its shape alone: on its Frobenius or its spectral norm."""

MOONLIGHT_HIDDEN = "moonlight_hidden"
"""The mode that must know the model's hidden size."""


def scale_factor(mode: str, m: int, n: int, hidden_size: int = 0) -> float:
    """Factor on the orthogonalized update of a weight with ``m`` rows (outputs) and ``n`` columns (inputs).

    For a semi-orthogonal matrix O (all singular values 1), RMS(O) = 1 / sqrt(max(m, n)) and its spectral norm is 1.

    Args:
        mode: ``spectral`` sqrt(max(m, n)): the update has RMS 1 (with 0.2, Moonlight, arXiv 2502.16982);
            ``shape_scaling`` sqrt(max(1, m/n)) (Jordan, https://kellerjordan.github.io/posts/muon);
            ``unit_rms_norm`` sqrt(m/n): RMS-to-RMS operator norm 1 (Bernstein; Scion, arXiv 2502.07529);
            ``aspect_ratio`` sqrt(max(m, n)/min(m, n)): spectral norm sqrt(aspect ratio), whichever side is longer;
            ``moonlight`` 0.2 sqrt(max(m, n)): the RMS of Adam's updates (arXiv 2502.16982);
            ``update_norm`` sqrt(max(m, n)), to be corrected by the measured norm, so that the RMS is 1 at any rank (the
            same paper's alternative); ``moonlight_hidden`` 0.2 sqrt(hidden_size) for all shapes (its baseline);
            ``spectral_norm`` sqrt(m/n), to be corrected by the measured spectral norm (arXiv 2512.05620, appendix F);
            ``none`` 1.
        m: rows of the whole logical matrix: after the split of a fused weight, before the tensor-parallel cut.
        n: its columns. Of a matrix without elements, which has no update, the factor is 0 in all modes.
        hidden_size: of the model, for ``moonlight_hidden``.

    Raises:
        ValueError: for an unknown mode, or without the hidden size where it is needed.
    """
    if mode in SCALE_MODES and not (m and n):
        return 0.0
    match mode:
        case "spectral" | "update_norm":
            return math.sqrt(max(m, n))
        case "moonlight":
            return 0.2 * math.sqrt(max(m, n))
        case "moonlight_hidden":
            if hidden_size < 1:
                raise ValueError(f"scale mode {mode!r}: hidden_size {hidden_size}, give that of the model")
            return 0.2 * math.sqrt(hidden_size)
        case "shape_scaling":
            return math.sqrt(max(1.0, m / n))
        case "unit_rms_norm" | "spectral_norm":
            return math.sqrt(m / n)
        case "aspect_ratio":
            return math.sqrt(max(m, n) / min(m, n))
        case "none":
            return 1.0
    raise ValueError(f"scale mode {mode!r}: choose one of {', '.join(SCALE_MODES)}")

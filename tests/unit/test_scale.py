"""Scale factors: closed forms and the regression numbers for shapes taken from a shard."""

import pytest

from megatron_muon.choices import SCALE_MODES
from megatron_muon.orthogonalize.scale import scale_factor


@pytest.mark.parametrize(
    "mode,m,n,expected",
    [
        ("spectral", 4096, 1024, 64.0),
        ("shape_scaling", 4096, 1024, 2.0),
        ("shape_scaling", 1024, 4096, 1.0),
        ("unit_rms_norm", 4096, 1024, 2.0),
        ("unit_rms_norm", 1024, 4096, 0.5),
        ("aspect_ratio", 4096, 1024, 2.0),
        ("aspect_ratio", 1024, 4096, 2.0),
        ("none", 4096, 1024, 1.0),
    ],
)
def test_closed_forms(mode: str, m: int, n: int, expected: float) -> None:
    assert scale_factor(mode, m, n) == pytest.approx(expected, rel=1e-12)


def test_agrees_with_emerging_optimizers() -> None:
    from emerging_optimizers.orthogonalized_optimizers.muon import get_muon_scale_factor

    for mode in ("spectral", "shape_scaling", "unit_rms_norm"):
        for m, n in [(3, 7), (7, 3), (5, 5)]:
            assert scale_factor(mode, m, n) == pytest.approx(get_muon_scale_factor(m, n, mode), rel=1e-12)


def test_a_matrix_without_elements_has_no_scale() -> None:
    for mode in SCALE_MODES:
        assert [scale_factor(mode, *shape, hidden_size=8) for shape in ((0, 5), (5, 0), (0, 0))] == [0.0] * 3


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"spectrl.*choose one of spectral"):
        scale_factor("spectrl", 2, 2)

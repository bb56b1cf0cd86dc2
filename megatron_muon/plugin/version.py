"""Which megatron-core these hooks fit."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from megatron_muon.errors import ConfigError

SUPPORTED = (0, 19)
"""Major and minor version of megatron-core whose internals the hooks are written for."""

KNOWN: dict[tuple[int, ...], str] = {
    (
        0,
        18,
    ): "0.18 lacks functions that are hooked (GatedDeltaNet's base class, the metadata of fp32 copies), and others "
    "differ; patches/core_v0.18.2 in a checkout of megatron-muon has the fixes that need no plug-in.",
    (
        0,
        20,
    ): "0.20 has use_muon = False for weights that Muon leaves alone (this package reads it too) and other functions "
    "where the layer-wise optimizer and checkpoints are hooked.",
}
"""What is known about other versions."""

ELSE = "To carry the hooks over: python -m tools.upstream seams, in a checkout of megatron-muon, names what has moved."


def check_megatron_core() -> None:
    """Refuse a missing or unsupported megatron-core, without importing it.

    The version is read from the sources that ``import megatron.core`` would take: a checkout of Megatron-LM on the
    path hides an installed wheel.

    Raises:
        ConfigError: naming what was found, where, and what to install.
    """
    wanted = ".".join(map(str, SUPPORTED))
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(f"megatron-core is not installed: pip install 'megatron-core=={wanted}.*'.")
    folder = Path(spec.origin).parent
    text = (folder / "package_info.py").read_text()
    numbers = [re.search(rf"^{name} = (\d+)", text, re.MULTILINE) for name in ("MAJOR", "MINOR", "PATCH")]
    found = tuple(int(number[1]) for number in numbers if number is not None)
    if found[:2] != SUPPORTED:
        raise ConfigError(
            f"megatron-core {'.'.join(map(str, found)) or 'of an unknown version'} in {folder} is not supported: this "
            f"version of megatron-muon hooks megatron-core {wanted}.x. Install 'megatron-core=={wanted}.*', or put a "
            f"checkout of Megatron-LM at core_v{wanted}.0 first on the path. {_known(found)}"
        )


def _known(found: tuple[int, ...]) -> str:
    """What users of another version can be told."""
    return " ".join(filter(None, (KNOWN.get(found[:2]), ELSE)))

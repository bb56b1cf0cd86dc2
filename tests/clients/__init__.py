"""The frameworks through which users reach Megatron-Core: their own functions, on CPU ranks, with this package.

``make test-clients`` installs them, in an environment of its own, and fails where one cannot be imported. Elsewhere
these tests are skipped: nothing of ``make test`` needs a framework.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

HOOKS = "hooks, as observed: checkpoints canonical; QK-clip off; "
"""With which the report's last line begins; what follows depends on which loops the process has imported."""


def needs(*modules: str) -> pytest.MarkDecorator:
    """For ``pytestmark``: skips where one of ``modules`` is not installed, except in ``make test-clients``."""
    absent = [name for name in modules if not _is_installed(name)] if "MEGATRON_MUON_CLIENTS" not in os.environ else []
    return pytest.mark.skipif(bool(absent), reason=f"{absent} not installed: `make test-clients` installs frameworks")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that holds it
        return False

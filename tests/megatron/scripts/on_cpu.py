"""Runs a script on CPU ranks, as ``python -m megatron_muon run`` does but without the plug-in's ``install()``."""

import runpy
import sys
from pathlib import Path

from megatron_muon import cpu

if __name__ == "__main__":
    cpu.install()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")

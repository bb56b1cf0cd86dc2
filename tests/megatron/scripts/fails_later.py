"""``examples/pretrain_gpt.py``, in which the second rank raises after the first checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "examples"))

import pretrain_gpt

compute = pretrain_gpt.forward_step


def forward_step(*args: object) -> object:
    """Raise where the checkpoint of the flags is."""
    folder = Path(sys.argv[sys.argv.index("--save") + 1])
    if os.environ["RANK"] == "1" and (folder / "latest_checkpointed_iteration.txt").exists():
        raise RuntimeError("fails later")
    return compute(*args)


if __name__ == "__main__":
    pretrain_gpt.forward_step = forward_step
    pretrain_gpt.main()

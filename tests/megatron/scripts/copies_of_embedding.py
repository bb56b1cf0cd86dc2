"""The example's script, which ends if copies of the embedding on several pipeline stages differ after a step."""

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.training import training

SCRIPT = Path(__file__).parents[3] / "examples" / "pretrain_gpt.py"
train_step = training.train_step


def compare(model: list) -> None:
    """Of the stages in the embedding group; each has one copy at least."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    mine = [param.data for chunk in model for param in chunk.parameters() if getattr(param, "shared_embedding", False)]
    if mine:
        group = parallel_state.get_embedding_group()
        copies = [torch.empty_like(mine[0]) for _ in range(group.size())]
        dist.all_gather(copies, mine[0], group=group)
        assert all(torch.equal(copy, mine[0]) for copy in [*copies, *mine]), "copies differ"
        print(f"{len(copies)} copies of the embedding are equal", flush=True)


def step_and_compare(*args: object, **kwargs: object) -> object:
    result = train_step(*args, **kwargs)
    compare(args[2])  # type: ignore[arg-type]
    return result


if __name__ == "__main__":
    training.train_step = step_and_compare
    sys.path.insert(0, str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")

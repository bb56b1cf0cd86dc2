"""Tensor parallelism by torch's own ``parallelize_module``, alone and with FSDP2: the training of one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_muon import optimizer_for
from tests.pool import RankPool

PAGE = (Path(__file__).parents[2] / "docs" / "plain-pytorch.md").read_text()
(CLIP,) = re.findall(r"```python\n(from torch.distributed.tensor import DTensor\n.*?)```", PAGE, re.S)


class Attention(nn.Module):
    """Heads of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16, bias=name == 0) for name in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.attention = nn.Embedding(20, 16), nn.LayerNorm(16), Attention()
        self.up, self.down, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 20, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.attention(self.norm(x))
        logits: torch.Tensor = self.head(x + self.down(self.up(x).relu()))
        return logits


def _divide(model: nn.Module, tensor: int) -> None:
    """Over this many tensor-parallel ranks, and the rest by FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size() // tensor, tensor), mesh_dim_names=("data", "tensor"))
    if tensor > 1:
        styles: dict[str, Any] = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
        styles |= {"attention.out": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        styles["table"] = RowwiseParallel(input_layouts=Replicate())
        styles["head"] = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, mesh["tensor"], styles)
    if dist.get_world_size() > tensor:
        fully_shard(model, mesh=mesh["data"])


def train(tensor: int, folder: str, saves: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of three steps and two more, and the weights; or of the two after three that others have saved."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = Transformer()
    _divide(model, tensor)
    optimizer = optimizer_for(model, lr=1e-2, param_rule=("head.weight=adam",), fp32_matmul_prec="highest")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    losses = []
    for step in range(5):
        if step == 3:
            weights, state = get_state_dict(model, optimizer)
            saved = {"model": weights, "optimizer": state, "schedule": schedule.state_dict()}
            if saves:
                dcp.save(saved, checkpoint_id=folder)
            else:
                dcp.load(saved, checkpoint_id=folder)
                set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
                schedule.load_state_dict(saved["schedule"])
        elif step < 3 and not saves:
            continue
        tokens = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        exec(CLIP, {"model": model, "torch": torch})
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses, [each.full_tensor() if isinstance(each, DTensor) else each.detach() for each in model.parameters()]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_is_that_of_one_process(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    """On two tensor-parallel ranks, clipped as the page says; FSDP2 divides over two more. One goes on with it."""
    ((wanted, weights),) = pool.run(train, 1, 1, str(tmp_path / "one"), True)
    for losses, own in pool.run(train, ranks, 2, str(tmp_path / "divided"), True):
        assert losses == pytest.approx(wanted, abs=2e-6)  # float32: sums over halves
        for one, two in zip(own, weights, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=5e-6)
    ((rest, _),) = pool.run(train, 1, 1, str(tmp_path / "divided"), False)
    assert rest == pytest.approx(wanted[3:], abs=2e-6)

"""A small transformer in plain PyTorch: sharded by FSDP2, trained by Muon and AdamW, saved, and gone on with elsewhere.

    torchrun --nproc-per-node 2 examples/plain_pytorch.py --save /tmp/checkpoint
    torchrun --nproc-per-node 1 examples/plain_pytorch.py --load /tmp/checkpoint

It runs on GPUs where there are any, on the CPU otherwise. Any number of ranks loads what others saved.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import megatron_muon

WORDS, LENGTH, WIDTH, BATCH = 64, 32, 48, 16


class Block(nn.Module):
    """Attention and a perceptron; queries, keys and values are layers of their own, so that they are matrices each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, WIDTH)."""
        y = self.norm(x)
        heads = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        mixed = self.down(nn.functional.gelu(self.up(self.norm_mlp(x))))
        return x + mixed


class Transformer(nn.Module):
    """Two blocks between an embedding and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """(batch, length) numbers of words -> (batch, length, WORDS) logits of the next ones."""
        x = self.words(words) + self.places.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's sequences of a step, and the words that follow: each is twice the one before, plus 1 or 2."""
    draw = torch.Generator().manual_seed(step)
    words = torch.randint(WORDS, (BATCH, 1), generator=draw)
    for _ in range(LENGTH):
        words = torch.cat([words, (2 * words[:, -1:] + torch.randint(1, 3, (BATCH, 1), generator=draw)) % WORDS], 1)
    mine = words.chunk(dist.get_world_size())[dist.get_rank()]
    return mine[:, :-1], mine[:, 1:]


def train(steps: int, load: str = "", save: str = "", device: str = "cpu") -> list[float]:
    """Train up to a number of steps, on all ranks of the process group.

    Args:
        steps: in all, with those that were done before the checkpoint that is loaded.
        load: folder of a checkpoint; empty: from the beginning.
        save: folder for one; empty: none.
        device: kind of the devices that the ranks have.

    Returns:
        The loss of each step that was done here, over all ranks.
    """
    torch.manual_seed(0)  # all ranks begin with one model
    model = Transformer().to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # The optimizer is made when the weights are what they are to be: after fully_shard, and parallelize_module.
    optimizer = megatron_muon.optimizer_for(model, lr=3e-3, param_rule=("head.weight=adam",))
    first = 0
    if load:
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "step": 0}
        dcp.load(saved, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        first = saved["step"]

    losses = []
    for step in range(first, steps):
        words, following = (each.to(device) for each in batch(step))
        loss = nn.functional.cross_entropy(model(words).flatten(0, 1), following.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())

    if save:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state, "step": steps}, checkpoint_id=save)
    return losses


def main() -> None:
    """As the first lines of this file say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="in all, with those before a checkpoint")
    parser.add_argument("--load", default="", help="folder of a checkpoint")
    parser.add_argument("--save", default="", help="folder for a checkpoint")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    losses = train(arguments.steps, arguments.load, arguments.save, device)
    if dist.get_rank() == 0:
        for number, loss in enumerate(losses, arguments.steps - len(losses)):
            print(f"step {number} loss {loss:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Train a model of Hugging Face's transformers with Muon: one optimizer, given to ``Trainer``.

    pip install transformers accelerate
    python examples/huggingface_trainer.py

A small Qwen3-MoE with random weights learns to count; nothing is downloaded. Matrices are updated by Muon, embedding,
output layer and norms by AdamW: the table that is printed first says which is which.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

import megatron_muon

VOCABULARY = 64


class Counting(Dataset):
    """Sequences of tokens that go up by a number that is the same throughout each, and starts anywhere."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(32) * (1 + index % 5)) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def tiny_model() -> Qwen3MoeForCausalLM:
    """Two layers of four experts, of which two work on each token."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        output_router_logits=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config)


def train(steps: int, folder: str, resume: str | None = None) -> tuple[list[float], Qwen3MoeForCausalLM]:
    """Train; the losses of all steps, and the model.

    Args:
        steps: of the optimizer.
        folder: gets a checkpoint halfway, and one at the end.
        resume: a checkpoint to go on from.
    """
    # By itself Trainer of transformers 5.12 leaves the experts as they are: a checkpoint has other names for them.
    model = Qwen3MoeForCausalLM.from_pretrained(resume) if resume else tiny_model()
    optimizer = megatron_muon.optimizer_for(model, lr=3e-3, weight_decay=0.1)
    print(optimizer.table, flush=True)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=(steps + 1) // 2,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Counting(4096), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", help="folder for checkpoints; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        losses, _ = train(options.steps, options.out or temporary)
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")

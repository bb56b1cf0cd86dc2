"""Finetune with LoRA and Muon: peft's adapters, Hugging Face's Trainer, one optimizer.

    pip install transformers accelerate peft
    python examples/lora.py

A small Qwen3-MoE with random weights learns to count by adapters of its attention and a trained output layer; nothing
is downloaded. Both factors are Muon's: B is split as the layer that it adapts, A is one matrix (``--lora-a adam``
leaves A to AdamW). The output layer is AdamW's, and what is frozen is in nobody's hands.
"""

from __future__ import annotations

import argparse
import tempfile

import peft
import torch
from huggingface_trainer import Counting, tiny_model
from transformers import Trainer, TrainingArguments

import megatron_muon

RANK = 4


def train(steps: int, folder: str, lora_a: str = "muon") -> tuple[list[float], torch.nn.Module]:
    """Train adapters; the losses of all steps, and the model with them merged in.

    Args:
        steps: of the optimizer.
        folder: gets the adapters, as ``adapter_model.safetensors``.
        lora_a: who updates the A factors, ``muon`` or ``adam``.
    """
    # alpha = rank: another ratio multiplies B A, and so Muon's steps, whose size does not follow the gradient's.
    adapted = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=adapted, modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_model(), config)
    optimizer = megatron_muon.optimizer_for(model, lr=2e-2, weight_decay=0.0, lora_a=lora_a)
    print(optimizer.table, flush=True)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Counting(4096), optimizers=(optimizer, None))
    trainer.train()
    model.save_pretrained(folder)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.merge_and_unload()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lora-a", choices=("muon", "adam"), default="muon", help="who updates the A factors")
    parser.add_argument("--out", help="folder for the adapters; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        losses, _ = train(options.steps, options.out or temporary, options.lora_a)
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")

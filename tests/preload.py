"""What every rank imports, once: ranks are forked from a process that has it.

That process has a single thread (others would not survive a fork) and no process group.
"""

from __future__ import annotations

import gc

import torch

from megatron_muon import cpu

torch.set_num_threads(1)
cpu.install()

import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.training.training  # noqa: E402, F401

# A collection would walk over all that was imported, a quarter of a second on each rank after every call.
gc.freeze()

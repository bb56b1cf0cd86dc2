"""What a data-parallel rank makes beside its own optimizer state for a checkpoint.

    python -m tools.checkpoint_memory

Megatron-Core's own layout of DDP's buffers for weights of real sizes, on torch's ``meta`` device, and this package's
descriptions of the slices that each rank has: what these are no views of would be memory of its own. Beside it, what
whole weights take: at load of each weight of which a rank has a slice, at save of each that it has most of.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_muon.checkpoint.sharding import places_of
from megatron_muon.plugin.optimizer_state import _spans

STATES, SIZE = ("fp32_param", "exp_avg", "exp_avg_sq"), 4

LLAMA_8B = [(128256, 4096), *[(6144, 4096), (4096, 4096), (4096,), (28672, 4096), (4096, 14336), (4096,)] * 32]
"""Hidden size 4096, 32 layers, 8 groups of keys and values, gated MLP of 14336; an untied output layer."""
MODELS = {
    "8B, Adam with the distributed optimizer": [*LLAMA_8B, (4096,), (128256, 4096)],
    "DeepSeek-V3's embedding table (129280 x 7168), layer-wise": [(129280, 7168)],
}


def slices_of(shapes: list[tuple[int, ...]], ranks: int) -> tuple[list[torch.nn.Parameter], list[Any], int]:
    """The weights, the elements of each that every rank has, and the number of buckets."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16)) for shape in shapes]
    config = SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
    size = max(40_000_000, 1_000_000 * ranks)
    layout = DistributedOptimizer._compute_per_buffer_param_layout(params, size, ranks, config)
    spans = []
    for param in params:
        start, stop, bucket = layout.param_index_map[param]
        first, last = layout.bucket_indices[bucket]
        spans.append(_spans(start, stop, first, last - first, ranks))
    return params, spans, len(layout.bucket_indices)


def measured(shapes: list[tuple[int, ...]], ranks: int) -> tuple[int, list[float]]:
    """Buckets; and in GiB, of the rank that has most: own state, whole at load, whole at save, beside the state now."""
    params, spans, buckets = slices_of(shapes, ranks)
    keys = [f"w{number}" for number in range(len(params))]
    states = [
        ShardedTensor.from_rank_offsets(key, p, replica_id=(0, 0, 0)) for key, p in zip(keys, params, strict=True)
    ]
    places = places_of(params, dict(zip(keys, states, strict=True)))
    found = []
    for rank in range(ranks):
        own = load = save = new = 0
        for param, place, each in zip(params, places, spans, strict=True):
            start, stop = each[rank]
            if start == stop:
                continue
            whole = param.numel() * SIZE * len(STATES)
            own += (stop - start) * SIZE * len(STATES)
            load += whole
            most = max(range(ranks), key=lambda other: (each[other][1] - each[other][0], -other))
            save += whole if rank == most and stop - start < param.numel() else 0
            for state in STATES:
                tensor = torch.empty(stop - start, device="meta")
                memory = tensor.untyped_storage()._cdata
                for part in place.sharded(state, tensor, (0, 0, 0), (start, stop)):
                    new += 0 if part.data.untyped_storage()._cdata == memory else part.data.numel() * SIZE
        found.append((own, load, save, new))
    return buckets, [max(column) / 2**30 for column in zip(*found, strict=True)]


if __name__ == "__main__":
    print(
        "| model | ranks | buckets | own state | load, whole weights | save, whole weights | save or load, in boxes |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, shapes in MODELS.items():
        for ranks in (8, 64):
            buckets, (own, load, save, new) = measured(shapes, ranks)
            numbers = " | ".join(f"{value:.1f}" for value in (own, load, save))
            print(f"| {name} | {ranks} | {buckets} | {numbers} | {new:.3g} |")

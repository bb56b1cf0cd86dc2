"""Tensors' metadata of a checkpoint, whatever this version of torch stores of a tensor."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy


def test_properties_that_torch_empty_does_not_take():
    properties = TensorProperties.create_from_tensor(torch.ones(2, 3, dtype=torch.bfloat16))
    properties.strides = (3, 1)  # since torch 2.15
    stored = TensorStorageMetadata(properties, torch.Size((2, 3)), [])
    strategy = TorchDistLoadShardedStrategy.__new__(TorchDistLoadShardedStrategy)
    found = strategy.load_tensors_metadata(
        Path("unused"), SimpleNamespace(state_dict_metadata={"weight": stored})
    )
    tensor = found["weight"]
    assert (tensor.global_shape, tensor.dtype, tensor.data) == ((2, 3), torch.bfloat16, None)

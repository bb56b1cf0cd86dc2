"""A small real ``MimoModel``: a vision encoder with a projection, and a GPT, each with groups and DDP of its own."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.layers import layer_spec, transformer_config

IMAGE = 63
"""The token that stands for a patch."""

PATCHES = 4
"""Of an image, one in each sequence."""

ENCODER = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 2, "ffn_hidden_size": 24}


def grid_of(offset: int, tp: int, dp: int) -> Any:
    """The process groups of one part of the model, on ``tp * dp`` ranks from ``offset`` on; all ranks call this."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    grid = HyperCommGrid([tp, 1, 1, dp], ["tp", "cp", "pp", "dp"], rank_offset=offset, backend="gloo")
    grid.register_view("expert", [tp, 1, dp, 1], ["expt_tp", "ep", "expt_dp", "pp"], shared_dims=["pp"])
    for dims in ("tp", "cp", "pp", "dp", ["dp", "cp"], ["tp", "pp"], ["tp", "cp", "dp", "pp"]):
        grid.create_pg(dims)
    for dims in ("ep", "expt_tp", "expt_dp", ["expt_tp", "ep", "pp"], ["expt_tp", "ep"]):
        grid.create_pg(dims, view="expert")
    return grid


def groups_of(grid: Any) -> Any:
    """Those that modules and DDP ask for; None on ranks that have no part of it."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    if not grid.is_current_rank_in_grid():
        return None
    groups = ProcessGroupCollection()
    for name in ("tp", "cp", "pp", "dp"):
        setattr(groups, name, grid.get_pg(name))
    groups.dp_cp = grid.get_pg(["dp", "cp"])
    groups.mp = grid.get_pg(["tp", "pp"])
    for name in ("ep", "expt_tp", "expt_dp"):
        setattr(groups, name, grid.get_pg(name, view="expert"))
    groups.tp_ep = grid.get_pg(["expt_tp", "ep"], view="expert")
    groups.tp_ep_pp = grid.get_pg(["expt_tp", "ep", "pp"], view="expert")
    groups.embd = groups.pos_embd = groups.pp
    return groups


def build(language: Any, vision: Any, asked: dict[str, Any] | None = None, clip: dict[str, Any] | None = None) -> Any:
    """A model over two grids. ``clip``: what the language model's config asks for, ``asked``: the encoder's."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.mimo import MimoModel
    from megatron.core.models.mimo.config import MimoModelConfig
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
    from megatron.core.models.vision.multimodal_projector import MultimodalProjector
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlock

    mine = {"language": groups_of(language), "vision": groups_of(vision)}
    configs = {
        "language": transformer_config(Layout(tp=language.shape[0]), num_layers=2, **(clip or {})),
        "vision": transformer_config(Layout(tp=vision.shape[0]), **ENCODER, **(asked or {})),
    }
    projection = transformer_config(
        Layout(tp=vision.shape[0]), num_layers=1, ffn_hidden_size=32, gated_linear_unit=False
    )
    language_spec = ModuleSpec(
        module=GPTModel,
        params={
            "config": configs["language"],
            "transformer_layer_spec": layer_spec(configs["language"]),
            "vocab_size": 64,
            "max_sequence_length": 16,
            "position_embedding_type": "rope",
            "pg_collection": mine["language"],
        },
    )
    encoder = ModuleSpec(
        module=TransformerBlock,
        params={"config": configs["vision"], "spec": layer_spec(configs["vision"]), "pg_collection": mine["vision"]},
    )
    projector = ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": projection,
            "submodules": MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            "projector_type": "mlp",
            "input_size": configs["vision"].hidden_size,
            "tp_group": mine["vision"].tp if mine["vision"] else None,
        },
    )
    vision_spec = ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": mine["vision"]},
        submodules={"encoders": {"block": encoder}, "input_projections": [projector]},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MimoModel(
            MimoModelConfig(
                language_model_spec=language_spec,
                modality_submodules_spec={"images": vision_spec},
                special_token_ids={"images": IMAGE},
                module_to_grid_map={"images": vision, "language": language},
            )
        )
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    if model.language_model is not None:
        model.language_model = DistributedDataParallel(
            configs["language"], ddp, model.language_model, pg_collection=mine["language"]
        )
    for name, part in model.modality_submodules.items():
        model.modality_submodules[name] = DistributedDataParallel(
            configs["vision"], ddp, part, pg_collection=mine["vision"]
        )
    for part in model._active_ddp_modules():
        part.broadcast_params()  # random states are those of parallel_state's ranks
    return model


def backward(model: Any, step: int) -> float:
    """Gradients of a batch of two, reduced over each part's replicas; the loss, on all ranks.

    Where the parts are on ranks of their own, embeddings of patches go from each of the first half to one of the
    second, and their gradients back.
    """
    samples = 2
    tokens = torch.stack([harness.COUNTING.tokens(step, sample) for sample in range(samples)])
    tokens[tokens == IMAGE] = 0
    given, labels = tokens[:, :-1].clone(), tokens[:, 1:]
    given[:, :PATCHES] = IMAGE
    features = torch.randn(PATCHES, samples, ENCODER["hidden_size"], generator=torch.Generator().manual_seed(step))
    positions = torch.arange(given.size(1)).expand_as(given)
    mask = torch.zeros(1, 1, PATCHES, PATCHES, dtype=torch.bool)
    found = torch.zeros(1)
    encoder = model.modality_submodules["images"].module if model.modality_submodules else None
    other = (dist.get_rank() + dist.get_world_size() // 2) % dist.get_world_size()
    if encoder is not None:
        data = encoder.pg_collection.dp
        features = features[:, data.rank() :: data.size()].contiguous()
    if model.language_model is not None:
        data = model.language_model.module.pg_collection.dp
        given, positions, labels = (each[data.rank() :: data.size()] for each in (given, positions, labels))
    inputs = {"images": {"block": {"hidden_states": features, "attention_mask": mask}}}
    if encoder is not None and model.language_model is not None:
        output, _ = model(given, positions, None, None, labels, inputs)
        output.mean().backward()
        found += output.detach().mean()
    elif encoder is not None:
        output, _ = model(given, positions, None, None, None, inputs)
        dist.send(output["images"].detach(), other)
        gradient = torch.empty_like(output["images"])
        dist.recv(gradient, other)
        output["images"].backward(gradient)
    else:
        images = torch.empty(PATCHES * len(given), 32)
        dist.recv(images, other)
        model.set_input_tensor({"images": images.requires_grad_()})
        output, _ = model(given, positions, None, None, labels)
        output.mean().backward()
        dist.send(images.grad, other)
        found += output.detach().mean()
    for part in model._active_ddp_modules():
        part.finish_grad_sync()
    dist.broadcast(found, dist.get_world_size() - 1)
    return found.item()

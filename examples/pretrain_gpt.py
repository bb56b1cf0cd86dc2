"""Pre-train a GPT with Megatron-Core: a model, datasets and a loss for ``megatron.training.pretrain``.

Nothing here knows of Muon. The plug-in is a launcher and flags:

    torchrun --nproc-per-node 2 -m megatron_muon run examples/pretrain_gpt.py --optimizer muon ...

and without it this is an ordinary Megatron script (``torchrun --nproc-per-node 8 examples/pretrain_gpt.py ...``).
All of Megatron's flags apply: tensor, (virtual) pipeline, context, expert and data parallelism, dense or MoE layers,
GQA or MLA, ``--transformer-impl local`` or ``transformer_engine``. ``examples/demo.py`` shows a complete command line.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch.utils.data import Dataset

Layers = Callable[[TransformerConfig, int | None], TransformerBlockSubmodules]


def gpt_layers(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Which modules the decoder layers of one (virtual) pipeline stage are made of."""
    args = get_args()
    return get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=args.transformer_impl == "transformer_engine",
        normalization=args.normalization,
        qk_l2_norm=args.qk_l2_norm,
        vp_stage=vp_stage,
    )


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    layers: Layers = gpt_layers,
) -> GPTModel:
    """The part of the model that one (virtual) pipeline stage holds."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    return GPTModel(
        config,
        layers(config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=mtp_layers(config, vp_stage, layers) if args.mtp_num_layers else None,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def mtp_layers(config: TransformerConfig, vp_stage: int | None, layers: Layers) -> ModuleSpec | None:
    """Multi-token prediction, as the model's last layer is made, of which its stage need not have any."""
    whole = copy.copy(config)
    whole.pipeline_model_parallel_size, whole.pipeline_model_parallel_layout = 1, None
    whole.virtual_pipeline_model_parallel_size = None
    uses_te = get_args().transformer_impl == "transformer_engine"
    return get_gpt_mtp_block_spec(config, layers(whole, None), uses_te, vp_stage)


def embedding_ranks(ranks: list[int]) -> list[int]:
    """Of a pipeline's ranks those that have the embedding: the first, a tied output's, multi-token prediction's."""
    args = get_args()
    tied = [] if args.untie_embeddings_and_output_weights else ranks[-1:]
    return sorted({ranks[0], *tied, *get_mtp_ranks(ranks, core_transformer_config_from_args(args))})


class SameEveryTime(Dataset):
    """A validation set of which every evaluation sees the same samples, so that the losses can be compared.

    Megatron reads on through the validation set from one evaluation to the next.

    Args:
        dataset: at least ``period`` samples.
        period: number of samples in one evaluation.
        length: number of samples in all evaluations.
    """

    index_split = Split.valid  # tells Megatron's data loader to use the batch sizes of evaluations

    def __init__(self, dataset: Dataset, period: int, length: int) -> None:
        self.dataset, self.period, self.length = dataset, period, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.dataset[index % self.period]


def datasets_provider(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> list[Any]:
    """Training, validation and test set, from the ``--data-path`` family of flags (``--mock-data`` without files)."""
    args = get_args()
    num_train, num_valid, num_test = num_samples
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        multiple_validation_sets=args.multiple_validation_sets,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    if args.full_validation:
        return BlendedMegatronDatasetBuilder(dataset, num_samples, lambda: True, config).build()
    per_evaluation = args.eval_iters * args.eval_global_batch_size
    builder = BlendedMegatronDatasetBuilder(dataset, (num_train, per_evaluation, num_test), lambda: True, config)
    train, valid, test = builder.build()
    return [train, valid and SameEveryTime(valid, per_evaluation, num_valid), test]


# Every rank reads the samples of its data-parallel rank, which the seed determines, so none has to be broadcast.
datasets_provider.is_distributed = True


def next_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The next micro-batch on the device, cut to this rank's part of the sequence under context parallelism."""
    batch = {name: value.cuda(non_blocking=True) for name, value in next(data_iterator).items()}
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum of the token losses, number of tokens, and what to report.

    Args:
        loss_mask: ``(batch, sequence)``, 0 where a token does not count.
        losses: ``(batch, sequence)``, cross-entropy of each token in nats.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable]:
    """One forward pass, and the function that makes a loss of its output on the last pipeline stage."""
    batch = next_batch(data_iterator)
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(loss_func, batch["loss_mask"])


def main(layers: Layers = gpt_layers) -> None:
    """Parse Megatron's command line and train a model of these layers, or of those of ``--hybrid-layer-pattern``."""
    args = parse_and_validate_args()
    by_pattern = args.hybrid_layer_pattern is not None
    config = pretrain_cfg_container_from_args(args, hybrid_config_from_args(args) if by_pattern else None)
    own = (partial(model_provider, layers=layers),)
    pretrain(
        config,
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        *(() if by_pattern else own),  # Megatron-LM's HybridModel, which its config builds
        get_embedding_ranks=None if by_pattern else embedding_ranks,
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

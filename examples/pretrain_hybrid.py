"""Pre-train a hybrid with Megatron-Core: GatedDeltaNet layers with gated softmax attention between them.

Data, loss and command line are those of ``pretrain_gpt.py``; the layers follow from these flags, here three of linear
attention to one of softmax attention:

    torchrun --nproc-per-node 2 -m megatron_muon run examples/pretrain_hybrid.py --optimizer muon \\
        --experimental-attention-variant gated_delta_net --linear-attention-freq 4 --attention-output-gate \\
        --linear-num-key-heads 4 --linear-num-value-heads 8 --linear-key-head-dim 32 --linear-value-head-dim 32 ...

With ``--hybrid-layer-pattern`` (``M*M-``: Mamba, attention, Mamba, MLP) the model is Megatron-LM's ``HybridModel``.

On GPUs Megatron-Core builds such layers with ``--transformer-impl transformer_engine`` only, and GatedDeltaNet needs
flash-linear-attention. On the CPU the launcher provides both in plain torch. ``examples/demo.py --model hybrid`` trains
a small one, with a complete command line.
"""

from __future__ import annotations

from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from pretrain_gpt import main


def hybrid_layers(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Which modules the decoder layers of one (virtual) pipeline stage are made of."""
    return get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=vp_stage)


if __name__ == "__main__":
    main(hybrid_layers)

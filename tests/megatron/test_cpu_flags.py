"""Megatron's flags as launch scripts have them, two steps of small models on CPU ranks: they train, or say why not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests import launch

BASE = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --lr-decay-iters 6 "
    "--train-iters 2 --eval-iters 1 --eval-interval 100 --log-interval 1 --mock-data --split 90,5,5 "
    "--tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0 --optimizer muon"
)
ROPE = (
    " --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0"
)
GPT = BASE + ROPE + " --group-query-attention --num-query-groups 2"
MODELS = {
    "plain": BASE,
    "gpt": GPT,
    "experts": GPT + " --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32",
    "latent": BASE
    + ROPE
    + " --multi-latent-attention --kv-lora-rank 16 --q-lora-rank 24 --qk-head-dim 16 --qk-pos-emb-head-dim 8 "
    "--v-head-dim 16",
    "hybrid": GPT
    + " --experimental-attention-variant gated_delta_net --linear-attention-freq 2 --linear-num-key-heads 4 "
    "--linear-num-value-heads 4 --linear-key-head-dim 16 --linear-value-head-dim 16 --attention-output-gate",
}

TRAIN: dict[tuple[str, int], str] = {
    ("gpt", 1): """
        --softmax-type off-by-one
        --softmax-type learnable
        --window-size 8,0
        --window-size 8,0 --window-attn-skip-freq 2
        --qk-layernorm
        --qk-l2-norm
        --attention-output-gate
        --num-query-groups 1
        --rotary-percent 0.5 --rotary-interleaved
        --rotary-base 500000 --use-rope-scaling --rope-scaling-factor 8.0
        --use-cpu-initialization
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
        --recompute-granularity full --recompute-method block --recompute-num-layers 1
        --recompute-activations
        --bf16 --use-distributed-optimizer
        --bf16 --accumulate-allreduce-grads-in-fp32
        --bf16 --grad-reduce-in-bf16 --use-precision-aware-optimizer --exp-avg-dtype bf16
        --optimizer adam --fp16
        --optimizer adam --fp16 --initial-loss-scale 65536 --loss-scale-window 500 --hysteresis 2
        --optimizer adam --decoupled-lr 1e-2 --decoupled-min-lr 1e-3
        --decoupled-lr 1e-2
        --calculate-per-token-loss
        --cross-entropy-loss-fusion
        --reset-position-ids --reset-attention-mask --eod-mask-loss
        --no-create-attention-mask-in-dataloader
        --exit-interval 1
        --deterministic-mode
        --log-params-norm
        --log-num-zeros-in-grad
        --log-params-norm --log-num-zeros-in-grad --use-distributed-optimizer --bf16
        --log-throughput --log-progress
        --timing-log-level 2 --log-timers-to-tensorboard
        --empty-unused-memory-level 2
        --no-check-for-nan-in-loss-and-grad
        --check-for-spiky-loss
        --check-weight-hash-across-dp-replicas-interval 1
        --distributed-backend nccl
        --disable-gloo-process-groups
        --transformer-impl transformer_engine
        --attention-backend unfused
        --attention-backend local --spec local
        --te-rng-tracker --inference-rng-tracker
        --lr-warmup-fraction 0.1 --lr-decay-style WSD --lr-wsd-decay-iters 1
        --start-weight-decay 0.01 --end-weight-decay 0.1 --weight-decay-incr-style linear
        --add-qkv-bias
        --hidden-dropout 0.1 --attention-dropout 0.1
        --hidden-dropout 0.1 --attention-dropout 0.1 --recompute-granularity full \
            --recompute-method uniform --recompute-num-layers 1
        --use-mup
        --use-mup --mup-base-hidden-size 32
        --bf16 --fp32-residual-connection --recompute-granularity selective --recompute-modules layernorm core_attn
        --profile --use-pytorch-profiler --tensorboard-dir TMP
        --save TMP --save-interval 1 --async-save --ckpt-fully-parallel-save --ckpt-assume-constant-structure
    """,
    ("gpt", 2): """
        --softmax-type learnable --tensor-model-parallel-size 2
        --use-cpu-initialization --tensor-model-parallel-size 2
        --tensor-model-parallel-size 2 --recompute-granularity full --recompute-method uniform \
            --recompute-num-layers 1 --distribute-saved-activations
        --tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective \
            --recompute-modules layernorm core_attn mlp
        --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --optimizer adam --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --optimizer adam --bf16 --overlap-grad-reduce
        --bf16 --ddp-average-in-collective
        --bf16 --ddp-average-in-collective --use-distributed-optimizer --optimizer adam
        --bf16 --ddp-num-buckets 2
        --bf16 --ddp-pad-buckets-for-high-nccl-busbw --use-distributed-optimizer
        --bf16 --num-distributed-optimizer-instances 2 --use-distributed-optimizer --optimizer adam
        --cross-entropy-loss-fusion --cross-entropy-fusion-impl native --tensor-model-parallel-size 2
        --check-weight-hash-across-dp-replicas-interval 1
        --tp-comm-overlap --tensor-model-parallel-size 2 --sequence-parallel
        --tensor-model-parallel-size 2 --sequence-parallel --bf16
        --context-parallel-size 2
        --context-parallel-size 2 --cp-comm-type a2a
        --context-parallel-size 2 --cp-comm-type all_gather
        --context-parallel-size 2 --hierarchical-context-parallel-sizes 1 2 --cp-comm-type a2a+p2p
        --pipeline-model-parallel-size 2
        --pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1
        --pipeline-model-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 2
        --pipeline-model-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 2 \
            --overlap-p2p-communication-warmup-flush
        --pipeline-model-parallel-size 2 --num-layers 3 --decoder-first-pipeline-num-layers 1
        --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tL
        --pipeline-model-parallel-size 2 --no-align-grad-reduce --use-tp-pp-dp-mapping
        --mtp-num-layers 1 --pipeline-model-parallel-size 2
    """,
    ("plain", 1): """
        --apply-query-key-layer-scaling --fp16 --optimizer adam
        --apply-query-key-layer-scaling --attention-softmax-in-fp32
        --attention-softmax-in-fp32 --bf16
        --position-embedding-type none
        --position-embedding-type learned_absolute
        --position-embedding-type yarn
        --group-query-attention --num-query-groups 2 --bf16
    """,
    ("experts", 2): """
        --tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective \
            --recompute-modules moe layernorm
        --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall \
            --moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap
        --expert-model-parallel-size 2 --moe-token-dispatcher-type allgather
        --tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel \
            --moe-token-dispatcher-type alltoall --moe-expert-capacity-factor 1.0
    """,
    ("experts", 1): """
        --moe-router-load-balancing-type sinkhorn
        --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01
        --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.01
        --moe-router-load-balancing-type quantile_balancing
        --moe-router-score-function sigmoid --moe-router-dtype fp64 --bf16
        --moe-z-loss-coeff 1e-3
        --moe-input-jitter-eps 1e-2
        --moe-router-topk 1 --moe-router-pre-softmax
        --moe-router-topk 1 --moe-apply-probs-on-input --moe-router-pre-softmax
        --moe-expert-capacity-factor 1.0 --moe-token-dispatcher-type alltoall
        --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity --moe-token-dispatcher-type alltoall
        --moe-expert-capacity-factor 1.0 --moe-token-drop-policy position --moe-token-dispatcher-type alltoall
        --moe-shared-expert-intermediate-size 32 --moe-token-dispatcher-type alltoall
        --moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap --moe-token-dispatcher-type alltoall
        --moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate
        --moe-layer-freq ([0]*1+[1]*1)
        --moe-per-layer-logging --moe-aux-loss-coeff 0.01
        --moe-grouped-gemm --moe-permute-fusion --moe-router-fusion --moe-token-dispatcher-type alltoall \
            --moe-aux-loss-coeff 0.01
        --moe-mlp-glu-interleave-size 8
        --moe-router-force-load-balancing
        --moe-grouped-gemm --moe-permute-fusion --moe-router-fusion --moe-latent-size 32 \
            --moe-shared-expert-intermediate-size 32
        --mtp-num-layers 1
    """,
    ("latent", 1): """
        --qk-layernorm
        --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-grouped-gemm --qk-layernorm
        --rotary-scaling-factor 40 --mscale 1.0 --mscale-all-dim 1.0 --rope-type yarn
        --rope-type rope
        --mla-down-proj-fusion
        --mtp-num-layers 2 --mtp-loss-scaling-factor 0.3
    """,
    ("hybrid", 1): """
        --mtp-num-layers 1 --recompute-granularity selective --recompute-modules gdn_norm_out
        --bf16 --fp32-residual-connection
    """,
}
"""By model and ranks: flags that train; TMP is a folder."""

FAST = ("--bf16 --fp32-residual-connection --recompute-granularity selective", "--mtp-num-layers 1 --pipeline")
"""How those begin that ``make test`` runs."""

REFUSED = {
    "--moe-grouped-gemm --recompute-granularity selective --recompute-modules layernorm moe_act": "moe_act on the CPU",
    "--moe-grouped-gemm --moe-single-grouped-weight": "grouped experts of TransformerEngine",
    "--experimental-attention-variant dsa": "DeepSeek's sparse attention",
    "--hybrid-layer-pattern MD": "DeepSeek's sparse attention",
    "--profile": "add --use-pytorch-profiler",
    "--defer-embedding-wgrad-compute": "gradient accumulation fusion",
    "--init-model-with-meta-device": "leave the flag out",
    "--fp8-format hybrid": "--fp8-format hybrid on the CPU",
    "--attention-backend flash": "use --attention-backend auto or unfused",
    "--cuda-graph-impl local": "--cuda-graph-impl none",
    "--optimizer-cuda-graph": "CUDA graphs need a GPU; leave the flag out",
    "--moe-token-dispatcher-type flex": "alltoall or allgather",
    "--position-embedding-type relative": "--position-embedding-type rope",
}


def run(model: str, flags: str, ranks: int = 1) -> launch.Result:
    script = "pretrain_hybrid.py" if model == "hybrid" else "pretrain_gpt.py"
    return launch.launch(f"examples/{script}", *MODELS[model].split(), *flags.split(), ranks=ranks)


def cases() -> list[Any]:
    found = []
    for (model, ranks), lines in TRAIN.items():
        for flags in filter(None, map(str.strip, lines.splitlines())):
            marks = () if flags.startswith(FAST) else pytest.mark.slow
            found.append(pytest.param(model, ranks, flags, marks=marks, id=f"{model}-{ranks} {flags}"))
    return found


@pytest.mark.parametrize(("model", "ranks", "flags"), cases())
def test_it_trains(tmp_path: Path, model: str, ranks: int, flags: str) -> None:
    output = launch.check(run(model, flags.replace("TMP", str(tmp_path)), ranks))
    losses = [float(line.split("lm loss:")[1].split("|")[0]) for line in output.splitlines() if "lm loss:" in line]
    if "--fp16" in flags and "loss-scale" not in flags:
        assert losses == []  # both steps only halve the loss scale
    else:
        assert all(map(math.isfinite, losses)) and losses[-1] <= losses[0] < 6


@pytest.mark.parametrize(
    "flags", [pytest.param(each, marks=() if "moe_act" in each else pytest.mark.slow) for each in REFUSED]
)
def test_it_is_refused(flags: str) -> None:
    result = run("experts", flags)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert REFUSED[flags] in result.stderr

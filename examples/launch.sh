#!/usr/bin/env bash
# Train what a file of flags describes; further flags override the file's.
#
#   examples/launch.sh examples/jobs/dense.args                   # small, with made-up data, on GPUs or on CPU processes
#   NNODES=8 NODE_RANK=3 MASTER_ADDR=node0 examples/launch.sh examples/models/llama3_8b.args --train-data-path ... --save ...
#
# Look first at what it will do, without GPUs: python -m megatron_muon plan --model FILE
#
#   NPROC_PER_NODE   processes on this node; otherwise as many as the file's plan has, 8 at most
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   of a run on several nodes
#   SCRIPT           the training script, examples/pretrain_gpt.py otherwise
#   PYTHON           the interpreter, python3 otherwise
set -euo pipefail
set -f # patterns and layouts have * and |
file=${1:?a file of flags, such as examples/jobs/dense.args}
shift
world=$(sed -n 's/^# plan:.*--world-size \([0-9]*\).*/\1/p' "$file")
nodes=${NNODES:-1}
ranks=${NPROC_PER_NODE:-$((world < 8 ? world : 8))}
meet=(--standalone)
if [ "$nodes" -gt 1 ]; then
    meet=(--node-rank "${NODE_RANK:?of this node}" --master-addr "${MASTER_ADDR:?a node}" --master-port "${MASTER_PORT:-29500}")
fi
# shellcheck disable=SC2046
exec "${PYTHON:-python3}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" "${meet[@]}" -m megatron_muon run \
    "${SCRIPT:-$(dirname "$0")/pretrain_gpt.py}" $(grep -v '^#' "$file") "$@"

"""``python -m megatron_muon plan``: published models, and what a plan tells of a run."""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_muon.errors import ConfigError
from megatron_muon.planning.flags import read_flags
from tests.launch import launch
from tests.megatron.planner import GROUPS, MODELS, TINY, Planner

ROOT = Path(__file__).parents[2]

DEEPSEEK_ROUTER_BIASES = 58 * 256
"""Published with the weights; buffers in Megatron-Core."""

PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_next_80b_a3b": 79_674_391_296,
    "deepseek_v3": 671_026_419_200 - DEEPSEEK_ROUTER_BIASES,
    "nemotron_h_8b": 8_100_852_736,
}

MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "megatron_muon", *sys.argv[2:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
json.dump({"seconds": used.ru_utime + used.ru_stime, "bytes": used.ru_maxrss * 1024}, open(sys.argv[1], "w"))
sys.exit(done.returncode)
"""
"""A process that has no children but one."""

QUICK = ("deepseek_v3",)
SLOW = sorted(PUBLISHED.keys() - set(QUICK))

Published = Callable[[str], tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def published(planner: Planner, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The plan of a file of examples/models, as a document and as text, made once."""

    @functools.cache
    def of_model(model: str) -> tuple[dict[str, Any], str]:
        path = tmp_path_factory.mktemp(model) / "plan.json"
        outcome = planner.command(["--model", str(MODELS / f"{model}.args"), "--json", str(path)])
        assert (outcome.code, outcome.errors) == (0, "")
        return json.loads(path.read_text()), outcome.text

    return of_model


@pytest.mark.slow
def test_the_largest_is_planned_quickly_and_in_little_memory(published: Published, tmp_path: Path) -> None:
    """As a user starts it; time is the processor's, whatever else the machine does."""
    usage = tmp_path / "usage.json"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(usage), "plan", "--model", str(MODELS / "deepseek_v3.args")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == published("deepseek_v3")[1]
    used = json.loads(usage.read_text())
    assert used["seconds"] < 60
    assert used["bytes"] < 4e9


def test_every_file_has_its_published_total() -> None:
    assert {path.stem for path in MODELS.iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("model", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_published_models(published: Published, model: str) -> None:
    document, text = published(model)
    assert document["total_parameters"] == PUBLISHED[model]
    assert f"{PUBLISHED[model]:,} parameters" in text
    check_consistency(document)


def check_consistency(document: dict[str, Any]) -> None:
    main = [entry for entry in document["classes"] if not entry["pattern"].startswith("mtp.")]
    assert sum(entry["parameters"] for entry in main) == document["total_parameters"]
    assert sum(document["by_optimizer"].values()) == document["total_parameters"]
    for entry in document["classes"]:
        if entry["optimizer"] == "muon":
            each = sum(block["count"] * block["rows"] * block["columns"] for block in entry["blocks"])
            assert each * entry["count"] == entry["parameters"], entry["pattern"]
            # What the Triton kernels are compiled for in tests/unit/test_triton_compiled.py.
            assert all(block["rows"] % 16 == block["columns"] % 16 == 0 for block in entry["blocks"])
            assert all(block["scale_factor"] > 0 for block in entry["blocks"] if block["rule"] == "orthogonalize")
        else:
            assert entry["reason"] and not entry["blocks"] and entry["rule"] == "scalar"
    assert matrices_of_choices(document) == matrices_of_classes(document)
    assert document["all_ranks"]["ranks"] == document["layout"]["world"]
    assert 0 < document["step"]["optimizer_share"] < 1


def matrices_of_classes(document: dict[str, Any]) -> dict[tuple[int, int], int]:
    """How many matrices of each shape the table has, multi-token prediction included."""
    found: Counter[tuple[int, int]] = Counter()
    for entry in document["classes"]:
        for block in entry["blocks"]:
            if block["rule"] == "orthogonalize":
                found[block["rows"], block["columns"]] += entry["count"] * block["count"]
    return found


def matrices_of_choices(document: dict[str, Any]) -> dict[tuple[int, int], int]:
    """The same of what mode auto treats in any way."""
    found: Counter[tuple[int, int]] = Counter()
    for choice in document["auto"]:
        found[choice["rows"], choice["columns"]] += choice["matrices"]
    return found


def test_hybrid_is_routed_as_documented(published: Published) -> None:
    """What each kind of weight is; the numbers follow from the published configuration."""
    classes = {entry["pattern"]: entry for entry in published("qwen3_next_80b_a3b")[0]["classes"]}
    experts = classes["decoder.layers.*.mlp.experts.local_experts.*.linear_fc2.weight"]
    assert (experts["count"], experts["shape"], experts["optimizer"]) == (48 * 512, [2048, 512], "muon")
    qkv = classes["decoder.layers.*.self_attention.linear_qkv.weight"]
    assert qkv["count"] == 12 and qkv["divided"] == "rows / 2"
    assert [(block["name"], block["rows"]) for block in qkv["blocks"]] == [
        ("q", 4096),
        ("gate", 4096),
        ("k", 512),
        ("v", 512),
    ]
    assert classes["embedding.word_embeddings.weight"]["optimizer"] == "adam"


def test_multi_token_prediction_counts_apart(published: Published) -> None:
    """eh_proj, one MoE layer with its attention, and three norms."""
    document, _ = published("deepseek_v3")
    attention = 1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 128 * 256 * 512 + 7168 * 128 * 128 + 1536 + 512
    experts = 257 * 3 * 2048 * 7168 + 256 * 7168
    assert document["multi_token_prediction"]["total_parameters"] == (
        2 * 7168 * 7168 + attention + experts + 2 * 7168 + 3 * 7168
    )


def test_settings_of_gpus_do_not_matter(planner: Planner) -> None:
    """Neither do they enter the plan, nor does the CPU runtime, which builds the model, refuse them."""
    flags = [
        *TINY,
        *GROUPS,
        "--bf16",
        "--fp8-format",
        "hybrid",
        "--attention-backend",
        "flash",
        "--cuda-graph-impl",
        "local",
        "--optimizer-cuda-graph",
    ]
    document = planner.document([*flags, "--context-parallel-size", "2"], 4)
    assert document["left_out"] == [
        "--fp8-format hybrid",
        "--optimizer-cuda-graph",
        "--cuda-graph-impl local",
        "--attention-backend flash",
    ]
    assert (document["layout"]["context"], document["layout"]["data"]) == (2, 4)


def test_a_shared_embedding_counts_once(planner: Planner) -> None:
    """It is on the first and the last stage, takes memory on both, and is one weight."""
    flags = [flag for flag in [*TINY, *GROUPS] if flag != "--untie-embeddings-and-output-weights"]
    one = planner.document(flags, 1)
    two = planner.document([*flags, "--pipeline-model-parallel-size", "2"], 2)
    assert one["total_parameters"] == two["total_parameters"]
    assert one["step"] == {**two["step"], "model_flops_per_rank": 2 * two["step"]["model_flops_per_rank"]} | {
        "optimizer_share": one["step"]["optimizer_share"]
    }
    assert sum(stage["parameters"] for stage in two["stages"]) == one["total_parameters"] + 64 * 32


def test_what_is_not_counted_is_told(planner: Planner) -> None:
    sphere = [*TINY, *GROUPS, "--optimizer", "spectral_sphere"]
    notes = planner.document(sphere, 1)["notes"]
    assert "orthogonalized 7 times in a step" in notes[-1] and "singular vectors" in notes[-1]
    divided = [*TINY, *GROUPS, "--optimizer", "adaptive_muon", "--tensor-model-parallel-size", "2"]
    notes = planner.document(divided, 2)["notes"]
    assert "second moments: adamuon, beta2 0.95" in notes[-2] and "Sums over whole matrices" in notes[-1]
    plain = planner.document([*TINY, *GROUPS], 1)["notes"]
    assert plain[1:] == ["momentum 0.95; weight decay decoupled", "weight decay 0.01"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "spectral_sphere --muon-scalar-optimizer lion",
            "--muon-scalar-optimizer lion with --optimizer spectral",
        ),
        ("stiefel_muon", "--optimizer stiefel_muon without a weight on the Stiefel manifold"),
        ("muon --muon-param-rule *.linear_qkv.weight=stiefel", "--muon-param-rule '*.linear_qkv.weight=stiefel' with"),
        ("muon --muon-sphere-radius 1", "--muon-sphere-radius 1.0 with --optimizer muon"),
        # What a plan leaves out is refused as well.
        ("muon --muon-offload momentum --optimizer-cuda-graph", "--muon-offload momentum with --optimizer-cuda-graph"),
        *(
            (f"muon --qk-clip --muon-qk-logits-interval 3 {graph}", f"{graph} with --muon-qk-logits-interval 3: a")
            for graph in ("--cuda-graph-impl local", "--enable-cuda-graph")
        ),
    ],
)
def test_what_training_refuses_is_not_planned(planner: Planner, flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        planner.document([*TINY, *GROUPS, "--optimizer", *flags.split()], 1)
    assert str(error.value).startswith(message)


def test_modes_that_cannot_be(planner: Planner) -> None:
    """Two query groups on four ranks: a shard does not hold a group. In bfloat16, Gram is not accurate."""
    flags = [*TINY, *GROUPS, "--tensor-model-parallel-size", "4"]
    document = planner.document(flags, 4)
    modes, reasons = document["tensor_parallel_modes"], document["modes_not_possible"]
    assert {mode for mode in modes if modes[mode] is None} == set(reasons) == {"blockwise", "gram"}
    assert "does not hold whole sections" in reasons["blockwise"] and "--muon-ns-dtype" in reasons["gram"]
    assert modes["duplicated"]["newton_schulz_flops"]["max"] > 0
    lines = planner.text(flags, 4).splitlines()
    assert all(reason in lines for reason in reasons.values())
    exact = planner.document([*flags, "--muon-ns-dtype", "fp32"], 4)
    assert set(exact["modes_not_possible"]) == {"blockwise"}
    with pytest.raises(ConfigError, match=r"^--muon-blockwise-period 5: a qkv weight .*\. Leave it out, or"):
        planner.document([*flags, "--muon-blockwise-period", "5"], 4)


def test_modes_of_large_matrices(planner: Planner) -> None:
    """A mode's figures are those of a plan that has chosen it; auto is a mix."""
    flags = [*read_flags(MODELS / "llama3_8b.args").flags, "--num-layers", "4"]
    auto = planner.document(flags, 2)
    assert auto["all_ranks"]["newton_schulz_flops"] == auto["tensor_parallel_modes"]["auto"]["newton_schulz_flops"]
    assert auto["newton_schulz"] == {"dtype": "bfloat16", "gram_restarts": None, "wire_dtype": "bfloat16"}
    for mode in ("owner", "distributed", "blockwise"):
        chosen = planner.document([*flags, "--muon-tp-mode", mode], 2)
        for name in ("tensor_parallel_modes", "auto"):
            assert chosen[name] == auto[name]
        busiest = chosen["all_ranks"]["newton_schulz_flops"]
        assert busiest == auto["tensor_parallel_modes"][mode]["newton_schulz_flops"]
    periodic = planner.document([*flags, "--muon-blockwise-period", "4"], 2)
    modes, period = periodic["tensor_parallel_modes"], periodic["blockwise_period"]
    assert modes == auto["tensor_parallel_modes"] and auto["blockwise_period"] is None and period["steps"] == 4
    for name in ("newton_schulz_flops", "exchanged_bytes", "collectives"):
        whole, block = (modes[mode][name]["mean"] for mode in ("auto", "blockwise"))
        assert period[name]["mean"] == pytest.approx((whole + 3 * block) / 4, rel=1e-12)
    text = planner.text([*flags, "--muon-blockwise-period", "4"], 2)
    assert "--muon-blockwise-period 4: one step in 4 as auto, the others as blockwise; on average" in text
    for choice in auto["auto"]:
        assert f"{choice['matrices']:,} of {choice['rows']} x {choice['columns']}" in text
    assert "auto (chosen)" in text and "Newton-Schulz in bfloat16, matrices sent in bfloat16" in text


SMALL = shlex.split("""
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --kv-channels 16
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --expert-model-parallel-size 1 --seq-length 32
    --max-position-embeddings 32 --global-batch-size 2 --vocab-size 127
""")
TRAINING = shlex.split("""
    --mock-data --tokenizer-type NullTokenizer --num-workers 0 --train-iters 1 --eval-iters 1 --eval-interval 10
    --log-interval 1
""")


def test_the_same_file_trains(planner: Planner) -> None:
    """A file of examples/models, made small, through the launcher: it trains, and its report is the plan's."""
    flags = [*read_flags(MODELS / "qwen3_30b_a3b.args").flags, *SMALL]
    table = planner.text(flags, 1).split("\n\n")[1].splitlines()[:-1]
    assert table[0].startswith("weight ") and table[-1].startswith("adam: ")
    result = launch("examples/pretrain_gpt.py", *flags, *TRAINING, ranks=1)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "iteration        1/" in result.stdout
    printed = result.stdout.splitlines()
    assert [line for line in table if line not in printed] == []

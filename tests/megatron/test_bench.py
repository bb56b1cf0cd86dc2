"""``python -m tools.bench`` as a user starts it: everything is there, and what can be known is right."""

from __future__ import annotations

import io
import json
import math
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

# The quick dense case: 2 layers of hidden size 64 (4 heads of 16 in 2 query groups) and 96 rows of gate and of up.
QUICK_DENSE = {"matrices": 14, "elements": 2 * (128 * 64 + 64 * 64 + 3 * 96 * 64)}
FLOAT32_BYTES = 4


def bench(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run the module on CPUs, as ``python -m`` does; the document and the text."""
    path, out, err = folder / "bench.json", io.StringIO(), io.StringIO()
    line = ["--quick", "--device", "cpu", "--threads", "1", "--json", str(path), *arguments]
    with mock.patch.object(sys, "argv", ["bench", *line]), redirect_stdout(out), redirect_stderr(err):
        runpy.run_module("tools.bench", run_name="__main__")
    assert all(text.startswith("bench: ") for text in err.getvalue().splitlines()), err.getvalue()
    return json.loads(path.read_text()), out.getvalue()


def named(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in case["contestants"]}


def check_case(case: dict[str, Any]) -> None:
    """Every number is there and can be."""
    assert case["rounds"] == 3
    assert case["gemm"]["flops_per_second_of_a_rank"] > 1e6
    for name in ("ratio_vs_upstream", "ratio_vs_adamw"):
        spread = case[f"{name}_spread"]
        assert 0 < spread["p10"] <= case[name] <= spread["p90"] < math.inf
    for each in case["contestants"]:
        seconds = each["seconds"]
        assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"] < 60
        assert len(seconds["rounds"]) == case["rounds"]
        assert each["peak_bytes"] > 0
        if each["name"] == "torch AdamW":
            assert each["error"] is None and each["product_dtype"] is None
            continue
        assert each["product_dtype"] == each["asked_dtype"]
        assert each["flops_of_all_ranks"] >= each["flops_of_busiest_rank"] > 0
        error = each["error"]
        assert 0 < error["mean"] <= error["worst"]
        if each["note"].startswith("another update"):
            assert error["bound"] is None and error["worst"] > 0.1
        else:
            assert error["worst"] <= error["bound"]
    ours = case["contestants"][0]
    assert 0 < ours["share_of_gemm_rate_needed"] < ours["share_of_gemm_rate"]
    assert ours["method"]["shapes"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dense", "fp32"),
        ("experts", "bf16"),
        pytest.param("dense", "bf16", marks=pytest.mark.slow),
        pytest.param("experts", "fp32", marks=pytest.mark.slow),
    ],
)
def test_one_process(tmp_path: Path, name: str, dtype: str) -> None:
    document, text = bench(tmp_path, "--case", name, "--tp", "1", "--dtype", dtype)
    assert document["complete"] and document["quick"] and document["left_out"] == []
    assert document["versions"]["torch"] and document["machine"]["cores"] >= 1
    layouts = [(case["name"], case["dtype"], case["tp"], case["ep"], case["ranks"]) for case in document["cases"]]
    assert layouts == [(name, dtype, 1, 1, 1)]
    for case in document["cases"]:
        check_case(case)
        names = set(named(case))
        assert {"megatron_muon auto", "megatron-core duplicated", "emerging_optimizers Muon", "torch AdamW"} <= names
        assert ("torch.optim.Muon" in names) == (case["dtype"] == "bf16")
        assert all(each["collectives"] == each["bytes_of_busiest_rank"] == 0 for each in case["contestants"])
        assert case["ratio_vs_upstream_distributed"] is None
        told = {each["name"]: each["predicted_seconds"] for each in case["contestants"]}
        assert {name for name, its in told.items() if its is not None} == {"megatron_muon auto"}
        assert told["megatron_muon auto"]["total"] > told["megatron_muon auto"]["products"] > 0
    if name == "dense":
        assert sum(block["count"] for block in document["cases"][0]["matrices_of_a_rank"]) == QUICK_DENSE["matrices"]
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.slow
def test_tensor_parallel(tmp_path: Path) -> None:
    document, text = bench(tmp_path, "--case", "dense", "--tp", "2", "--dtype", "fp32", "bf16")
    assert [(case["dtype"], case["tp"], case["ranks"]) for case in document["cases"]] == [
        ("fp32", 2, 2),
        ("bf16", 2, 2),
    ]
    for case in document["cases"]:
        check_case(case)
        assert case["backend"] == "gloo"
        found = named(case)
        assert ("megatron_muon gram" in found) == (case["dtype"] == "fp32")
        assert case["ratio_vs_upstream_distributed"] > 0
        # Each of two ranks sends its half once, in float32: one all-gather for each matrix, or one for all.
        half = QUICK_DENSE["elements"] // 2 * FLOAT32_BYTES
        upstream, ours = found["megatron-core duplicated"], found["megatron_muon duplicated"]
        assert (upstream["bytes_of_busiest_rank"], upstream["collectives"]) == (half, QUICK_DENSE["matrices"])
        # Outside Megatron-Core they compare first what they are about to do: 33 bytes each.
        assert ours["bytes_of_busiest_rank"] == 33 + (half if case["dtype"] == "fp32" else half // 2)
        assert ours["collectives"] == 2
        # Newton-Schulz of every matrix on both ranks, against one of them.
        share = found["megatron_muon owner"]["flops_of_all_ranks"] / ours["flops_of_all_ranks"]
        assert share == pytest.approx(0.5, abs=1e-9)
        assert found["megatron-core blockwise"]["bytes_of_busiest_rank"] == 0
    assert "== dense, bf16, TP 2" in text


MODEL = """
# A small mixture of experts, after one dense layer.
--num-layers 3 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope
--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 128
--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-layer-freq [0,1,1]
--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --bf16
--tensor-model-parallel-size 2 --expert-model-parallel-size 4 --optimizer muon
"""


@pytest.mark.slow
def test_model_with_expert_parallelism(tmp_path: Path) -> None:
    """Two of its layers, on two ranks that share the experts; the file's own sizes do not count."""
    file = tmp_path / "moe.args"
    file.write_text(MODEL)
    document, _ = bench(tmp_path, "--model", str(file), "--ep", "2", "--layers", "2", "--dtype", "fp32")
    (case,) = document["cases"]
    check_case(case)
    assert (case["name"], case["tp"], case["ep"], case["ranks"]) == ("moe", 1, 2, 2)
    attention = 2 * (64 * 32 + 32 * 32)
    assert case["parameters"] == attention + 3 * 48 * 32 + 4 * 32 + 4 * 3 * 16 * 32
    blocks = {(block["rows"], block["columns"]): block["count"] for block in case["matrices_of_a_rank"]}
    assert blocks[16, 32] == 2 * 2 + 2 * 2  # gate and up of two experts; k and v of both layers
    assert all(each["collectives"] == 0 for each in case["contestants"])

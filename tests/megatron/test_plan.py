"""``python -m megatron_muon plan``: published models, and agreement with real optimizers on ranks."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_muon import Muon
from megatron_muon.engine import MODES
from megatron_muon.engine.modes import Machine
from megatron_muon.errors import ConfigError
from megatron_muon.planning.flags import read_flags
from tests.launch import launch
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN, MLA
from tests.pool import RankPool

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples" / "models"

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

# A child with a fresh set of counters: its processor time and its memory, whatever else the machine does.
MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
json.dump({"seconds": used.ru_utime + used.ru_stime, "bytes": used.ru_maxrss * 1024}, open(sys.argv[1], "w"))
sys.exit(done.returncode)
"""


@dataclass
class Outcome:
    """Of one command."""

    code: int
    text: str
    errors: str
    document: dict[str, Any]
    seconds: float
    bytes: int


def plan(folder: Path, *arguments: str) -> Outcome:
    """Run the command line."""
    usage, document = folder / "usage.json", folder / "plan.json"
    command = [sys.executable, "-m", "megatron_muon", "plan", "--json", str(document), *arguments]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(usage), *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    used = json.loads(usage.read_text())
    content = json.loads(document.read_text()) if document.exists() else {}
    return Outcome(done.returncode, done.stdout, done.stderr, content, used["seconds"], used["bytes"])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """The plan of a file of examples/models, made once."""

    @functools.cache
    def outcome(model: str) -> Outcome:
        return plan(tmp_path_factory.mktemp(model), "--model", str(MODELS / f"{model}.args"))

    return outcome


def test_every_file_has_its_published_total() -> None:
    assert {path.stem for path in MODELS.iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_published_models(published: Callable[[str], Outcome], model: str) -> None:
    outcome = published(model)
    assert outcome.code == 0, outcome.errors
    assert outcome.errors == ""
    document = outcome.document
    assert document["total_parameters"] == PUBLISHED[model]
    assert f"{PUBLISHED[model]:,} parameters" in outcome.text
    assert outcome.seconds < 60, "processor time"
    assert outcome.bytes < 4e9
    check_consistency(document)


def check_consistency(document: dict[str, Any]) -> None:
    main = [entry for entry in document["classes"] if not entry["pattern"].startswith("mtp.")]
    assert sum(entry["parameters"] for entry in main) == document["total_parameters"]
    assert sum(document["by_optimizer"].values()) == document["total_parameters"]
    for entry in document["classes"]:
        if entry["optimizer"] == "muon":
            each = sum(block["count"] * block["rows"] * block["columns"] for block in entry["blocks"])
            assert each * entry["count"] == entry["parameters"], entry["pattern"]
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


def test_hybrid_is_routed_as_documented(published: Callable[[str], Outcome]) -> None:
    """What each kind of weight is; the numbers follow from the published configuration."""
    classes = {entry["pattern"]: entry for entry in published("qwen3_next_80b_a3b").document["classes"]}
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


def test_multi_token_prediction_counts_apart(published: Callable[[str], Outcome]) -> None:
    """eh_proj, one MoE layer with its attention, and three norms."""
    document = published("deepseek_v3").document
    attention = 1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 128 * 256 * 512 + 7168 * 128 * 128 + 1536 + 512
    experts = 257 * 3 * 2048 * 7168 + 256 * 7168
    assert document["multi_token_prediction"]["total_parameters"] == (
        2 * 7168 * 7168 + attention + experts + 2 * 7168 + 3 * 7168
    )


def test_arguments_override_the_file(tmp_path: Path) -> None:
    arguments = ["--num-layers", "4", "--tensor-model-parallel-size", "4", "--muon-no-split-qkv", "--tokens", "1000"]
    document = plan(tmp_path, "--model", str(MODELS / "llama3_8b.args"), "--world-size", "8", *arguments).document
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096
    assert document["total_parameters"] == 4 * layer + 2 * 128256 * 4096 + 4096
    assert (document["layout"]["world"], document["layout"]["tensor"], document["layout"]["data"]) == (8, 4, 2)
    qkv = next(entry for entry in document["classes"] if "linear_qkv" in entry["pattern"])
    assert [block["rows"] for block in qkv["blocks"]] == [6144]
    assert document["step"]["tokens"] == 1000


TINY = shlex.split("""
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --kv-channels 8 --ffn-hidden-size 48 --swiglu
    --disable-bias-linear --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
    --vocab-size 64 --make-vocab-size-divisible-by 8 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --global-batch-size 4 --optimizer muon
""")
GROUPS = ["--group-query-attention", "--num-query-groups", "2"]
EXPERTS = shlex.split(
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-token-dispatcher-type allgather"
)
EXPERT_MODEL = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_grouped_gemm": False}
DELTA = shlex.split("""
    --experimental-attention-variant gated_delta_net --linear-attention-freq 2 --linear-conv-kernel-dim 4
    --linear-key-head-dim 8 --linear-value-head-dim 8 --linear-num-key-heads 2 --linear-num-value-heads 4
    --attention-output-gate
""")
LATENT = shlex.split("""
    --multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8
    --qk-layernorm --rope-type rope
""")


@pytest.fixture(scope="module")
def planner() -> Iterator[ProcessPoolExecutor]:
    """A process that plans: imports are paid once."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        yield executor


def document_of(flags: list[str], world: int) -> dict[str, Any]:
    """Runs in the planner."""
    from megatron_muon.planning.document import to_document
    from megatron_muon.planning.survey import make_plan

    install()
    return to_document(make_plan(flags, world))


def test_unknown_flag_ends_the_command(tmp_path: Path) -> None:
    outcome = plan(tmp_path, "--model", str(MODELS / "llama3_8b.args"), "--hiden-size", "64")
    assert outcome.code == 2
    assert outcome.errors == (
        "megatron_muon plan: error: unrecognized arguments: --hiden-size 64. "
        "Give Megatron's flags as a training run takes them.\n"
    )


def failure_of(arguments: list[str]) -> tuple[Any, str]:
    """Runs in the planner: exit code and what is printed to stderr."""
    from megatron_muon import cli

    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(["plan", *arguments])
        except SystemExit as end:
            return end.code, stderr.getvalue()
    return 0, stderr.getvalue()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", ["--model"]),
        ("--model no/such.args", ["--model no/such.args", "No such file", "examples/models"]),
        ("--model {llama} --hidden-size many", ["--hidden-size", "many"]),
        ("--model {llama} --world-size 6 --tensor-model-parallel-size 4", ["--world-size 6", "multiple of 4"]),
        ("--model {llama} --tensor-model-parallel-size 0", ["--tensor-model-parallel-size 0", "at least 1"]),
        ("--model {llama} --pipeline-model-parallel-size 3 --world-size 6", ["layers", "pipeline"]),
        ("--model {llama} --tensor-model-parallel-size 64", ["num_attention_heads (32)", "tensor_model_parallel_size"]),
        ("--model {llama} --optimizer adam", ["--optimizer adam", "--optimizer muon"]),
        ("--model {llama} --muon-num-ns-steps 0", ["--muon-num-ns-steps 0"]),
        ("--model {llama} --muon-param-rule *.no_such=adam", ["--muon-param-rule '*.no_such=adam'"]),
        ("--model {llama} --use-checkpoint-args", ["--use-checkpoint-args"]),
        ("--model {llama} --num-layers 2 --json no/such/plan.json", ["--json no/such/plan.json", "No such file"]),
        ("--model {own} --num-layers 2", ["--model", "--model-size 3"]),
        ("--optimizer muon --num-layers 2", ["assert", "args.micro_batch_size"]),
        ("{tiny} --global-batch-size 3 --world-size 2", ["global_batch_size (3)"]),
        (
            "{tiny} --tensor-model-parallel-size 4 --muon-tp-mode blockwise",
            ["--muon-tp-mode blockwise", "16 rows on each"],
        ),
        ("{tiny} --muon-tp-mode gram --muon-ns-dtype fp16 --muon-coefficient-type aol", ["Use --muon-ns-dtype"]),
    ],
)
def test_errors_name_the_flag(
    planner: ProcessPoolExecutor, tmp_path: Path, arguments: str, expected: list[str]
) -> None:
    own = tmp_path / "own.args"
    own.write_text("# plan: --model-size 3\n")
    line = arguments.format(llama=MODELS / "llama3_8b.args", own=own, tiny=shlex.join([*TINY, *GROUPS]))
    code, message = planner.submit(failure_of, shlex.split(line)).result()
    assert code == 2
    assert all(part in message for part in expected), message
    assert "Traceback" not in message
    assert len(message) < 1000, "Megatron's own usage is longer than a screen"


def test_a_file_of_flags(planner: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Any number of flags a line, comments, quotes, options of the plan; the command line comes last."""
    path = tmp_path / "tiny.args"
    path.write_text(
        "# a tiny model\n# plan: --world-size 4 --tokens 12\n" + " ".join([*TINY, *GROUPS]) + "\n\n--swiglu\n"
    )
    code, message = planner.submit(failure_of, ["--model", str(path), "--json", str(tmp_path / "1.json")]).result()
    assert (code, message) == (0, "")
    document = json.loads((tmp_path / "1.json").read_text())
    assert (document["layout"]["world"], document["step"]["tokens"]) == (4, 12)
    again = ["--model", str(path), "--world-size", "2", "--json", str(tmp_path / "2.json"), "--num-layers", "2"]
    assert planner.submit(failure_of, again).result() == (0, "")
    document = json.loads((tmp_path / "2.json").read_text())
    assert (document["layout"]["world"], document["step"]["tokens"]) == (2, 12)
    layer = next(entry for entry in document["classes"] if "linear_fc2" in entry["pattern"])
    assert layer["count"] == 2


def test_settings_of_gpus_do_not_matter(planner: ProcessPoolExecutor) -> None:
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
    ]
    document = planner.submit(document_of, [*flags, "--context-parallel-size", "2"], 4).result()
    assert document["left_out"] == [
        "--fp8 hybrid",
        "--cuda-graph-impl local",
        "--attention-backend flash",
    ]
    assert (document["layout"]["context"], document["layout"]["data"]) == (2, 4)


def test_a_shared_embedding_counts_once(planner: ProcessPoolExecutor) -> None:
    """It is on the first and the last stage, takes memory on both, and is one weight."""
    flags = [flag for flag in [*TINY, *GROUPS] if flag != "--untie-embeddings-and-output-weights"]
    one = planner.submit(document_of, flags, 1).result()
    two = planner.submit(document_of, [*flags, "--pipeline-model-parallel-size", "2"], 2).result()
    assert one["total_parameters"] == two["total_parameters"]
    assert one["step"] == {**two["step"], "model_flops_per_rank": 2 * two["step"]["model_flops_per_rank"]} | {
        "optimizer_share": one["step"]["optimizer_share"]
    }
    assert sum(stage["parameters"] for stage in two["stages"]) == one["total_parameters"] + 64 * 32


def test_what_is_not_counted_is_told(planner: ProcessPoolExecutor) -> None:
    sphere = [*TINY, *GROUPS, "--optimizer", "spectral_sphere"]
    notes = planner.submit(document_of, sphere, 1).result()["notes"]
    assert "orthogonalized 7 times in a step" in notes[-1] and "singular vectors" in notes[-1]
    divided = [*TINY, *GROUPS, "--optimizer", "adaptive_muon", "--tensor-model-parallel-size", "2"]
    notes = planner.submit(document_of, divided, 2).result()["notes"]
    assert "second moments: adamuon, beta2 0.95" in notes[-2] and "Sums over whole matrices" in notes[-1]
    plain = planner.submit(document_of, [*TINY, *GROUPS], 1).result()["notes"]
    assert len(plain) == 2 and plain[1] == "momentum 0.95; weight decay 0.01 (decoupled)"


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
    ],
)
def test_what_training_refuses_is_not_planned(planner: ProcessPoolExecutor, flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        planner.submit(document_of, [*TINY, *GROUPS, "--optimizer", *flags.split()], 1).result()
    assert str(error.value).startswith(message)


def test_modes_that_cannot_be(planner: ProcessPoolExecutor) -> None:
    """Two query groups on four ranks: a shard does not hold a group. In bfloat16, Gram is not accurate."""
    flags = [*TINY, *GROUPS, "--tensor-model-parallel-size", "4"]
    document = planner.submit(document_of, flags, 4).result()
    modes, reasons = document["tensor_parallel_modes"], document["modes_not_possible"]
    assert {mode for mode in modes if modes[mode] is None} == set(reasons) == {"blockwise", "gram"}
    assert "does not hold whole sections" in reasons["blockwise"] and "--muon-ns-dtype" in reasons["gram"]
    assert modes["duplicated"]["newton_schulz_flops"]["max"] > 0
    lines = planner.submit(text_of, flags, 4).result().splitlines()
    assert all(reason in lines for reason in reasons.values())
    exact = planner.submit(document_of, [*flags, "--muon-ns-dtype", "fp32"], 4).result()
    assert set(exact["modes_not_possible"]) == {"blockwise"}


def test_modes_of_large_matrices(planner: ProcessPoolExecutor) -> None:
    """A mode's figures are those of a plan that has chosen it; auto is a mix."""
    flags = [*read_flags(MODELS / "llama3_8b.args").flags, "--num-layers", "4"]
    auto = planner.submit(document_of, flags, 2).result()
    assert auto["all_ranks"]["newton_schulz_flops"] == auto["tensor_parallel_modes"]["auto"]["newton_schulz_flops"]
    assert auto["newton_schulz"] == {"dtype": "bfloat16", "gram_restarts": None, "wire_dtype": "bfloat16"}
    for mode in ("owner", "distributed", "blockwise"):
        chosen = planner.submit(document_of, [*flags, "--muon-tp-mode", mode], 2).result()
        for name in ("tensor_parallel_modes", "auto"):
            assert chosen[name] == auto[name]
        busiest = chosen["all_ranks"]["newton_schulz_flops"]
        assert busiest == auto["tensor_parallel_modes"][mode]["newton_schulz_flops"]
    text = planner.submit(text_of, flags, 2).result()
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


def test_the_same_file_trains(planner: ProcessPoolExecutor) -> None:
    """A file of examples/models, made small, through the launcher: it trains, and its report is the plan's."""
    flags = [*read_flags(MODELS / "qwen3_30b_a3b.args").flags, *SMALL]
    table = planner.submit(text_of, flags, 1).result().split("\n\n")[1].splitlines()[:-1]
    assert table[0].startswith("weight ") and table[-1].startswith("adam: ")
    result = launch("examples/pretrain_gpt.py", *flags, *TRAINING, ranks=1)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "iteration        1/" in result.stdout
    printed = result.stdout.splitlines()
    assert [line for line in table if line not in printed] == []


def text_of(flags: list[str], world: int) -> str:
    """Runs in the planner."""
    from megatron_muon.planning.survey import make_plan
    from megatron_muon.planning.text import render

    install()
    return render(make_plan(flags, world))


def install() -> None:
    import megatron_muon
    from megatron_muon import cpu

    cpu.install()
    megatron_muon.install()


@dataclass
class Measured:
    """Of one rank.

    Attributes:
        parameter_bytes: of its weights.
        state_bytes: of its optimizer state.
        flops: of one real step, by torch's count.
        counted_flops: by the engines' counters.
        bytes: sent to other ranks, likewise.
        collectives: likewise.
    """

    parameter_bytes: int
    state_bytes: int
    flops: int
    counted_flops: int
    bytes: float
    collectives: int


def measured(layout: Layout, bf16: bool, options: dict[str, Any]) -> Measured:
    """Runs on a rank: what it holds, and what it does in one real step."""
    # A plan is for an accelerator: mode auto must weigh operations and bytes by its rates here too.
    with mock.patch.object(Machine, "of", return_value=Machine.of("cuda")):
        run = harness.start(layout, bf16=bf16, **options)
        run.losses(1)
    for chunk in run.chunks:
        for param in chunk.parameters():
            param.main_grad = torch.ones_like(param, dtype=torch.float32)
    for muon in muons(run.optimizer):
        muon.prepare()
    engines = [engine for muon in muons(run.optimizer) for engine in muon.engines]
    for engine in engines:
        engine.counters.reset()
    with FlopCounterMode(display=False) as counter:
        run.optimizer.step()
    return Measured(
        sum(param.numel() * param.element_size() for chunk in run.chunks for param in chunk.parameters()),
        state_bytes(run.optimizer, bf16),
        counter.get_total_flops(),
        sum(engine.counters.flops for engine in engines),
        sum(engine.counters.bytes for engine in engines),
        sum(engine.counters.collectives for engine in engines),
    )


def muons(optimizer: Any) -> list[Muon]:
    """All instances in an optimizer of Megatron's."""
    if hasattr(optimizer, "chained_optimizers"):
        return [muon for part in optimizer.chained_optimizers for muon in muons(part)]
    return [optimizer.optimizer] if isinstance(optimizer.optimizer, Muon) else []


def state_bytes(optimizer: Any, main_copies: bool) -> int:
    """Moments, and main copies where they are not the model's own weights."""
    if hasattr(optimizer, "chained_optimizers"):
        return sum(state_bytes(part, main_copies) for part in optimizer.chained_optimizers)
    inner = optimizer.optimizer
    tensors = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    tensors = [tensor for tensor in tensors if tensor.dim() > 0]  # not Adam's count of steps
    if main_copies:
        tensors += [param for group in inner.param_groups for param in group["params"]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_mode(mode: str, ranks: int) -> tuple[list[str], dict[str, Any]]:
    """Flags of the plan, and options of the run, for a mode of tensor parallelism; in float32, which all modes do."""
    flags = ["--tensor-model-parallel-size", str(ranks), "--muon-tp-mode", mode]
    return flags, {"optimizer": {"muon_tp_mode": mode, "muon_fp32_matmul_prec": "highest"}}


def variant(name: str, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """Flags of the plan, and options of the run."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return ["--optimizer", name, *flags], {"optimizer": {"name": name, **options}}


STIEFEL_FLAGS, STIEFEL_OPTIONS = variant("stiefel_muon", muon_param_rule="*.linear_qkv.weight=stiefel")
STIEFEL_OPTIONS["optimizer"]["muon_param_rule"] = ("*.linear_qkv.weight=stiefel",)
ADAMUON_FLAGS, ADAMUON_OPTIONS = variant("adaptive_muon", adaptive_muon_moment2_method="adamuon")

CASES = {
    "plain": (Layout(), 1, [], {}),
    "adamuon": (Layout(), 1, ADAMUON_FLAGS, ADAMUON_OPTIONS),
    "adamuon, layer-wise": (
        Layout(layer_wise=True),
        2,
        [*ADAMUON_FLAGS, "--use-distributed-optimizer"],
        ADAMUON_OPTIONS,
    ),
    "normuon": (Layout(), 1, *variant("adaptive_muon", adaptive_muon_moment2_method="normuon")),
    "manifold": (Layout(), 1, STIEFEL_FLAGS, STIEFEL_OPTIONS),
    "manifold, tensor": (Layout(tp=2), 2, ["--tensor-model-parallel-size", "2", *STIEFEL_FLAGS], STIEFEL_OPTIONS),
    "manifold, layer-wise": (
        Layout(layer_wise=True),
        2,
        [*STIEFEL_FLAGS, "--use-distributed-optimizer"],
        STIEFEL_OPTIONS,
    ),
    **{f"tensor {mode}": (Layout(tp=2), 2, *in_mode(mode, 2)) for mode in MODES},
    "four tensor-parallel ranks": (Layout(tp=4), 4, ["--tensor-model-parallel-size", "4"], {}),
    "cut query groups, owner": (Layout(tp=4), 4, *in_mode("owner", 4)),
    "pipeline": (Layout(pp=2), 2, ["--pipeline-model-parallel-size", "2"], {}),
    "layer-wise": (Layout(layer_wise=True), 2, ["--use-distributed-optimizer"], {}),
    "layer-wise, four replicas": (Layout(layer_wise=True), 4, ["--use-distributed-optimizer"], {}),
    "layer-wise, older assignment": (
        Layout(layer_wise=True),
        2,
        ["--use-distributed-optimizer", "--no-use-layer-wise-param-layout"],
        {"param_layout": False},
    ),
    "layer-wise, tensor": (
        Layout(tp=2, layer_wise=True),
        4,
        ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer"],
        {},
    ),
    "layer-wise, virtual stages": (
        Layout(pp=2, vpp=2, layer_wise=True),
        4,
        [
            *("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
            "--use-distributed-optimizer",
        ],
        {},
    ),
    "rows under Adam's rule": (
        Layout(tp=2),
        2,
        ["--tensor-model-parallel-size", "2", "--muon-gdn-in-proj", "split", *DELTA],
        {**GDN, "optimizer": {"muon_gdn_in_proj": "split"}},
    ),
    "heads alone": (Layout(tp=2), 2, ["--tensor-model-parallel-size", "2", *LATENT], MLA),
    "experts": (
        Layout(ep=2),
        2,
        ["--expert-model-parallel-size", "2", *EXPERTS],
        EXPERT_MODEL,
    ),
    "layer-wise, experts": (
        Layout(ep=2, layer_wise=True),
        4,
        ["--expert-model-parallel-size", "2", "--use-distributed-optimizer", *EXPERTS],
        EXPERT_MODEL,
    ),
    "layer-wise, copies of experts alone": (
        Layout(tp=2, etp=1, sp=True, layer_wise=True),
        2,
        [
            *("--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1", "--sequence-parallel"),
            *("--use-distributed-optimizer", *EXPERTS),
        ],
        EXPERT_MODEL,
    ),
}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_plan_is_what_ranks_do(pool: RankPool, planner: ProcessPoolExecutor, case: str, bf16: bool) -> None:
    """Bytes and operations of every rank's real optimizer have the mean and the maximum that the plan tells."""
    layout, world, flags, options = CASES[case]
    # Newton-Schulz in bfloat16 for models in bfloat16, unless the case says otherwise.
    muon = {"muon_fp32_matmul_prec": "medium" if bf16 else "highest", **options.get("optimizer", {})}
    options, precision = {**options, "optimizer": muon}, muon["muon_fp32_matmul_prec"]
    groups = [] if flags[-len(LATENT) :] == LATENT else GROUPS
    flags = [*TINY, *groups, *flags, "--muon-fp32-matmul-prec", precision, *(["--bf16"] if bf16 else [])]
    document = planner.submit(document_of, flags, world).result()
    figures, mode = document["all_ranks"], muon.get("muon_tp_mode", "auto")
    in_mode = document["tensor_parallel_modes"][mode]
    ranks = pool.run(measured, world, layout, bf16, options)
    for name, planned in {
        "parameter_bytes": figures["parameter_bytes"],
        "state_bytes": figures["optimizer_state_bytes"],
        "counted_flops": figures["newton_schulz_flops"],
        "bytes": in_mode["exchanged_bytes"],
        "collectives": in_mode["collectives"],
        "flops": in_mode["newton_schulz_flops"],
    }.items():
        values = [getattr(rank, name) for rank in ranks]
        assert max(values) == planned["max"], name
        assert sum(values) / world == pytest.approx(planned["mean"], rel=1e-12), name

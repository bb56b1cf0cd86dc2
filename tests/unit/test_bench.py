"""The benchmark's parts: weights and their forms, the check of updates, what is counted and shown, starting ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_muon.benchmark import document, launch, memory, text
from megatron_muon.benchmark.accuracy import Errors, Reference, WrongUpdateError, check, exact_update, update_errors
from megatron_muon.benchmark.cases import Case, WeightSpec, cases_of_shapes, standard_cases
from megatron_muon.benchmark.command import main
from megatron_muon.benchmark.contestants import OURS, Contestant, contestants
from megatron_muon.benchmark.forms import FORMS, FUSED, LOGICAL, UPSTREAM, Tensors, pieces_of
from megatron_muon.benchmark.launch import RanksError, start_ranks
from megatron_muon.benchmark.measure import Measured, Traffic
from megatron_muon.benchmark.model import first_layers
from megatron_muon.benchmark.observe import CountedProducts, Observer
from megatron_muon.benchmark.ranks import Groups, World, choose_device
from megatron_muon.benchmark.rounds import Plan, quantile, ratios, round_count, timed_rounds
from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize.coefficients import coefficients
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import BlockProducts
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tests.reference import orthogonalized

ALONE = World(0, 1, torch.device("cpu"), 1)
QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))
HEADS = MatrixLayout("q", (Section("q", 4, matrix_rows=2), Section("k", 4, matrix_rows=2)))
GLU = MatrixLayout("glu", (Section("gate", 4), Section("up", 4)))


# --- which weights ---------------------------------------------------------------------------------------------------


def test_dense_case_is_the_model_that_is_named() -> None:
    (case,) = standard_cases(["dense"], 1, None)
    each = {(512, 512): 2, (128, 512): 2, (1408, 512): 2, (512, 1408): 1}
    assert case.matrices() == {shape: 8 * count for shape, count in each.items()}
    assert case.parameters == 8 * (768 * 512 + 512 * 512 + 3 * 1408 * 512)
    assert all(weight.dim is None for weight in case.weights)


@pytest.mark.parametrize("ep", [1, 2])
def test_expert_case_is_the_model_that_is_named(ep: int) -> None:
    (case,) = standard_cases(["experts"], None, ep)
    assert case.matrices() == {(256, 128): 4 * 64 * 2 // ep, (128, 256): 4 * 64 // ep}
    assert (case.ranks, case.parameters) == (ep, 4 * 64 * 3 * 256 * 128)
    assert all(weight.dim is None and weight.expert for weight in case.weights)


def test_layouts_without_arguments() -> None:
    cases = standard_cases([], None, None)
    layouts = {(case.name, case.tp, case.ep) for case in cases}
    assert layouts == {("dense", 1, 1), ("dense", 2, 1), ("dense", 4, 1), ("experts", 1, 1), ("experts", 1, 2)}
    whole = [(case.parameters, case.matrices()) for case in cases if case.name == "dense"]
    assert all(case == whole[0] for case in whole)  # the same matrices at each size


def test_layers_and_layouts_that_are_given() -> None:
    cases = standard_cases([], 2, None, layers=1)
    assert [(case.name, case.tp, case.ep, case.ranks) for case in cases] == [("dense", 2, 1, 2), ("experts", 2, 1, 2)]
    assert len(cases[0].weights) == 4
    assert {weight.dim for weight in cases[1].weights} == {-2, -1}
    (case,) = standard_cases([], 2, 4)  # experts alone, whole on their ranks
    assert (case.name, case.ranks, {weight.dim for weight in case.weights}) == ("experts", 4, {None})


def test_shapes() -> None:
    (case,) = cases_of_shapes("8x4*2, 4x6", 2, None)
    assert [(weight.shape, weight.dim) for weight in case.weights] == [((8, 4), -2), ((8, 4), -2), ((4, 6), -1)]
    assert case.local_elements == (32 + 32 + 24) // 2


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: cases_of_shapes("8x", 1, None), "--shapes 8x: '8x' is not MxN"),
        (lambda: cases_of_shapes("0x4", 1, None), "--shapes 0x4: "),
        (lambda: cases_of_shapes("8x4", 3, None), "--tp 3: 8x4 number 1 has 8 rows"),
        (lambda: cases_of_shapes("8x4", 1, 2), "--ep 2 with --shapes"),
        (lambda: standard_cases(["dens"], None, None), "--case dens: choose from dense, experts"),
        (lambda: standard_cases(["dense"], None, 2), "--ep 2 with --case dense"),
        (lambda: standard_cases(["dense"], 3, None), "--tp 3: "),
        (lambda: standard_cases(["experts"], None, 3), "--ep 3: 64 experts"),
        (lambda: choose_device("cuda", 10**6), "--device cuda: torch finds"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        make()
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--steps", "0"], "--steps 0: give a whole number of at least 1."),
        (["--json", "/no/such/folder/x.json"], "--json /no/such/folder/x.json: give a file in a folder that exists."),
        (["--shapes", "8x4", "--layers", "2"], "--layers 2 with --shapes"),
        (["--model", "no_such_file"], "--model no_such_file: No such file"),
    ],
)
def test_command_refuses_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"megatron_muon bench: error: {message}")


def test_processes_of_a_launcher_are_the_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        main(["--tp", "2", "--device", "cpu"])
    assert "it takes 2 processes and the launcher has started 3" in capsys.readouterr().err


def test_first_layers() -> None:
    names = ["decoder.layers.3.a", "decoder.layers.0.a", "decoder.layers.11.a", "decoder.layers.0.b", "final"]
    weights = [WeightSpec(name, (2, 2)) for name in names]
    kept = [weight.name for weight in first_layers(weights, 2)]
    assert kept == ["decoder.layers.3.a", "decoder.layers.0.a", "decoder.layers.0.b"]


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = standard_cases(["dense"], 2, None)
    each = memory.needed_bytes(case, [FUSED, UPSTREAM], 9)
    assert 4 * case.local_elements * 11 < each < 4 * case.local_elements * 25 + 2 * memory.WORKING_BYTES
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * each)
    memory.refuse_too_large(case, ["fp32", "bf16"], cpu)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * each - 1)
    with pytest.raises(ConfigError, match=r"--case dense: 9 optimizers on dense, TP 2 need .* Use --layers N"):
        memory.refuse_too_large(case, ["fp32", "bf16"], cpu)


# --- in which form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [UPSTREAM, LOGICAL])
@pytest.mark.parametrize(
    "shape,layout,dim,ranks",
    [
        ((16, 6), QKV, -2, 2),
        ((16, 6), QKV, -2, 4),  # shards cut through a period
        ((16, 6), GLU, -2, 2),
        ((16, 6), HEADS, -2, 2),
        ((16, 6), HEADS, -2, 4),
        ((16, 6), WHOLE, -2, 2),
        ((16, 6), WHOLE, -1, 2),
        ((16, 6), QKV, -1, 2),
        ((16, 6), GLU, None, 1),
        ((3, 16, 6), GLU.stack(), -2, 2),
        ((3, 16, 6), HEADS.stack(), -2, 2),
        ((3, 16, 6), WHOLE.stack(), -1, 2),
    ],
)
def test_pieces_of_all_ranks_are_the_matrices(
    form: str, shape: tuple[int, ...], layout: MatrixLayout, dim: int | None, ranks: int
) -> None:
    """Put together again, whatever the form, they are what the layout says."""
    spec, x = WeightSpec("w", shape, layout, dim), torch.randn(shape)
    blocks = [block.reshape(-1, *block.shape[-2:]) for block in layout.split(x)]
    shards = [x] if dim is None else [shard.contiguous() for shard in x.chunk(ranks, dim=dim)]
    of_ranks = [pieces_of(spec, shard, x, form, ranks, rank) for rank, shard in enumerate(shards)]
    seen = [torch.zeros(len(block)) for block in blocks]
    for pieces in zip(*of_ranks, strict=True):
        assert all(piece.tensor.is_contiguous() for piece in pieces)
        groups = [[piece] for piece in pieces] if pieces[0].alone else [pieces]
        for group in groups:
            first = group[0]
            whole = first.tensor if first.dim is None else torch.cat([piece.tensor for piece in group], first.dim)
            for block, matrices in zip(first.layout.split(whole), first.matrices, strict=True):
                numbers = list(matrices.numbers) or list(range(len(blocks[matrices.block])))
                assert torch.equal(block.reshape(-1, *block.shape[-2:]), blocks[matrices.block][numbers])
                seen[matrices.block][numbers] += 1
    assert all(bool((count == 1).all()) for count in seen)


def test_upstream_gets_qkv_fused_only_where_it_can_split_it() -> None:
    x = torch.randn(16, 6)
    spec = WeightSpec("w", (16, 6), QKV, -2)
    assert len(pieces_of(spec, x[:8], x, UPSTREAM, 2, 0)) == 1
    assert len(pieces_of(spec, x[:4], x, UPSTREAM, 4, 0)) == 3
    assert len(pieces_of(spec, x[:8], x, LOGICAL, 2, 0)) == 3
    with pytest.raises(ConfigError, match=r"--tp 8: the matrices of w \(qkv\) have no even parts"):
        pieces_of(spec, x[:2], x, UPSTREAM, 8, 0)


def test_forms_share_memory_where_they_can() -> None:
    case = Case("x", 1, 1, (WeightSpec("glu", (8, 6), GLU), WeightSpec("whole", (8, 6))), "--case x")
    tensors = Tensors(case, Groups(), torch.device("cpu"), FORMS)
    storages = {entry.weight.tensor.untyped_storage().data_ptr() for each in tensors.entries.values() for entry in each}
    assert len(storages) == 2
    assert [len(tensors.entries[form]) for form in FORMS] == [2, 3, 3]


# --- is the update right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 1, 7), (3, 6, 6)])
@pytest.mark.parametrize("name", ["quintic", "simple"])
def test_reference_is_the_polynomial_of_singular_values(name: str, shape: tuple[int, ...]) -> None:
    steps = coefficients(name, 5)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([orthogonalized(matrix, steps) for matrix in x])
    assert torch.allclose(exact_update(x, steps), expected, rtol=0, atol=1e-11)


def measured_errors(contestant: Contestant, wrong: Callable[[list[torch.nn.Parameter]], None] | None = None) -> Errors:
    """Of a contestant on small weights; ``wrong`` spoils its parameters first."""
    specs = (
        WeightSpec("qkv", (32, 12), _wide_qkv()),
        WeightSpec("glu", (32, 12), _gated(16)),
        WeightSpec("w", (10, 7)),
    )
    tensors = Tensors(Case("x", 1, 1, specs, "--case x"), Groups(), torch.device("cpu"), FORMS)
    entries = tensors.entries[contestant.form]
    before = [entry.weight.tensor.clone() for entry in entries]
    params = [entry.parameter() for entry in entries]
    if wrong is not None:
        wrong(params)
    optimizer = contestant.make(params, Groups())
    usual = [dict(group) for group in optimizer.param_groups]
    errors = update_errors(contestant, optimizer, entries, Reference(tensors), ALONE)
    assert all(torch.equal(entry.weight.tensor, old) for entry, old in zip(entries, before, strict=True))
    for group, old in zip(optimizer.param_groups, usual, strict=True):
        assert {key: group[key] for key in ("lr", "weight_decay")} == {key: old[key] for key in ("lr", "weight_decay")}
    assert errors is not None
    return errors


def _wide_qkv() -> MatrixLayout:
    return MatrixLayout("qkv", (Section("q", 8), Section("k", 4), Section("v", 4)))


def _gated(rows: int) -> MatrixLayout:
    return MatrixLayout("glu", (Section("gate", rows), Section("up", rows)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:Could not determine rank")
def test_updates_of_all_contestants_are_right(dtype: str) -> None:
    """Ours, and others' as they are installed, each on the form that it gets."""
    for contestant in contestants(dtype, 1):
        if contestant.polynomial:
            errors = measured_errors(contestant)
            check(contestant, errors)
            assert errors.bound is not None and errors.mean <= errors.worst
            assert errors.worst > errors.bound * 1e-4, "the reference shares its rounding"


def _forget_layouts(params: list[torch.nn.Parameter]) -> None:
    for param in params:
        param.matrix_layout = WHOLE


def _other_gradients(params: list[torch.nn.Parameter]) -> None:
    for param in params:
        assert param.grad is not None
        param.grad = param.grad * (1 + torch.rand_like(param))


def _one_bad_number(params: list[torch.nn.Parameter]) -> None:
    assert params[0].grad is not None
    params[0].grad = params[0].grad.clone()
    params[0].grad[0, 0] = float("nan")


@pytest.mark.parametrize("wrong", [_forget_layouts, _other_gradients, _one_bad_number])
def test_wrong_update_is_caught(wrong: Callable[[list[torch.nn.Parameter]], None]) -> None:
    ours = contestants("bf16", 1)[0]
    with pytest.raises(WrongUpdateError, match="megatron_muon auto: the update of a matrix is off by"):
        check(ours, measured_errors(ours, wrong))


def test_command_ends_with_an_error_if_an_update_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_muon.benchmark import accuracy

    monkeypatch.setitem(accuracy.BOUNDS, "fp32", 1e-9)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as leaving:
            main(["--quick", "--case", "experts", "--tp", "1", "--dtype", "fp32", "--threads", "1", "--device", "cpu"])
    finally:
        torch.set_num_threads(threads)
    assert leaving.value.code == 1
    assert "megatron_muon auto: the update of a matrix is off by" in capsys.readouterr().err


# --- what a step holds -----------------------------------------------------------------------------------------------


def test_peak_is_what_is_alive_at_once() -> None:
    before = torch.zeros(1000)
    with Observer() as observer:
        a = before + 1  # 4000
        b = a.view(10, 100).T  # no memory of its own
        before.add_(1)
        torch._foreach_add_([before], 1.0)
        c = a * 2  # 8000
        del a, b
        d = c.double()  # 4000 + 8000
        del c, d
        e = torch.empty(1250)  # 5000
    assert (observer.peak, observer.live) == (12000, 5000)
    del e
    assert observer.live == 0


def test_products_are_counted_by_dtype() -> None:
    x, y = torch.randn(4, 6), torch.randn(3, 4, 6).bfloat16()
    with Observer() as observer:
        torch.mm(x, x.mT, out=torch.empty(4, 4))
        torch.addmm(torch.zeros(4, 4), x, x.mT)
        torch.baddbmm(torch.zeros(3, 4, 4).bfloat16(), y, y.mT)
        y @ y.mT
        x + x
    assert observer.flops == {torch.float32: 2 * 2 * 4 * 4 * 6, torch.bfloat16: 2 * 3 * 2 * 4 * 4 * 6}
    assert observer.product_dtype == "bf16"
    assert Observer().product_dtype == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p,q", [(40, 40), (40, 400)])
def test_needed_operations(dtype: torch.dtype, p: int, q: int) -> None:
    """What is done is what torch is seen to multiply, whichever iteration is chosen; what is needed is less."""
    orthogonalizer = Orthogonalizer(coefficients("quintic", 5), dtype)
    plain = orthogonalizer(x := torch.randn(3, p, q))
    counted = CountedProducts(orthogonalizer.products)
    orthogonalizer.products = counted  # type: ignore[assignment]
    with FlopCounterMode(display=False) as seen:
        assert torch.equal(orthogonalizer(x), plain)
    assert counted.done == seen.get_total_flops()
    if orthogonalizer.method(p, q).restarts is None:
        assert counted.needed == 3 * 5 * (p * (p + 1) * q + p * (p + 1) * p + 2 * p * p * q)
    assert 0.5 < counted.needed / counted.done < 1


def test_products_by_blocks_are_counted_by_blocks() -> None:
    orthogonalizer = Orthogonalizer(coefficients("quintic", 5), torch.bfloat16, products=BlockProducts(10))
    counted = CountedProducts(orthogonalizer.products)
    orthogonalizer.products = counted  # type: ignore[assignment]
    with FlopCounterMode(display=False) as seen:
        orthogonalizer(torch.randn(3, 40, 60))
    assert counted.done == seen.get_total_flops()
    assert 0.7 < counted.needed / counted.done < 1


def test_unknown_collective_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"the bytes that c10d\.scatter_ sends are not known"):
        Observer()._count_collective("scatter_", ())


# --- time ------------------------------------------------------------------------------------------------------------


def test_rounds_alternate() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("b")
        time.sleep(0.02)

    times = timed_rounds(ALONE, {"a": lambda: calls.append("a"), "b": slow}, 3)
    assert "".join(calls) == "ababab"
    assert [len(times["a"]), len(times["b"])] == [3, 3]
    assert min(times["b"]) >= 0.02


def test_number_of_rounds() -> None:
    plan = Plan(budget_s=20, least=7, most=40)
    assert [round_count(plan, seconds) for seconds in (100, 1, 0.1, 0)] == [7, 20, 40, 40]
    assert round_count(Plan(steps=3), 100) == 3


def test_quantiles_and_ratios() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.5]
    for share in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        expected = float(torch.quantile(torch.tensor(values, dtype=torch.float64), share))
        assert quantile(values, share) == pytest.approx(expected, rel=1e-12)
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == pytest.approx({"median": 2.0, "p10": 1.2, "p90": 2.8})


# --- what is shown ---------------------------------------------------------------------------------------------------


def entry_of(dtype: str, tp: int, seconds: float) -> dict[str, Any]:
    """Of made-up numbers: number i takes ``seconds`` * (1 + i) in the first round, half more in the second."""
    (case,) = standard_cases(["dense"], tp, None)
    found = []
    for index, contestant in enumerate(contestants(dtype, tp)):
        first = seconds * (1 + index)
        errors = Errors(1e-2, 1e-3, 1e-1) if contestant.polynomial else None
        traffic = [Traffic(48 << 30, dtype, 1234, 5e10, 10**12, 6 * 10**11 if "muon " in contestant.name else 0)] * tp
        made = Measured(contestant, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), errors, traffic)
        made.seconds = [first, 1.5 * first]
        found.append(made)
    world = World(0, tp, torch.device("cpu"), 2) if tp == 1 else _FakeWorld(0, tp, torch.device("cpu"), 2)
    return document.of_case(case, dtype, world, found, document.Rate(2048, dtype, 10**12, [2.0, 2.0]), 60.0)


class _FakeWorld(World):
    backend = "gloo"


@pytest.mark.parametrize("dtype,tp", [("fp32", 1), ("bf16", 1), ("fp32", 4), ("fp16", 4)])
@pytest.mark.parametrize("seconds", [1e-4, 12.3])
def test_tables_fit_and_documents_are_plain(dtype: str, tp: int, seconds: float) -> None:
    entry = json.loads(json.dumps(entry_of(dtype, tp, seconds), allow_nan=False))
    lines = text.render_case(entry).splitlines()
    assert max(map(len, lines)) <= text.WIDTH
    for each in entry["contestants"]:
        assert any(line.startswith(each["name"].partition(",")[0]) for line in lines)
    assert max(map(len, text.NOTES.splitlines())) <= text.WIDTH


def test_ratios_of_the_document() -> None:
    entry = entry_of("fp32", 2, 1.0)
    order = [each["name"] for each in entry["contestants"]]
    place = {name: 1 + index for index, name in enumerate(order)}
    assert order[0] == OURS
    assert entry["ratio_vs_upstream"] == pytest.approx(place["megatron-core duplicated"])
    assert entry["ratio_vs_upstream_distributed"] == pytest.approx(place["megatron-core distributed"])
    assert entry["ratio_vs_upstream_fp32"] is None and entry["ratio_vs_upstream_fp32_spread"] is None
    assert entry["ratio_vs_adamw"] == pytest.approx(1 / place["torch AdamW"])
    assert set(entry["ratio_vs_upstream_spread"]) == {"p10", "p90"}
    ours = entry["contestants"][0]
    assert ours["seconds"]["median"] == 1.25
    # two ranks do 1e12 operations each in 1.25 s; the machine does 0.5e12 a second on each
    assert ours["share_of_gemm_rate"] == pytest.approx(1.6)
    assert ours["share_of_gemm_rate_needed"] == pytest.approx(0.96)
    exempt = [each["name"] for each in entry["contestants"] if each["error"] and not each["same_update"]]
    assert exempt == ["megatron-core blockwise"]


# --- ranks that are started ------------------------------------------------------------------------------------------


def start(folder: Path, body: str, ranks: int = 2, silence_s: float = 60) -> None:
    """Ranks that run some lines of Python."""
    code = "import os, pathlib, sys, time\nrank, folder = int(os.environ['RANK']), pathlib.Path(sys.argv[1])\n" + body
    start_ranks([sys.executable, "-c", code, str(folder)], ranks, folder, lambda: None, silence_s)


def test_ranks_know_themselves(tmp_path: Path) -> None:
    start(tmp_path, "(folder / str(rank)).write_text(os.environ['WORLD_SIZE'] + os.environ['LOCAL_RANK'])")
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["20", "21"]


def test_failure_of_one_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 1)
    body = """
(folder / f"pid-{rank}").write_text(str(os.getpid()))
if rank == 1:
    (folder / "failed-1").write_text("rank 1: out of paper")
    sys.exit(3)
time.sleep(600)
"""
    begin = time.monotonic()
    with pytest.raises(RanksError, match="rank 1: out of paper"):
        start(tmp_path, body)
    assert time.monotonic() - begin < 60
    assert not _alive(int((tmp_path / "pid-0").read_text()))


def test_failure_without_a_word(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match="rank 0 of 1 ended with code 7"):
        start(tmp_path, "os._exit(7)", ranks=1)


def test_silence_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 1)
    with pytest.raises(RanksError, match="2 ranks have reported nothing for 1 s"):
        start(tmp_path, "time.sleep(600)", silence_s=1)


def test_ranks_leave_with_the_command(tmp_path: Path) -> None:
    """Killed outright, it cannot end them: they notice."""
    rank = (
        "import os, pathlib, sys, time; from megatron_muon.benchmark.launch import _leave_with_parent; "
        "_leave_with_parent(); pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid())); time.sleep(600)"
    )
    command = (
        "import pathlib, sys; from megatron_muon.benchmark.launch import start_ranks; "
        f"start_ranks([sys.executable, '-c', {rank!r}, sys.argv[1]], 1, pathlib.Path(sys.argv[1]), lambda: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", command, str(tmp_path)], cwd=Path(__file__).parents[2])
    note = tmp_path / "pid"
    try:
        assert _within(120, lambda: note.exists() and bool(note.read_text()))
        child = int(note.read_text())
        assert _alive(child)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert _within(20, lambda: not _alive(child))


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _alive(process: int) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for yet does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    with contextlib.suppress(OSError):
        os.kill(process, 0)
        return not Path("/proc/self").exists()
    return False


def test_fused_form_keeps_the_weights() -> None:
    (case,) = standard_cases([], 1, 1, quick=True)[:1]
    tensors = Tensors(case, Groups(), torch.device("cpu"), [FUSED])
    assert [tuple(entry.weight.tensor.shape) for entry in tensors.entries[FUSED]] == [w.shape for w in case.weights]

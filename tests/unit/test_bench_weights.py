"""The benchmark's weights: which, at which sizes, and in which forms optimizers get them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_muon.errors import ConfigError
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tools.bench import memory
from tools.bench.cases import Case, WeightSpec, cases_of_shapes, cases_of_widths, standard_cases
from tools.bench.command import main
from tools.bench.forms import FORMS, FUSED, LOGICAL, UPSTREAM, Tensors, pieces_of
from tools.bench.model import first_layers
from tools.bench.ranks import Groups, choose_device
from tools.splitting import split

QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))
HEADS = MatrixLayout("q", (Section("q", 4, matrix_rows=2), Section("k", 4, matrix_rows=2)))
GLU = MatrixLayout("glu", (Section("gate", 4), Section("up", 4)))


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


def test_widths() -> None:
    cases = cases_of_widths([64, 1024, 4096])
    assert [(case.name, case.ranks, len(case.weights)) for case in cases] == [
        ("width 64", 1, 16),
        ("width 1024", 1, 4),
        ("width 4096", 1, 2),
    ]
    assert [weight.shape for weight in cases[1].weights] == [(1024, 1024)] * 2 + [(4096, 1024)] * 2


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
    assert capsys.readouterr().err.startswith(f"bench: error: {message}")


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
    blocks = [block.reshape(-1, *block.shape[-2:]) for block in split(layout, x)]
    shards = [x] if dim is None else [shard.contiguous() for shard in x.chunk(ranks, dim=dim)]
    of_ranks = [pieces_of(spec, shard, x, form, ranks, rank) for rank, shard in enumerate(shards)]
    seen = [torch.zeros(len(block)) for block in blocks]
    for pieces in zip(*of_ranks, strict=True):
        assert all(piece.tensor.is_contiguous() for piece in pieces)
        groups = [[piece] for piece in pieces] if pieces[0].alone else [pieces]
        for group in groups:
            first = group[0]
            whole = first.tensor if first.dim is None else torch.cat([piece.tensor for piece in group], first.dim)
            for block, matrices in zip(split(first.layout, whole), first.matrices, strict=True):
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


def test_fused_form_keeps_the_weights() -> None:
    (case,) = standard_cases([], 1, 1, quick=True)[:1]
    tensors = Tensors(case, Groups(), torch.device("cpu"), [FUSED])
    assert [tuple(entry.weight.tensor.shape) for entry in tensors.entries[FUSED]] == [w.shape for w in case.weights]

"""Measured steps on tensor-parallel shards: numbers of whole matrices, and the bits of steps that are not measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.monitor.schema import STATS, TIMES
from megatron_muon.optimizers.findings import Sample
from megatron_muon.optimizers.probe import Probe
from megatron_muon.optimizers.storage import momentum_of, read
from megatron_muon.routing.layout import STIEFEL, WHOLE, MatrixLayout, Section
from tests.pool import RankPool

QKV = MatrixLayout("qkv", (Section("q", 16), Section("k", 8), Section("v", 8)))
HEADS = MatrixLayout("qkv", tuple(Section(each.name, each.rows, matrix_rows=8) for each in QKV.sections))
BROKEN = MatrixLayout("gated", (Section("q", 100), Section("g", 60)))
SHIFTED = [
    MatrixLayout("gated", (Section("q", 100), Section("g", 60))),
    MatrixLayout("gated", (Section("a", 20), Section("q", 100), Section("b", 40))),
]
CASES: list[tuple[str, tuple[int, ...], int | None, MatrixLayout]] = [
    ("wide rows", (96, 200), 0, WHOLE),
    ("wide columns", (96, 200), 1, WHOLE),
    ("tall rows", (200, 96), 0, WHOLE),
    ("tall columns", (200, 96), 1, WHOLE),
    ("qkv", (128, 72), 0, QKV),
    ("heads", (128, 72), 1, HEADS),
    ("broken", (160, 72), 0, BROKEN),
    ("experts", (3, 24, 40), 1, WHOLE.stack()),
    ("whole", (80, 90), None, WHOLE),
]
"""Shapes of whole weights, the dimension that is divided, counted in a matrix from the front, and layouts."""

MODES: list[dict[str, Any]] = [
    {"tp_mode": "owner"},
    {"tp_mode": "gram", "ns_dtype": "fp32", "nesterov": True},
    {"tp_mode": "duplicated", "variant": "normuon", "chunk_mb": 0.05},
    {"tp_mode": "distributed", "weight_decay_method": "l2", "nesterov": True},
]
VARIANTS: list[dict[str, Any]] = [
    {"variant": "adamuon"}, {"variant": "namo", "nesterov": True}, {"variant": "hyperball", "scale_mode": "none"},
    {"variant": "polargrad", "scale_mode": "none"}, {"variant": "spectral_sphere"}, {"scale_mode": "update_norm"},
    {"variant": "stiefel", "direction": STIEFEL}, {"direction": "row_norm"}, {"direction": "sign", "nesterov": True},
    {"blockwise_period": 2}, {"dtype": torch.bfloat16, "master": "remainder", "momentum_dtype": "int8"},
    {"dtype": torch.bfloat16, "master": "remainder", "momentum_dtype": "bf16", "variant": "normuon"},
    {"offload": "momentum"},
]  # fmt: skip
LR, DECAY = 0.05, 0.1


def of_case(number: int, step: int, scale: float = 1.0) -> torch.Tensor:
    """Of a spectrum that falls, so that some directions are left, the same in whatever parts it is taken."""
    shape = CASES[number][1]
    generator = torch.Generator().manual_seed(100 * step + number)
    falling = torch.logspace(0, -4, shape[-1])
    return scale * torch.randn(shape, generator=generator) * falling


def cut(whole: torch.Tensor, dim: int | None) -> torch.Tensor:
    if dim is None:
        return whole.clone()
    return whole.chunk(dist.get_world_size(), dim - 2)[dist.get_rank()].contiguous()


def made(dtype: torch.dtype = torch.float32, direction: str = "", **options: Any) -> Muon:
    params = []
    for number, (_, _, dim, its) in enumerate(CASES):
        layout = WHOLE if its is BROKEN and "blockwise_period" in options else its  # no shard may be cut in a period
        param = torch.nn.Parameter(cut(of_case(number, 99, 0.02), dim).to(dtype))
        param.matrix_layout = MatrixLayout(layout.kind, layout.sections, layout.stacked, direction or layout.direction)  # type: ignore[attr-defined]
        if dim is not None:
            param.tensor_model_parallel, param.partition_dim = True, dim  # type: ignore[attr-defined]
        params.append(param)
    options = {"weight_decay": DECAY, "fp32_matmul_prec": "highest", "ns_dtype": "fp32", **options}
    return Muon(params, lr=LR, momentum=0.8, tp_group=dist.group.WORLD, **options)


def steps(optimizer: Muon, count: int = 3) -> list[Sample]:
    """Takes steps of which the last is measured, if the optimizer has a probe."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(count):
        for number, (param, (_, _, dim, _)) in enumerate(zip(params, CASES, strict=True)):
            zero = number == 7 and step == count - 1  # experts without tokens
            param.grad = (cut(of_case(number, step), dim) * (not zero)).to(param.dtype)
        if optimizer.probe is not None:
            optimizer.probe.is_next_due, optimizer.probe.is_due = step == count - 2, step == count - 1
        optimizer.step()
    return [] if optimizer.probe is None else optimizer.probe.take()


def rows_of(layout: MatrixLayout, rows: int) -> dict[str, list[list[int]]]:
    """Row numbers of the matrices of each block of a whole weight."""
    if not layout.sections:
        return {"": [list(range(rows))]}
    found: dict[str, list[int]] = {section.name: [] for section in layout.sections}
    row = 0
    for _ in range(rows // layout.period):
        for section in layout.sections:
            found[section.name] += range(row, row + section.rows)
            row += section.rows
    m = layout.sections[0].matrix_rows
    return {name: [its[i : i + m] for i in range(0, len(its), m)] if m else [its] for name, its in found.items()}


def numbers(options: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
    """By case and block, (matrices, STATS): what this rank has of them, in the order of the weight."""
    optimizer = made(**options)
    optimizer.probe = Probe()
    samples = steps(optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    places = {id(param): case[0] for param, case in zip(params, CASES, strict=True)}
    found: dict[tuple[str, str], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for sample in samples:
        of_all, of_this = found.setdefault((places[id(sample.param)], sample.block), ([], []))
        (of_all if sample.ranks > 1 else of_this).append(sample.numbers)
    assert optimizer.probe.times().keys() == TIMES.keys()
    merged = {}
    for key, tables in found.items():
        first, *others = (torch.cat(its) for its in tables if its)
        for other in others:  # what this rank alone has found
            assert other.shape == first.shape and not (~first.isnan() & ~other.isnan()).any()
            first = torch.where(first.isnan(), other, first)
        merged[key] = first
    return merged


def whole_of(param: torch.Tensor, dim: int | None) -> torch.Tensor:
    if dim is None:
        return param.detach().double()
    parts = [torch.empty_like(param) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, param.detach().contiguous())
    return torch.cat(parts, dim - 2).double()


def wanted() -> dict[tuple[str, str], torch.Tensor]:
    """What the numbers of plain Muon are: by SVDs in float64, of the weights themselves before and after."""
    optimizer, found = made(weight_decay=0.0, scale_mode="none"), dict[tuple[str, str], torch.Tensor]()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    whole: list[list[torch.Tensor]] = []
    for step in range(3):
        for number, (param, (_, _, dim, _)) in enumerate(zip(params, CASES, strict=True)):
            param.grad = cut(of_case(number, step), dim) * (not (number == 7 and step == 2))
        whole.append([whole_of(param, case[2]) for param, case in zip(params, CASES, strict=True)])
        optimizer.step()
    after = [whole_of(param, case[2]) for param, case in zip(params, CASES, strict=True)]
    for number, (param, (name, shape, dim, layout)) in enumerate(zip(params, CASES, strict=True)):
        u = whole_of(read(momentum_of(optimizer.state[param])), dim)
        gradient = of_case(number, 2).double() * (number != 7)
        before, middle, end = whole[1][number], whole[2][number], after[number]
        for block, rows in rows_of(layout, shape[-2]).items():
            each = [
                [x[..., some, :].reshape(-1, len(some), shape[-1]) for some in rows]
                for x in (gradient, u, (middle - end) / LR, (before - middle) / LR, middle)
            ]
            parts = [torch.cat(x) for x in each]
            found[name, block] = torch.stack([numbers_of(*(x[index] for x in parts)) for index in range(len(parts[0]))])
    return found


def numbers_of(
    gradient: torch.Tensor, u: torch.Tensor, o: torch.Tensor, last: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    s, r, w = torch.linalg.svdvals(o), torch.linalg.svdvals(u), torch.linalg.svdvals(weight)
    rms = [x.square().mean().sqrt() for x in (o, weight)]
    its = {
        "gradient_norm": gradient.norm(), "zero_gradient": (gradient == 0).all(), "momentum_norm": u.norm(),
        "at_bound": 0.0, "stable_rank": r.square().sum() / r[0] ** 2, "unlifted": (s < 0.5).double().mean(),
        "defect": (s - 1).square().mean().sqrt(), "largest_singular": s[0], "update_rms": LR * rms[0],
        "weight_rms": rms[1], "update_ratio": LR * rms[0] / rms[1], "cosine": (o * last).sum() / o.norm() / last.norm(),
        "spectral_norm": w[0], "nonfinite": 0.0,
    }  # fmt: skip
    # Standard deviations of estimates with 4096 random signs, relative to the defect; a basis of 64 has none.
    f, random = (s - 1).square(), len(s) > 64
    share = its["unlifted"]
    deviations = (share * (1 - share) / 2048).sqrt() * random, (f.square().mean() / 2048).sqrt() / f.mean() / 2 * random
    near = (abs(s - 0.5) < 0.05).double().mean()  # neither below nor above
    return torch.tensor([*(float(its[name]) for name in STATS), *map(float, (*deviations, near))])


def same_bits(options: dict[str, Any]) -> list[str]:
    """Names of what a measured step leaves otherwise than one that is not."""
    plain, measured = made(**options), made(**options)
    measured.probe = Probe()
    steps(plain, 2), steps(measured, 2)
    wrong = []
    for (param, state), (other, its), case in zip(plain.state.items(), measured.state.items(), CASES, strict=True):
        pairs = [("weight", param, other), *((name, state[name], its[name]) for name in state)]
        wrong += [
            f"{case[0]}: {name}" for name, a, b in pairs if not torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        ]
    return wrong


def ranks_of_broken() -> dict[str, int]:
    """By block of the weight whose rows are cut within its blocks: how many ranks are said to have its numbers."""
    optimizer = made()
    optimizer.probe = Probe()
    samples, params = steps(optimizer), [param for group in optimizer.param_groups for param in group["params"]]
    number = [case[0] for case in CASES].index("broken")
    known = [sample for sample in samples if not sample.numbers[:, [*STATS].index("gradient_norm")].isnan().any()]
    return {sample.block: sample.ranks for sample in known if sample.param is params[number]}


def numbers_of_shifted() -> list[list[float]]:
    """Spectral norm and stable rank of each weight's block of 100 rows, as far as this rank knows them, over theirs."""
    params, norms = [], []
    for number, layout in enumerate(SHIFTED):
        whole = 0.02 * torch.randn(160, 72, generator=torch.Generator().manual_seed(number))
        param = torch.nn.Parameter(cut(whole, 0))
        param.matrix_layout, param.tensor_model_parallel, param.partition_dim = layout, True, 0  # type: ignore[attr-defined]
        param.grad = torch.ones_like(param)  # of rank 1
        norms.append(float(torch.linalg.matrix_norm(whole[20 * number : 20 * number + 100].double(), 2)))
        params.append(param)
    optimizer = Muon(params, lr=LR, tp_group=dist.group.WORLD)
    optimizer.probe = Probe(is_due=True)
    optimizer.step()
    samples, found = optimizer.probe.take(), []
    for param, norm in zip(params, norms, strict=True):
        tables = torch.cat([each.numbers for each in samples if each.param is param and each.block == "q"])
        its = dict(zip(STATS, tables.nanmean(dim=0).tolist(), strict=True))
        found.append([its["spectral_norm"] / norm, its["stable_rank"]])
    return found


def all_numbers(options: list[dict[str, Any]]) -> list[dict[tuple[str, str], torch.Tensor]]:
    return [numbers(each) for each in options]


def all_bits(options: list[dict[str, Any]]) -> list[list[str]]:
    return [same_bits(each) for each in options]


PLAIN = {"weight_decay": 0.0, "scale_mode": "none"}
"""What :func:`wanted` computes."""


def check(found: dict[tuple[str, str], torch.Tensor], right: dict[tuple[str, str], torch.Tensor], where: str) -> None:
    """Within 5 % of SVDs, or three standard deviations where few of many directions make up a number."""
    for key, numbers in found.items():
        *wanted, share, defect, near = right[key].T
        for name, got, real in zip(STATS, numbers.T, wanted, strict=True):
            bound = 1e-6 + 0.05 * real.abs()
            if name == "cosine":
                bound += 3 / 2048**0.5
            if name == "unlifted":
                bound += 0.01 + 3 * share + near
            if name == "defect":
                bound = torch.maximum(bound, (0.02 + 3 * defect) * real)
            assert ((got - real).abs() <= bound).all(), (where, key, name, got, real)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_numbers_are_those_of_whole_matrices(pool: RankPool, ranks: int) -> None:
    right = pool.run(wanted, 1)[0]
    options = [{**PLAIN, "tp_mode": mode} for mode in {1: ["auto"], 2: ["owner", "distributed"], 4: ["gram"]}[ranks]]
    by_rank = pool.run(all_numbers, ranks, options)
    for number, its in enumerate(options):
        of_ranks = [each[number] for each in by_rank]
        divided = [
            key for key in right if all(len(found.get(key, ())) == len(right[key]) for found in of_ranks)
        ]  # heads that lie whole on a rank are others on each
        assert len(divided) >= len(right) - 3 * (ranks > 1) and all(found.keys() <= right.keys() for found in of_ranks)
        known = {key: torch.stack([found[key] for found in of_ranks]) for key in divided}
        for key, tables in known.items():  # by all ranks, or by one that shares the work
            counts = (~tables.isnan()).sum(dim=0)
            assert ((counts == ranks) | (counts == 1)).all(), (its, key, counts)
        check({key: tables.nanmean(dim=0) for key, tables in known.items()}, right, f"{ranks} ranks, {its}")


def test_ranks_agree_on_whose_numbers_they_are(pool: RankPool) -> None:
    assert pool.run(ranks_of_broken, 2) == [{"q": 2, "g": 2}] * 2  # the second rank has all rows of g


def test_ranks_agree_on_which_matrices_are_alike(pool: RankPool) -> None:
    """Of blocks of one shape the second rank of four has as many rows each, the others have not."""
    found = torch.tensor(pool.run(numbers_of_shifted, 4))
    assert torch.allclose(found.nanmean(dim=0), torch.ones(2, 2), rtol=0.02), found


QUICK = [MODES[1], *VARIANTS[-3:-1]]
QUICK += (each for each in VARIANTS if each.get("variant") in ("namo", "spectral_sphere", "stiefel"))


@pytest.mark.parametrize(
    "options", [QUICK, pytest.param([each for each in MODES + VARIANTS if each not in QUICK], marks=pytest.mark.slow)]
)
def test_measured_steps_have_the_bits_of_others(pool: RankPool, options: list[dict[str, Any]]) -> None:
    assert pool.run(all_bits, 2, options) == [[[]] * len(options)] * 2

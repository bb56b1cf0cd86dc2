"""What the benchmark counts, times and shows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import BlockProducts
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.timing import Times
from tools.bench import document, tables, text
from tools.bench.accuracy import Errors
from tools.bench.cases import standard_cases
from tools.bench.contestants import OURS, contestants
from tools.bench.found import Measured, Rate, Traffic
from tools.bench.observe import CountedProducts, Observer
from tools.bench.ranks import World
from tools.bench.rounds import Plan, quantile, ratios, round_count, timed_rounds

ALONE = World(0, 1, torch.device("cpu"), 1)


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
    orthogonalizer = Orthogonalizer(iteration("quintic", 5), dtype)
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
    orthogonalizer = Orthogonalizer(iteration("quintic", 5), torch.bfloat16, products=BlockProducts(10))
    counted = CountedProducts(orthogonalizer.products)
    orthogonalizer.products = counted  # type: ignore[assignment]
    with FlopCounterMode(display=False) as seen:
        orthogonalizer(torch.randn(3, 40, 60))
    assert counted.done == seen.get_total_flops()
    assert 0.7 < counted.needed / counted.done < 1


def test_unknown_collective_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"the bytes that c10d\.scatter_ sends are not known"):
        Observer()._count_collective("scatter_", ())


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
    found[0].predicted = Times(products=seconds)
    rates = Rates("a CPU", {"memory": 1e10}, {"memory": ("measured", "here")})
    return document.of_case(case, dtype, world, found, Rate(2048, dtype, 10**12, [2.0, 2.0]), rates, 60.0)


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
    assert ours["predicted_seconds"]["total"] == ours["predicted_seconds"]["products"] == 1.0
    assert {each["predicted_seconds"] for each in entry["contestants"][1:]} == {None}
    assert entry["rates"]["rates"]["memory"] == {"value": 1e10, "kind": "measured", "source": "here"}
    # two ranks do 1e12 operations each in 1.25 s; the machine does 0.5e12 a second on each
    assert ours["share_of_gemm_rate"] == pytest.approx(1.6)
    assert ours["share_of_gemm_rate_needed"] == pytest.approx(0.96)
    exempt = [each["name"] for each in entry["contestants"] if each["error"] and not each["same_update"]]
    assert exempt == ["megatron-core blockwise"]


def test_a_page_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kept(name: str, tp: int, package: str) -> str:
        content = {
            "command": ["python", "-m", "tools.bench", "--tp", str(tp), "--json", name],
            "machine": document.machine("cpu"),
            "versions": {"megatron-muon": package},
            "cases": [entry_of("fp32", tp, 1.0)],
        }
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    tables.main([kept("a", 1, "2"), kept("b", 4, "2")])
    page = capsys.readouterr().out
    assert [line[3:] for line in page.splitlines() if line.startswith("## dense")] == [
        "dense, one process, fp32",
        "dense, TP 4, fp32",
    ]
    assert "--tp 1 --json FILE1\n" in page and "--tp 4 --json FILE2\n" in page
    with pytest.raises(SystemExit, match="c: another machine or other versions than"):
        tables.main([kept("a", 1, "2"), kept("c", 1, "3")])

"""The choice among implementations of the products."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.choices import NS_BACKENDS
from megatron_muon.engine.plan import Weight
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers import engines
from megatron_muon.optimizers.engines import trial_of
from megatron_muon.orthogonalize import Orthogonalizer, backends, iteration
from megatron_muon.orthogonalize.backends import choose_products, fastest_on_all
from megatron_muon.orthogonalize.kernels import gate, onednn
from megatron_muon.orthogonalize.kernels.gate import Trial, examine
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts
from megatron_muon.routing.layout import MatrixLayout
from tests.unit.test_gate import CPU, DTYPES, SIZES, Altered, not_a_number, too_large


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    backends._checked.cache_clear()
    yield
    backends._checked.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts made-up implementations in the place of the real ones."""
    monkeypatch.setattr(gate, "CPU_SIZES", SIZES)
    monkeypatch.setattr(backends, "_KERNELS", {})

    def put(backend: str, products: Callable[[], TorchProducts], obstacle: str | None = None) -> None:
        module: Any = ModuleType(backend)
        module.obstacle = lambda device, dtype: obstacle
        module.Products = products
        monkeypatch.setitem(sys.modules, f"megatron_muon.orthogonalize.kernels.{backend}", module)
        backends._KERNELS[backend] = (backend, "Products")

    return put


class Good(Altered):
    name = "good"
    rest = "the rest by torch"

    def __init__(self) -> None:
        super().__init__(lambda result, operand: result)


def broken() -> TorchProducts:
    return Altered(too_large)


def on_gpu(dtype: torch.dtype, trial: Trial | None = None) -> tuple[TorchProducts, str]:
    """What ``auto`` chooses where there are kernels, on the CPU: their check runs there."""
    found = backends._in_order(
        [backends._checked(each, CPU, dtype, True) for each in backends._KERNELS], CPU, dtype, trial
    )
    assert found[0].products is not None
    return found[0].products, backends.report(found[0], found, CPU, dtype, trial)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cpu_multiplies_by_blocks(dtype: torch.dtype) -> None:
    by_onednn = dtype == torch.float32 and onednn.obstacle(CPU, dtype) is None
    rows = 128 if by_onednn else backends._CPU_BLOCK_ROWS[dtype]
    products, line = choose_products("auto", CPU, dtype)
    assert isinstance(products, BlockProducts) and products.block_rows == rows
    assert line.startswith(products.name) and f"blocks of {rows} rows" in line and "on cpu" in line


def test_torch_by_name() -> None:
    for device in (CPU, torch.device("cuda", 0)):  # torch is not checked: no GPU is needed
        products, line = choose_products("torch", device, torch.bfloat16)
        assert type(products) is TorchProducts
        assert "bfloat16" in line and "--muon-ns-backend" in line


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"--muon-ns-backend cublas: choose one of auto, torch, triton, emerging"):
        choose_products("cublas", CPU, torch.bfloat16)


@pytest.mark.parametrize("backend", ["emerging", "gram_newton_schulz"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_there_is_refused_by_name(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=rf"--muon-ns-backend {backend}, .* on cpu: it .*Use auto or torch"):
        choose_products(backend, CPU, dtype)


def test_wrong_backend_by_name_stops_the_run(install: Callable[..., None]) -> None:
    install("triton", broken)
    with pytest.raises(
        ConfigError, match=r"--muon-ns-backend triton.*fails the numeric check: gram of 1 x 40 x 56.*x "
    ):
        choose_products("triton", CPU, torch.bfloat16)


def test_auto_passes_over_what_fails_and_says_so(install: Callable[..., None]) -> None:
    install("gram_newton_schulz", Good, "is not there")
    install("emerging", broken)
    install("triton", Good)
    products, text = on_gpu(torch.bfloat16)
    assert products.name == "good"
    assert "6 products checked: error 1.00 x torch's" in text and "the rest by torch" in text
    assert "gram_newton_schulz is not there" in text and "emerging fails the numeric check" in text


def test_auto_ends_with_torch(install: Callable[..., None]) -> None:
    install("emerging", broken)
    install("triton", lambda: Altered(not_a_number))
    products, text = on_gpu(torch.float16)
    assert type(products) is TorchProducts
    assert "emerging fails" in text and "triton fails" in text


def test_package_that_breaks_when_loaded_is_passed_over(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device, dtype: torch.dtype) -> str:
        raise OSError("libcute.so: version mismatch")

    install("emerging", Good)
    monkeypatch.setattr(sys.modules["megatron_muon.orthogonalize.kernels.emerging"], "obstacle", fail)
    install("triton", Good)
    products, text = on_gpu(torch.bfloat16)
    assert products.name == "good" and "emerging cannot be loaded (OSError: libcute.so: version mismatch)" in text


def test_without_a_trial_the_order_is_vendor_own_emerging() -> None:
    assert list(backends._KERNELS) == ["gram_newton_schulz", "triton", "emerging", "onednn"]
    assert set(NS_BACKENDS) == {"auto", "torch", *backends._KERNELS}


class Slow(Good):
    name = "slow"

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return super().gram(x)


def trial() -> Trial:
    return Trial((2, 16, 24), lambda products, x: products.gram(x))


def test_auto_takes_the_fastest_that_is_right(install: Callable[..., None]) -> None:
    install("gram_newton_schulz", Slow)
    install("triton", broken)
    products, text = on_gpu(torch.bfloat16, trial())
    assert type(products) is TorchProducts, "right, but slower than torch"
    assert re.search(r"one iteration of 2 x 16 x 24: torch \S+ ms, gram_newton_schulz 1\d(\.\d)? ms", text), text
    assert "triton fails the numeric check" in text

    def out_of_memory(products: TorchProducts, x: torch.Tensor) -> None:
        if products.name == "slow":
            raise RuntimeError("out of shared memory\nat line 3")

    found, text = on_gpu(torch.bfloat16, Trial((2, 16, 24), out_of_memory))
    assert found.name == "torch" and "fails at 2 x 16 x 24: RuntimeError: out of shared memory" in text


def test_ranks_take_what_is_fastest_for_all_of_them() -> None:
    here, there = {"triton": 1.0, "torch": 2.0, "emerging": 0.5}, {"torch": 2.5, "triton": 4.0, "emerging": math.inf}
    assert fastest_on_all([here]) == "emerging"
    assert fastest_on_all([here, there]) == fastest_on_all([there, here]) == "torch"
    assert fastest_on_all([{"triton": 0.0, "torch": 0.0}] * 2) == "triton", "where nothing is timed, the first"
    with pytest.raises(ConfigError, match="no backend can be used on all ranks"):
        fastest_on_all([{"triton": 1.0}, {"torch": 1.0}])


def test_check_runs_once(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install("triton", Good)
    calls = []
    monkeypatch.setattr(backends, "examine", lambda *args: calls.append(args) or examine(*args))
    first = choose_products("triton", CPU, torch.bfloat16)
    assert choose_products("triton", CPU, torch.bfloat16)[0] is first[0]
    assert on_gpu(torch.bfloat16)[0] is first[0]
    assert len(calls) == 1
    choose_products("triton", CPU, torch.float16)
    assert len(calls) == 2


def test_exact_float32_on_gpus_is_torchs() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    products, line = choose_products("auto", torch.device("cuda", 0), torch.float32)
    assert type(products) is TorchProducts and "TF32" in line


# --- without Triton --------------------------------------------------------------------------------------------------

WITHOUT_TRITON = """
import sys
sys.modules.update({"triton": None, "triton.language": None, "quack": None})
import torch
import megatron_muon
from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize import Iteration, newton_schulz
from megatron_muon.orthogonalize.backends import choose_products

products, line = choose_products("auto", torch.device("cpu"), torch.float32)
print(line)
print(newton_schulz(torch.eye(2), Iteration(((1.5, -0.5, 0.0),))).tolist())
try:
    choose_products("triton", torch.device("cpu"), torch.float32)
except ConfigError as error:
    print(error)
"""


def test_cpu_needs_no_triton() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert "symmetric by blocks, float32 on cpu" in lines[0]
    assert "--muon-ns-backend triton" in lines[2] and "is not there" in lines[2]


def test_trial_is_of_the_shape_that_takes_most_operations() -> None:
    shapes = [*[(4096, 1024)] * 3, *[(1024, 4096)] * 2, *[(512, 8192)] * 9]
    weights = [Weight(shape, MatrixLayout("w")) for shape in shapes]
    weights.append(Weight((128, 100, 2048), MatrixLayout("w", stacked=True), dim=-2, group="tp", ranks=4))

    def made(products: TorchProducts) -> Orthogonalizer:
        return Orthogonalizer(iteration("quintic", 5), torch.bfloat16, products=products)

    def trial_on(device: str) -> tuple[int, int, int]:
        found = trial_of(weights, made, torch.device(device))
        assert found is not None
        return found.shape

    assert trial_on("cuda") == (128, 400, 2048), "128 x 400^2 x 2048 operations, whatever a rank has of them"
    assert trial_on("cpu") == (1, 400, 2048), "as many as are iterated together there"
    weights.pop()
    assert trial_on("cuda") == (5, 1024, 4096), "tall ones among them"
    assert trial_of([], made, CPU) is None


def test_engines_of_one_optimizer_have_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Trial | None] = []
    monkeypatch.setattr(engines, "candidates", lambda *args: asked.append(args[3]) or backends.candidates(*args))
    params = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
    optimizer = Muon(params)
    optimizer.prepare()
    params[1].grad = torch.ones(4, 6)
    optimizer.step()  # an engine of its own: for one of the weights
    assert [trial.shape for trial in asked if trial] == [(2, 4, 6)]

"""The Triton kernel, compiled for several GPUs without one: tensor cores, shared memory, addresses, launches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to test")

from megatron_muon.orthogonalize.kernels import triton_symmetric  # noqa: E402
from megatron_muon.orthogonalize.kernels.triton_symmetric import (  # noqa: E402
    Tile,
    symmetric_product,
)
from tests.unit.test_triton_symmetric import Process, is_interpreted  # noqa: E402


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    assert not process.run(is_interpreted)
    yield process
    process.pool.close()


def compiled(capability: int, dtype: str, precision: str, tile: Tile) -> tuple[int, str, str]:
    """Shared memory, Triton's intermediate form, and PTX of the kernel for row-major operands."""
    kernel = triton_symmetric._symmetric_kernel
    constants = {"a_inner": 1, "b_inner": 1, "c_column": 1, "HAS_C": True, "PRECISION": precision, "GROUP": 8}
    constants |= {"DEPTH": 32 if dtype == "fp32" else 64, "SIZE": tile.size}
    types = {name: "i32" for name in kernel.arg_names}
    types |= {name: f"*{dtype}" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {"alpha": "fp32", "beta": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(
        kernel,
        types,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if types[name] in ("i32", f"*{dtype}") and not name.endswith("_bucket")
        },
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=target, options=options)
    assert len(binary.asm["cubin"]) > 0
    return binary.metadata.shared, binary.asm["ttir"], binary.asm["ptx"]


TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of 8.6 and 8.9, which run code for 8.0


@pytest.mark.parametrize(
    "capability,dtype,precision,tiles",
    [
        # Each GPU and each type once; each tile on Hopper.
        pytest.param(80, "fp16", "ieee", triton_symmetric.TILES[-1:], marks=pytest.mark.slow),
        (80, "fp32", "tf32", triton_symmetric.TILES[-1:]),
        (90, "fp16", "ieee", triton_symmetric.TILES),
        pytest.param(90, "bf16", "ieee", triton_symmetric.TILES[:1], marks=pytest.mark.slow),
        pytest.param(90, "fp32", "tf32", triton_symmetric.TILES[-1:], marks=pytest.mark.slow),
        (100, "bf16", "ieee", triton_symmetric.TILES[-1:]),
    ],
)
def test_compiles_to_tensor_cores(
    compiler: Process, capability: int, dtype: str, precision: str, tiles: tuple[Tile, ...]
) -> None:
    for tile in tiles:
        shared, _, ptx = compiler.run(compiled, capability, dtype, precision, tile)
        assert shared <= SHARED_MEMORY[capability]
        assert TENSOR_CORES[capability] in ptx


def test_all_pointers_move_by_64_bits(compiler: Process) -> None:
    _, ttir, _ = compiler.run(compiled, 90, "fp16", "ieee", triton_symmetric.TILES[0])
    moves = re.findall(r"tt\.addptr .*? : .*?, (.*?)(?: loc|$)", ttir, re.MULTILINE)
    assert len(moves) >= 12  # a, b, c, out and its mirror image, and the steps over k
    assert all(re.fullmatch(r"(tensor<[\dx]*i64>|i64)", move) for move in moves), set(moves)


class Driver:
    """Stands in for Triton's driver of a GPU: kernels are compiled for Hopper and timed as equal."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda launch, **options: (launch(), [1.0, 1.0, 1.0])[1]


def launches(*shapes: tuple[int, int, int]) -> list[list[tuple[Tile, tuple[int, ...]]]]:
    """How the kernel is launched, the autotuner's trials included, for ``X X^T`` of each shape: tile and grid."""
    triton.runtime.driver.set_active(Driver())
    run, made = triton.JITFunction.run, []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made[-1].append((Tile(options["SIZE"], options["num_warps"], options["num_stages"]), grid(options)))
        return run(self, *args, grid=grid, warmup=True, **options)  # compiles and stops there

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        for batch, p, k in shapes:
            made.append([])
            x = torch.zeros(batch, p, k, dtype=torch.bfloat16)
            symmetric_product(x, x.mT)
            made.append([])
            symmetric_product(x, x.mT, x.new_zeros(batch, p, p), tile=triton_symmetric.TILES[1])
    return made


def test_launches_are_tuned_once_for_sizes_alike(compiler: Process) -> None:
    """Triton's own way from the call to the compiled kernel, up to the launch."""
    grids = {64: (2 * 36,), 128: (2 * 10,)}
    first, fixed, alike, _ = compiler.run(launches, (2, 512, 1024), (2, 500, 1000))
    trials = first[:-1]
    assert sorted({(tile.size, tile.warps, tile.stages) for tile, _ in trials}) == sorted(
        (tile.size, tile.warps, tile.stages) for tile in triton_symmetric.TILES
    )
    assert all(grid == grids[tile.size] for tile, grid in first)
    assert fixed == [(triton_symmetric.TILES[1], grids[128])]
    assert len(alike) == 1 and alike[0][0] == first[-1][0]


def test_obstacles_without_interpreter(compiler: Process) -> None:
    cpu = torch.device("cpu")
    text = compiler.run(triton_symmetric.obstacle, cpu, torch.float16)
    assert "TRITON_INTERPRET=1" in text
    assert compiler.run(triton_symmetric.obstacle, torch.device("cuda", 0), torch.float16) is None
    assert "float32 only" in compiler.run(triton_symmetric.obstacle, cpu, torch.float64)

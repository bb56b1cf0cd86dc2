"""The Triton kernels, compiled for several GPUs without one: tensor cores, shared memory, addresses, launches."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to test")
import triton.language as tl  # noqa: E402

from megatron_muon.orthogonalize.kernels import triton_elementwise, triton_symmetric  # noqa: E402
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


# --- elementwise passes ----------------------------------------------------------------------------------------------


def elementwise_ptx(name: str, types: tuple[Any, ...], **options: bool) -> str:
    kernel = getattr(triton_elementwise, f"_{name}_kernel")
    constants = {"TYPES": types, "ALIGNED": True, **options}
    scalars = {"table": "*i64", "programs": "*i64", "rate_bits": "i64", "from_grad": "i32", "from_momentum": "i32"}
    signature = {each: scalars.get(each, "fp32") for each in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    source = triton.compiler.ASTSource(kernel, signature, values)
    ptx: str = triton.compile(source, target=target, options={"num_warps": 8, "enable_fp_fusion": False}).asm["ptx"]
    return ptx


def test_bytes_and_rounding_of_elementwise_kernels(compiler: Process) -> None:
    """24 bytes for each element of a float32 weight, 16 at a time; torch's own passes take 48, with Nesterov."""
    found = []
    for name, types, options in (
        ("pack", (tl.float32, tl.float32, tl.bfloat16), {"UPDATES": True, "MIXES": True}),
        ("add", (tl.float32, tl.bfloat16, tl.bfloat16), {}),
    ):
        ptx = compiler.run(functools.partial(elementwise_ptx, **options), name, types)
        elements = triton_elementwise._BLOCK.value // 256  # of each of 8 warps' threads
        moved = re.findall(r"(?:ld|st)\.global\.(\w+)(?:\.b32)? ", ptx)
        assert set(moved) == {"b64", "v4"}, "entries of the table, and 16 bytes at once"
        found.append(moved.count("v4") * 16 / elements)
        assert not re.search(r"\.ftz|\batom|\bred\b|bar\.red", ptx)
        assert ptx.count("fma.rn.f32") == elements * (2 if name == "pack" else 1)
    assert found == [14, 10]


def elementwise_launches() -> tuple[list[str], int]:
    """Of two steps that differ in addresses, rates and momentum; and how many kernels were compiled for them."""
    triton.runtime.driver.set_active(Driver())
    run, made = triton.JITFunction.run, []

    def record(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        made.append(self.__name__)
        return run(self, *args, warmup=True, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        for momentum, lr in ((0.95, 0.02), (0.4, 0.0)):
            lists = [[torch.zeros(16, 16 * (1 + n % 5)) for n in range(50)] for _ in range(3)]
            assert triton_elementwise.pack(*lists, momentum, momentum)
            assert triton_elementwise.add(lists[0], lists[2], [0.2 * n for n in range(50)], lr, 1.0 - lr)
    kernels = (triton_elementwise._pack_kernel, triton_elementwise._add_kernel)
    return made, sum(len(kernel.device_caches[0][0]) for kernel in kernels)


def test_one_launch_for_all_matrices_and_no_compilation_later(compiler: Process) -> None:
    made, compiled_kernels = compiler.run(elementwise_launches)
    assert made == ["_pack_kernel", "_add_kernel"] * 2
    assert compiled_kernels == 2


def test_obstacles_without_interpreter(compiler: Process) -> None:
    cpu = torch.device("cpu")
    text = compiler.run(triton_symmetric.obstacle, cpu, torch.float16)
    assert "TRITON_INTERPRET=1" in text
    assert compiler.run(triton_symmetric.obstacle, torch.device("cuda", 0), torch.float16) is None
    assert "float32 only" in compiler.run(triton_symmetric.obstacle, cpu, torch.float64)

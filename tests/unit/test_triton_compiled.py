"""The Triton kernels, compiled for several GPUs without one: tensor cores, shared memory, addresses, launches."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to test")
from megatron_muon.optimizers import codecs  # noqa: E402
from megatron_muon.orthogonalize.kernels import (  # noqa: E402
    triton_codecs,
    triton_elementwise,
    triton_symmetric,
    triton_tuning,
)
from megatron_muon.orthogonalize.kernels.triton_symmetric import symmetric_product  # noqa: E402
from megatron_muon.orthogonalize.kernels.triton_tuning import Tile  # noqa: E402
from megatron_muon.orthogonalize.switches import matmul_precision  # noqa: E402
from tests.unit.test_auto_alternatives import MODELS  # noqa: E402
from tests.unit.test_triton_symmetric import Process, is_interpreted  # noqa: E402


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    assert not process.run(is_interpreted)
    yield process
    process.pool.close()


class Driver:
    """Stands in for Triton's driver of a GPU: kernels are compiled for it."""

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0


def launched(work: Callable[[], object], capability: int = 90) -> list[tuple[Any, dict[str, Any]]]:
    """The compiled kernels that some work would launch, each with its grid and options: it stops there."""
    triton.runtime.driver.set_active(Driver(capability))
    run, made = triton.JITFunction.run, list[tuple[Any, dict[str, Any]]]()

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        made.append((kernel, {**options, "grid": grid, "name": self.__name__}))
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        work()
    return made


@dataclass(frozen=True)
class Compiled:
    """What is asked of a compiled kernel.

    Attributes:
        tile: that it was made for.
        shared: bytes of shared memory.
        stack: bytes of local memory of a thread: registers that did not suffice, or arrays.
        ttir: Triton's intermediate form.
        ptx: assembly.
    """

    tile: Tile
    shared: int
    stack: int
    ttir: str
    ptx: str

    @classmethod
    def of(cls, kernel: Any, options: dict[str, Any]) -> Compiled:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        (usage,) = re.findall(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
        tile = Tile(options.get("SIZE", 0), options["num_warps"], options.get("num_stages", 0))
        return cls(tile, kernel.metadata.shared, sum(map(int, usage)), kernel.asm["ttir"], kernel.asm["ptx"])

    def moves(self) -> list[str]:
        """Types of what is added to pointers."""
        return re.findall(r"tt\.addptr .*? : .*?, (.*?)(?: loc|$)", self.ttir, re.MULTILINE)

    def widths(self) -> set[int]:
        """Bytes that a thread moves at once to or from global memory."""
        copied = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], 0x(\w+)", self.ptx)
        found = {int(size, 16) for size in copied}
        for count, bits in re.findall(r"(?:ld|st)\.global(?:\.L1::\w+)?(?:\.v(\d))?\.b(\d+)", self.ptx):
            found.add(int(count or 1) * int(bits) // 8)
        return found


KINDS = ("wide", "tall", "square")


def operands(kind: str, p: int, q: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of a batch of two on a device without memory: X X^T of wide or tall matrices, and b R + c R R."""
    shape = {"wide": (2, p, q), "tall": (2, q, p), "square": (2, p, p)}[kind]
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.mT if kind == "tall" else x
    return x, x.mT, x if kind == "square" else None


def compiled(
    capability: int,
    dtype: torch.dtype,
    kinds: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    tiles: Sequence[Tile | None],
) -> list[Compiled]:
    """The kernels that differ, for float32 products by TF32."""

    def multiply() -> None:
        with matmul_precision("high"):
            for kind, (p, q), tile in itertools.product(kinds, shapes, tiles):
                symmetric_product(*operands(kind, p, q, dtype), tile=tile)

    found = {kernel.hash: (kernel, options) for kernel, options in launched(multiply, capability)}
    return [Compiled.of(*each) for each in found.values()]


TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of 8.6 and 8.9, which run code for 8.0
SHAPES = sorted({(min(m, n), max(m, n)) for shapes in MODELS.values() for m, n, _ in shapes})
STACK = 16
"""Bytes of memory of a thread: room for four registers at most, which one of the kernels for 10.0 takes."""

DTYPES = {80: torch.float32, 90: torch.float16, 100: torch.bfloat16}
"""Each GPU and each type once, in the quick tests."""


def check(capability: int, kernel: Compiled) -> None:
    assert kernel.shared <= SHARED_MEMORY[capability]
    assert kernel.stack <= STACK
    assert TENSOR_CORES[capability] in kernel.ptx
    # 64 bits for a, b, out and its mirror image, c, and the steps over k
    assert len(kernel.moves()) >= 11
    assert all(re.fullmatch(r"(tensor<[\dx]*i64>|i64)", move) for move in kernel.moves()), set(kernel.moves())


@pytest.mark.parametrize(
    "capability,dtype,kinds,tiles",
    [
        *(
            (each, dtype, (KINDS[number],), triton_symmetric.TILES[-1:])
            for number, (each, dtype) in enumerate(DTYPES.items())
        ),
        *(
            pytest.param(each, dtype, KINDS, triton_symmetric.TILES, marks=pytest.mark.slow)
            for each in TENSOR_CORES
            for dtype in triton_symmetric.DTYPES
        ),
    ],
)
def test_kernels_of_the_models(
    compiler: Process, capability: int, dtype: torch.dtype, kinds: Sequence[str], tiles: Sequence[Tile]
) -> None:
    """All their sizes are multiples of 16, and come to one kernel for each kind of product and tile."""
    found = [each for kind in kinds for each in compiler.run(compiled, capability, dtype, (kind,), SHAPES, tiles)]
    assert len(found) == len(kinds) * len(tiles)
    # Tensor cores of 9.0 and 10.0 take TF32 along k alone: tall matrices are turned on their way to shared memory.
    turned = int(capability >= 90 and dtype == torch.float32 and "tall" in kinds) * len(tiles)
    assert sorted(map(sorted, map(Compiled.widths, found))) == [[4, 16]] * turned + [[16]] * (len(found) - turned)
    for kernel in found:
        check(capability, kernel)


@pytest.mark.parametrize(
    "capability,dtype,kinds",
    [
        (90, torch.float16, ("square",)),
        *(
            pytest.param(each, dtype, KINDS, marks=pytest.mark.slow)
            for each in TENSOR_CORES
            for dtype in triton_symmetric.DTYPES
        ),
    ],
)
def test_kernels_of_sizes_that_are_no_multiples(
    compiler: Process, capability: int, dtype: torch.dtype, kinds: Sequence[str]
) -> None:
    """Each element has its own address: large tiles of these took 512 bytes of memory for each thread."""
    found = compiler.run(compiled, capability, dtype, kinds, [(1001, 1003)], [None])
    assert len(found) == len(kinds)
    for kernel in found:
        assert kernel.tile == triton_symmetric.UNALIGNED
        check(capability, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", triton_symmetric.DTYPES)
@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_kernels_of_matrices_beyond_32_bits(compiler: Process, capability: int, dtype: torch.dtype) -> None:
    """More than 2^31 elements each: strides are numbers of 64 bits, which take registers."""
    for kind in KINDS:
        for kernel in compiler.run(compiled, capability, dtype, (kind,), [(65536, 65536)], triton_symmetric.TILES):
            check(capability, kernel)


# --- tuning ----------------------------------------------------------------------------------------------------------

SECONDS = {64: 3.0, 128: 2.0}
"""What trials of tiles of one size take here."""


def tuned(*shapes: tuple[int, int, int], anew: bool = False) -> list[tuple[list[Tile], Tile, int]]:
    """For ``X X^T`` of each shape the tiles that were tried, the one that was launched, and on how many tiles.

    Nothing is compiled. ``anew``: as in a process that starts now.
    """
    launches, found = list[tuple[Tile, int]](), []

    def record(self: Any, *args: Any, grid: tuple[int], **options: Any) -> None:
        launches.append((Tile(options["SIZE"], options["num_warps"], options["num_stages"]), grid[0]))

    def time(launch: partial[None], warmup: int, rep: int, **_: Any) -> float:
        assert warmup + rep <= 25  # ms
        launch()
        tile, _ = launches[-1]
        return SECONDS[tile.size] - tile.stages

    if anew:
        triton_tuning._known.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        patch.setattr(triton.testing, "do_bench", time)
        for batch, p, k in shapes:
            launches.clear()
            x = torch.empty(batch, p, k, dtype=torch.bfloat16, device="meta")
            symmetric_product(x, x.mT)
            found.append(([tile for tile, _ in launches[:-1]], *launches[-1]))
    return found


def tuned_once(cache: Path) -> None:
    all_tiles, best = list(triton_symmetric.TILES), Tile(128, 8, 4)
    shapes = ((2, 512, 1024), (2, 512, 2048))
    first, alike, other = tuned(shapes[0], (2, 496, 1008), shapes[1])
    assert first == (all_tiles, best, 2 * 10)
    assert alike == ([], best, 2 * 10)
    assert other == first
    (file, *more) = cache.glob("*/tile.json")
    assert len(more) == 1, "one file for each kind of product, replaced as a whole"
    assert tuned(*shapes, anew=True) == [alike, alike]
    for text in ("", "{", "[1, 2]", "null", '{"size": 64}', '{"size": 256, "warps": 4, "stages": 2}'):
        file.write_text(text)
        assert sorted(tried == [] for tried, *_ in tuned(*shapes, anew=True)) == [False, True], text
        assert tuned(*shapes, anew=True) == [alike, alike]
    with pytest.MonkeyPatch.context() as patch:  # no folder can be made here: tiles are tried, and not remembered
        patch.setenv("TRITON_CACHE_DIR", str(file / "cache"))
        assert tuned(*shapes, anew=True) == [first, other]


def test_sizes_alike_are_tuned_once_and_known_to_later_processes(compiler: Process) -> None:
    """Whatever lies in the file: what is broken or another's is written anew."""
    compiler.run(tuned_once, Path(compiler.environment["TRITON_CACHE_DIR"]))


def test_tiles_that_a_gpu_cannot_run_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def time(launch: partial[None], **_: Any) -> float:
        launch()
        return 1.0

    def launch(tile: Tile) -> None:
        if tile.size in broken:
            raise RuntimeError("out of resources")

    monkeypatch.setattr(triton.testing, "do_bench", time)
    broken = {128}
    assert triton_tuning._tried(triton_symmetric.TILES, launch) == Tile(64, 4, 4)
    broken = {64, 128}
    with pytest.raises(RuntimeError, match="out of resources"):
        triton_tuning._tried(triton_symmetric.TILES, launch)


# --- elementwise passes ----------------------------------------------------------------------------------------------


def elementwise_work() -> None:
    """Of two steps that differ in addresses, rates and momentum."""
    for momentum, lr in ((0.95, 0.02), (0.4, 0.0)):
        weights, grads = ([torch.zeros(16, 16 * (1 + n % 5)) for n in range(50)] for _ in range(2))
        slots = [torch.zeros_like(weight, dtype=torch.bfloat16) for weight in weights]
        assert triton_elementwise.pack(weights, grads, slots, momentum, momentum)
        assert triton_elementwise.add(weights, slots, [0.2 * n for n in range(50)], lr, 1.0 - lr)


def elementwise_compiled(capability: int) -> list[tuple[str, Compiled]]:
    made = [(options["name"], kernel, options) for kernel, options in launched(elementwise_work, capability)]
    assert [name for name, *_ in made] == ["_pack_kernel", "_add_kernel"] * 2, "one launch for all matrices"
    assert [kernel.hash for _, kernel, _ in made[:2]] == [kernel.hash for _, kernel, _ in made[2:]]
    return [(name, Compiled.of(kernel, options)) for name, kernel, options in made[:2]]


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def test_bytes_and_rounding_of_elementwise_kernels(compiler: Process, capability: int) -> None:
    """24 bytes for each element of a float32 weight, 16 at a time; torch's own passes take 48, with Nesterov."""
    found = []
    for name, kernel in compiler.run(elementwise_compiled, capability):
        ptx = kernel.ptx
        elements = triton_elementwise._BLOCK.value // 256  # of each of 8 warps' threads
        moved = re.findall(r"(?:ld|st)\.global\.(\w+)(?:\.b32)? ", ptx)
        assert set(moved) == {"b64", "v4"}, "entries of the table, and 16 bytes at once"
        found.append(moved.count("v4") * 16 / elements)
        assert not re.search(r"\.ftz|\batom|\bred\b|bar\.red", ptx)
        fused = ptx.count("fma.rn.f32") + ptx.count("fma.rn.f32x2")  # two at once on 10.0
        assert fused == elements * (2 if name == "_pack_kernel" else 1)
        assert kernel.stack == 0
        of_elements = [move for move in kernel.moves() if move.startswith("tensor")]
        assert len(of_elements) == (2 if name == "_add_kernel" else 3)
        assert set(of_elements) == {f"tensor<{triton_elementwise._BLOCK.value}xi64>"}, "a weight may have 2^31 elements"
    assert found == [14, 10]


def codecs_work() -> None:
    numbers = codecs._numbers(torch.device("cpu"))
    for name, form in codecs._FORMS.items():
        planes = [codecs._kept(form, rows).planes for rows in numbers]
        assert triton_codecs.read(name, planes) is not None and triton_codecs.keep(name, planes, numbers)


def codecs_compiled(capability: int) -> list[tuple[str, Compiled]]:
    return [(options["name"], Compiled.of(kernel, options)) for kernel, options in launched(codecs_work, capability)]


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_of_other_forms(compiler: Process, capability: int) -> None:
    """One launch for all weights; 16 bytes at a time of what is of full length; nothing of a thread in local memory."""
    found = compiler.run(codecs_compiled, capability)
    assert [name for name, _ in found] == ["_read_remainder", "_keep_remainder", "_read_int8", "_keep_int8"]
    for name, kernel in found:
        assert kernel.stack == 0 and 16 in kernel.widths(), name
        assert not re.search(r"\.ftz|\batom|div\.full|div\.approx", kernel.ptx), name


def test_obstacles_without_interpreter(compiler: Process) -> None:
    cpu = torch.device("cpu")
    text = compiler.run(triton_symmetric.obstacle, cpu, torch.float16)
    assert "TRITON_INTERPRET=1" in text
    assert compiler.run(triton_symmetric.obstacle, torch.device("cuda", 0), torch.float16) is None
    assert "float32 only" in compiler.run(triton_symmetric.obstacle, cpu, torch.float64)

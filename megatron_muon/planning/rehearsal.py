"""The step of a rank, carried out on tensors without contents: whoever sees its operations knows what a step takes.

They are on torch's ``meta`` device, and say that they are on a GPU if the engine is for one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_muon.engine.callbacks import Read, Write
from megatron_muon.engine.exchange import Counters, Exchange
from megatron_muon.engine.run import RankChunk, Run
from megatron_muon.engine.slices import Slices
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.param_step import ParamStep, add, pack
from megatron_muon.optimizers.rates import Options
from megatron_muon.optimizers.storage import initial, master_of, momentum_of
from megatron_muon.orthogonalize.kernels import KernelProducts
from megatron_muon.orthogonalize.scale import scale_factor

_META = torch.device("meta")


class Group:
    """What an engine asks of a process group before it sends anything."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    @classmethod
    def of(cls, size: int, rank: int = 0) -> dist.ProcessGroup:
        """A group of some size."""
        return cast(dist.ProcessGroup, cls(size, rank))

    def rank(self) -> int:
        """This rank's number."""
        return self._rank

    def size(self) -> int:
        """How many ranks."""
        return self._size


Seen = Callable[[torch.Tensor, int, float], None]
"""Is told of a product with a symmetric result: first matrices, columns of the second, share of the operations done."""


class SymmetricKernel(KernelProducts):
    """Stands for any kernel that computes half of a symmetric result: a plan counts its operations."""

    name = "a symmetric kernel"

    def __init__(self, kernel: KernelProducts | None = None, seen: Seen | None = None) -> None:
        """
        Args:
            kernel: whose sizes it takes.
            seen: is told of its products.
        """
        kernel = kernel or KernelProducts()
        super().__init__(kernel.smallest)
        self.multiple, self._seen = kernel.multiple, seen

    def symmetric(
        self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
    ) -> torch.Tensor:
        """See :class:`megatron_muon.orthogonalize.kernels.KernelProducts`; without contents."""
        (batch, p, inner), n = a.shape, b.size(-1)
        if self._seen is not None:
            self._seen(a, n, self.symmetric_flops(p, inner) / (2 * p * p * inner))
        return a.new_empty(batch, p, n)


class _OnGPU(TorchFunctionMode):
    """Has all tensors say that they are on a GPU, so that what is done there is done where that makes a difference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func == _IS_CUDA or func(*args, **(kwargs or {}))


_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class Forms(NamedTuple):
    """How the numbers of weights are kept.

    Attributes:
        master: one of :data:`megatron_muon.choices.MASTERS`, of bfloat16 weights.
        momentum: one of :data:`megatron_muon.choices.MOMENTUM_DTYPES`.
        gradient: type of the numbers of gradients; None: the weights' own.
        offload: one of :data:`megatron_muon.choices.OFFLOADS`.
        window_mb: bound of a window of what is on the host, in MiB; 0: the default of GPUs.
    """

    master: str = "fp32"
    momentum: str = "auto"
    gradient: torch.dtype | None = None
    offload: str = "none"
    window_mb: float = 0.0


PLAIN_FORMS = Forms()


class TorchPasses:
    """Fills batches and takes results, as an optimizer does, by torch's own operations."""

    def __init__(
        self, engine: StepEngine, chunks: Sequence[RankChunk], nesterov: bool, forms: Forms = PLAIN_FORMS
    ) -> None:
        options = Options(
            lr=1.0,
            momentum=0.5,
            nesterov=0.5 if nesterov else 1.0,
            kept=0.5,
            l2=0.0,
            cautious=None,
            scale_mode="spectral",
            extra_scale_factor=1.0,
            ball_radius=1.0,
            damping_depth=0.0,
        )
        self.weights: dict[int, ParamStep] = {}
        group: dict[str, Any] = {}

        @cache
        def tensors_of(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            """Weight, gradient and state: without contents, those of weights of one shape may be the same."""
            remains = forms.master == "remainder"
            param = torch.empty(shape, dtype=torch.bfloat16 if remains else engine.local_dtype, device=_META)
            state = initial(param, forms.master, forms.momentum)
            return param, torch.empty(shape, dtype=forms.gradient or engine.local_dtype, device=_META), state

        for number in {number for mine in chunks for some in mine.slices for number in some.numbers}:
            weight = engine.plan.weights[number]
            param, grad, state = tensors_of(weight.shape)
            kept = momentum_of(state), master_of(param, state)
            self.weights[number] = ParamStep(group, options, param, weight.layout, grad, state, *kept, ())

    @property
    def given(self) -> Iterator[torch.Tensor]:
        """What is there before the step."""
        for weight in self.weights.values():
            yield from (weight.raw_grad, *weight.momentum.planes, *weight.master.planes)

    def read(self, slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
        """See :data:`megatron_muon.engine.callbacks.Read`."""
        pack(self.weights, slices, batches, first=True)

    def write(self, slices: Sequence[Slices], batches: Sequence[torch.Tensor], reduce: object) -> None:
        """See :data:`megatron_muon.engine.callbacks.Write`."""
        add(self.weights, slices, batches, lambda weight, item: scale_factor("spectral", item.rows, item.columns))


class Rehearsal:
    """A step of a rank.

    Attributes:
        engine: of the rank.
        groups: of the plan, by name.
        chunks: what the rank has of the plan.
        on_gpu: whether the engine is for one.
    """

    def __init__(self, engine: StepEngine, group_ranks: Mapping[str, int]) -> None:
        """
        Args:
            engine: plan, types of numbers, products and kind of device count.
            group_ranks: the rank's number in each group of the plan, and maybe in others.
        """
        self.engine, plan = engine, engine.plan
        sizes = {weight.group: weight.ranks for weight in plan.weights}
        sizes |= {chunk.group: len(chunk.batches[0].key.parts) for chunk in plan.chunks}
        self.groups = {name: Group.of(sizes[name], rank) for name, rank in group_ranks.items() if name in sizes}
        ranks = {"": 0, **group_ranks}
        self.chunks = [RankChunk.of(plan.weights, chunk, ranks[chunk.group]) for chunk in plan.chunks]
        self.on_gpu = engine.wire.device.type == "cuda"

    def run(self, exchanges: Mapping[str, Exchange], read: Read, write: Write, seen: Seen | None = None) -> Run:
        """For the work on chunks; see :class:`SymmetricKernel` for ``seen``."""
        orthogonalizer, wire = copy.copy(self.engine.orthogonalizer), replace(self.engine.wire, device=_META)
        if isinstance(orthogonalizer.products, KernelProducts):
            orthogonalizer.products = SymmetricKernel(orthogonalizer.products, seen)
        dtype = self.engine.local_dtype
        return Run(orthogonalizer, exchanges, wire, dtype, Counters(), (read,), write)

    @contextlib.contextmanager
    def under(self, mode: TorchDispatchMode) -> Iterator[None]:
        """Operations are as on the engine's device, and a mode sees them."""
        with torch.no_grad(), _OnGPU() if self.on_gpu else contextlib.nullcontext(), mode:
            yield


def tensors(values: Any) -> list[torch.Tensor]:
    """All tensors in lists and the like."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]

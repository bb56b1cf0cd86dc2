"""How long a step takes on a device: the step itself, on tensors without contents, with a clock in place of the device.

Every operation of the engine's plan is carried out on torch's ``meta`` device, and adds to the clock what a table of
rates says of its kind and size (:mod:`megatron_muon.planning.rates`). So what is counted is what a step does: its
products, passes over memory, packing, messages and launches, in its order, with messages under way meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_muon.engine.exchange import Counters, Exchange
from megatron_muon.engine.execute import execute
from megatron_muon.engine.slices import Slices
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.forms import BLOCK
from megatron_muon.orthogonalize.switches import float32_is_exact
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.rehearsal import PLAIN_FORMS, Forms, Rehearsal, TorchPasses, tensors

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")

_OVERWRITE = ("copy_", "_foreach_copy_", "zero_", "fill_")
"""Operations in place that do not read what they change."""


@dataclass
class Times:
    """Seconds of one rank's step.

    Attributes:
        products: matrix products.
        passes: elementwise passes, copies and norms.
        within: waiting for messages of ranks of the same node.
        between: waiting for messages of other nodes.
        launches: of the host, as far as nothing else is done meanwhile.
        operations: how many the host starts.
    """

    products: float = 0.0
    passes: float = 0.0
    within: float = 0.0
    between: float = 0.0
    launches: float = 0.0
    operations: int = 0

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.products + self.passes + self.within + self.between + self.launches

    def __add__(self, other: Times) -> Times:
        return Times(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class Clock(TorchDispatchMode):
    """Adds up what operations take by a table of rates.

    Attributes:
        times: so far.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates, self.times = rates, Times()
        self._now = 0.0
        self._free = {"within": 0.0, "between": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.times.operations += 1
        self._operation(func.overloadpacket.__name__, args, kwargs or {}, result)
        return result

    def _operation(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        given, made = tensors((args, kwargs)), tensors(result)
        if name in _PRODUCTS:
            left, right = args[-2:]
            batch = left.size(0) if left.dim() == 3 else 1
            self.product(left.dtype, batch, left.size(-2), right.size(-1), left.size(-1))
            if name in ("addmm", "baddbmm"):  # BLAS adds to its output: what is added is copied there
                self.copied(2 * made[0].numel() * made[0].element_size())
        elif name in ("linalg_vector_norm", "_foreach_norm"):
            self.copied(_bytes(given), "norm")
        elif not name.startswith(("empty", "new_empty")) and not _is_view(given, made):
            # What is changed in place, or given to be filled, is among both.
            known = {id(tensor) for tensor in given}
            size = _bytes(given) + _bytes(tensor for tensor in made if id(tensor) not in known)
            is_changed = name.endswith("_") and name not in _OVERWRITE
            self.copied(size + (_bytes(tensors(args[0])) if is_changed else 0), _kind(name, given))

    def product(self, dtype: torch.dtype, batch: int, m: int, n: int, k: int, share: float = 1.0) -> None:
        """A product of matrices; see :meth:`Rates.product_seconds`."""
        numbers = "tf32" if dtype == torch.float32 and not float32_is_exact() else str(dtype).removeprefix("torch.")
        seconds = self.rates.product_seconds(numbers, batch, m, n, k, share)
        self._now += seconds
        self.times.products += seconds

    def symmetric(self, x: torch.Tensor, columns: int, share: float) -> None:
        """A product with a symmetric result, by a kernel that does a share of its operations."""
        batch, p, inner = x.shape
        self.product(x.dtype, batch, p, columns, inner, share)

    def copied(self, size: float, what: str = "") -> None:
        """A pass over memory; see :meth:`Rates.pass_seconds`."""
        if size:
            seconds = self.rates.pass_seconds(size, what)
            self._now += seconds
            self.times.passes += seconds

    def sent(self, link: str, size: float) -> float:
        """A message is under way; when it has arrived. Those of one link follow one another."""
        done = max(self._now, self._free[link]) + self.rates.message_seconds(link, size)
        self._free[link] = done
        if not self.rates.overlaps:
            self.wait(link, done)
        return done

    def wait(self, link: str, until: float) -> None:
        """Until a message has arrived."""
        waited = max(0.0, until - self._now)
        self._now += waited
        setattr(self.times, link, getattr(self.times, link) + waited)

    def finish(self) -> Times:
        """What it all took."""
        host = self.times.operations * self.rates.numbers["launch"]
        launches = max(0.0, host - self._now) if self.rates.overlaps else host
        return replace(self.times, launches=launches)


class _Messages(Exchange):
    """Collectives of a group that only take their time."""

    def __init__(self, group: dist.ProcessGroup, clock: Clock, link: str) -> None:
        super().__init__(group, Counters(), sends=False)
        self._clock, self._link = clock, link
        self._arrives: float | None = None

    def count(self, sent: float) -> None:
        """A message begins. One that nobody has waited for has arrived before: members of a split wait at once."""
        if self._arrives is not None:
            self._clock.wait(self._link, self._arrives)
        self._arrives = self._clock.sent(self._link, sent)

    def _start(self, collective: Callable[..., dist.Work | None], *args: Any) -> dist.Work | None:
        arrives, self._arrives = self._arrives, None
        assert arrives is not None, "counted before"
        return cast(dist.Work, _Work(self._clock, self._link, arrives))


@dataclass(frozen=True)
class _Work:
    clock: Clock
    link: str
    arrives: float

    def wait(self) -> None:
        self.clock.wait(self.link, self.arrives)


_COPY = 4.0
"""Bytes of a number that is put together for the step, in float32."""

_MOMENTUM = {"bf16": 2.0, "int8": 1 + 4 / BLOCK}
_REMAINDER = 2 + 2 + 1 / 8


@dataclass
class _Kernels:
    """Counts one kernel for each pass, as Triton's on GPUs; other forms take one before and one behind."""

    engine: StepEngine
    clock: Clock
    forms: Forms

    def read(self, slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
        self._pass(
            batches, 3, _MOMENTUM.get(self.forms.momentum)
        )  # read: momentum and gradient; written: momentum, batch

    def write(self, slices: Sequence[Slices], batches: Sequence[torch.Tensor], reduce: object) -> None:
        self._pass(
            batches, 2, _REMAINDER if self.forms.master == "remainder" else None
        )  # weight and update, the weight

    def _pass(self, batches: Sequence[torch.Tensor], own: int, kept: float | None) -> None:
        for batch in batches:
            for _ in range(0 if kept is None else 2):
                self._kernel(batch, (kept or 0.0) + _COPY)
            self._kernel(batch, own * self.engine.local_dtype.itemsize + batch.element_size())

    def _kernel(self, batch: torch.Tensor, each: float) -> None:
        self.clock.times.operations += 1
        self.clock.copied(batch.numel() * each)


def step_times(
    engine: StepEngine,
    rates: Rates,
    group_ranks: Mapping[str, int],
    spans: Mapping[str, int],
    *,
    nesterov: bool,
    forms: Forms = PLAIN_FORMS,
) -> Times:
    """How long a rank's step takes: momentum, Newton-Schulz with its messages, and the addition to the weights.

    Call it under the step's precision of float32 products.

    Args:
        engine: of the rank; plan, types of numbers and products count.
        rates: of the device.
        group_ranks: the rank's number in each group of the plan.
        spans: how many consecutive ranks of the run each group reaches over: within a node, or beyond.
        nesterov: whether gradient and momentum are mixed; weights decay.
        forms: how numbers are kept.
    """
    clock, rehearsal, node = Clock(rates), Rehearsal(engine, group_ranks), rates.numbers["node"]
    exchanges = {
        name: _Messages(group, clock, "within" if spans[name] <= node else "between")
        for name, group in rehearsal.groups.items()
    }
    passes = (
        _Kernels(engine, clock, forms) if rehearsal.on_gpu else TorchPasses(engine, rehearsal.chunks, nesterov, forms)
    )
    run = rehearsal.run(exchanges, passes.read, passes.write, clock.symmetric)
    with rehearsal.under(clock):
        execute(run, rehearsal.chunks)
    return clock.finish()


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kind(name: str, given: Sequence[torch.Tensor]) -> str:
    """Of a pass, if it is none from memory to memory in the order of both."""
    large = [tensor for tensor in given if tensor.dim() > 0]
    if name == "copy_" and len({tensor.stride(-1) == 1 for tensor in large if tensor.numel()}) > 1:
        return "turn"
    return "cast" if len({tensor.dtype for tensor in large}) > 1 else ""


def _is_view(given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> bool:
    """Whether an operation only looks at its first tensor in another way."""
    return (
        bool(given)
        and bool(made)
        and all(
            tensor is not given[0] and tensor.untyped_storage()._cdata == given[0].untyped_storage()._cdata
            for tensor in made
        )
    )

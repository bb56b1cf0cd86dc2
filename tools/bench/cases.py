"""Which weights are measured, and how they are divided."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muon.errors import ConfigError
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section

__all__ = ["CASES", "DTYPES", "Case", "WeightSpec", "cases_of_shapes", "cases_of_widths", "standard_cases"]

DTYPES = ("fp32", "bf16", "fp16")
"""Values of ``--dtype``: in which Newton-Schulz multiplies."""

CASES = ("dense", "experts")
"""Values of ``--case``."""


@dataclass(frozen=True)
class WeightSpec:
    """One weight that a rank holds all or a part of.

    Attributes:
        name: for messages.
        shape: of the whole weight: (rows, columns), or (experts, rows, columns) if the layout is stacked.
        layout: its logical matrices.
        dim: the dimension of its matrices that tensor parallelism divides, -2 or -1; None if ranks hold it whole.
        expert: whether it is an expert's, of which each expert-parallel rank has others.
    """

    name: str
    shape: tuple[int, ...]
    layout: MatrixLayout = WHOLE
    dim: int | None = None
    expert: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole weight."""
        return math.prod(self.shape)

    def local_shape(self, ranks: int) -> tuple[int, ...]:
        """Shape of one rank's shard.

        Raises:
            ConfigError: if the ranks cannot hold equal shards.
        """
        shape = list(self.shape)
        if self.dim is not None:
            if shape[self.dim] % ranks:
                raise ConfigError(
                    f"--tp {ranks}: {self.name} has {shape[self.dim]} {'rows' if self.dim == -2 else 'columns'}, which "
                    f"{ranks} ranks cannot divide evenly. Choose a divisor."
                )
            shape[self.dim] //= ranks
        return tuple(shape)


@dataclass(frozen=True)
class Case:
    """Weights at one layout.

    Attributes:
        name: of the weights.
        tp: tensor-parallel size.
        ep: expert-parallel size. With more than 1, experts are whole on their ranks (expert tensor parallelism 1).
        weights: those of one rank, with their whole shapes.
        option: the command-line option that asked for it, for messages.
    """

    name: str
    tp: int
    ep: int
    weights: tuple[WeightSpec, ...]
    option: str

    @property
    def ranks(self) -> int:
        """Processes that it takes: the fewest that hold every weight once."""
        return math.lcm(self.tp, self.ep)

    @property
    def label(self) -> str:
        """For titles and messages."""
        sizes = [f"{name} {size}" for name, size in (("TP", self.tp), ("EP", self.ep)) if size > 1]
        return f"{self.name}, {' '.join(sizes) or 'one process'}"

    @property
    def local_elements(self) -> int:
        """Elements on one rank."""
        return sum(math.prod(weight.local_shape(self.tp)) for weight in self.weights)

    @property
    def parameters(self) -> int:
        """Elements of all ranks together, each counted once."""
        return sum(weight.numel * (self.ep if weight.expert else 1) for weight in self.weights)

    def matrices(self) -> dict[tuple[int, int], int]:
        """(m, n) of a logical matrix -> how many one rank has all or a part of."""
        found: dict[tuple[int, int], int] = {}
        for weight in self.weights:
            for block in weight.layout.blocks(weight.shape):
                found[block.rows, block.columns] = found.get((block.rows, block.columns), 0) + block.count
        return found


@dataclass(frozen=True)
class _Dense:
    """Sizes of a Llama-style model: attention with query groups, SwiGLU, no biases."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    head: int = 64
    groups: int = 2
    ffn: int = 1408


@dataclass(frozen=True)
class _Experts:
    """Sizes of layers of small gated experts."""

    layers: int = 4
    experts: int = 64
    hidden: int = 128
    ffn: int = 256


_QUICK_DENSE = _Dense(layers=2, hidden=64, heads=4, head=16, groups=2, ffn=96)
_QUICK_EXPERTS = _Experts(layers=1, experts=4, hidden=16, ffn=32)

_STANDARD = (("dense", 1, 1), ("experts", 1, 1), ("dense", 2, 1), ("experts", 1, 2), ("dense", 4, 1))
"""(name, tensor-parallel, expert-parallel size) of what is measured without arguments."""


_OF_A_WIDTH = 1 << 21
"""Elements of the square matrices of :func:`cases_of_widths`."""


def standard_cases(
    names: Sequence[str], tp: int | None, ep: int | None, layers: int | None = None, quick: bool = False
) -> list[Case]:
    """The cases of ``--case``, ``--tp`` and ``--ep``.

    Args:
        names: some of :data:`CASES`; all if empty.
        tp: tensor-parallel size; with neither ``tp`` nor ``ep``, each case is measured at its standard layouts.
        ep: expert-parallel size.
        layers: instead of the case's own number.
        quick: tiny sizes.

    Raises:
        ConfigError: for an unknown name, expert parallelism of weights that are no experts, or sizes that do not
            divide.
    """
    for name in names:
        if name not in CASES:
            raise ConfigError(f"--case {name}: choose from {', '.join(CASES)}.")
    chosen = tuple(names) or CASES
    if tp is None and ep is None:
        layouts = [layout for layout in _STANDARD if layout[0] in chosen]
    else:
        tp, ep = tp or 1, ep or 1
        if ep > 1 and "dense" in names:
            raise ConfigError(f"--ep {ep} with --case dense: it has no experts. Use --case experts.")
        layouts = [(name, tp, ep) for name in chosen if name != "dense" or ep == 1]
    return [Case(name, tp, ep, _weights(name, tp, ep, layers, quick), f"--case {name}") for name, tp, ep in layouts]


def _weights(name: str, tp: int, ep: int, layers: int | None, quick: bool) -> tuple[WeightSpec, ...]:
    if name == "dense":
        return _checked(_dense(_QUICK_DENSE if quick else _Dense(), tp, layers), tp)
    return _checked(_experts(_QUICK_EXPERTS if quick else _Experts(), tp, ep, layers), tp)


def _dense(size: _Dense, tp: int, layers: int | None) -> list[WeightSpec]:
    query = size.heads // size.groups * size.head
    qkv = MatrixLayout("qkv", (Section("q", query), Section("k", size.head), Section("v", size.head)))
    attention = size.heads * size.head
    found = []
    for layer in range(layers or size.layers):
        found += [
            WeightSpec(f"layers.{layer}.linear_qkv", (size.groups * qkv.period, size.hidden), qkv, -2),
            WeightSpec(f"layers.{layer}.linear_proj", (size.hidden, attention), WHOLE, -1),
            WeightSpec(f"layers.{layer}.linear_fc1", (2 * size.ffn, size.hidden), _gated(size.ffn, tp), -2),
            WeightSpec(f"layers.{layer}.linear_fc2", (size.hidden, size.ffn), WHOLE, -1),
        ]
    return found


def _experts(size: _Experts, tp: int, ep: int, layers: int | None) -> list[WeightSpec]:
    if size.experts % ep:
        raise ConfigError(f"--ep {ep}: {size.experts} experts cannot be divided evenly. Choose a divisor.")
    divides = tp if ep == 1 else 1
    dims = (-2, -1) if ep == 1 else (None, None)
    gated = _gated(size.ffn, divides)
    found = []
    for layer in range(layers or size.layers):
        for expert in range(size.experts // ep):
            name = f"layers.{layer}.experts.{expert}"
            found += [
                WeightSpec(f"{name}.linear_fc1", (2 * size.ffn, size.hidden), gated, dims[0], expert=True),
                WeightSpec(f"{name}.linear_fc2", (size.hidden, size.ffn), WHOLE, dims[1], expert=True),
            ]
    return found


def _gated(ffn: int, ranks: int) -> MatrixLayout:
    """Of Megatron's gated ``linear_fc1``: the gate rows of a rank, then its up rows."""
    if ffn % ranks:
        raise ConfigError(f"--tp {ranks}: {ffn} gate rows cannot be divided evenly. Choose a divisor.")
    return MatrixLayout("glu", (Section("gate", ffn // ranks), Section("up", ffn // ranks)))


def cases_of_shapes(text: str, tp: int | None, ep: int | None) -> list[Case]:
    """The case of ``--shapes``: whole matrices; tensor parallelism divides the longer side, as Megatron's layers do.

    Args:
        text: ``MxN`` or ``MxN*count``, with commas between.
        tp: tensor-parallel size; 1 by default.
        ep: refused if more than 1.

    Raises:
        ConfigError: for text that is not of this form.
    """
    if (ep or 1) > 1:
        raise ConfigError(f"--ep {ep} with --shapes: they are no experts. Use --case experts or --model.")
    found: list[WeightSpec] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)(?:\*([1-9]\d*))?\s*", part)
        if match is None:
            raise ConfigError(f"--shapes {text}: {part!r} is not MxN or MxN*count, such as 4096x1024*8.")
        m, n, count = (int(number) for number in match.groups(default="1"))
        dim = -2 if m >= n else -1
        found += [WeightSpec(f"{m}x{n} number {len(found) + 1}", (m, n), WHOLE, dim) for _ in range(count)]
    return [Case("shapes", tp or 1, 1, _checked(found, tp or 1), "--shapes")]


def cases_of_widths(widths: Sequence[int]) -> list[Case]:
    """For each width w, w x w and 4w x w matrices: of each 8, or :data:`_OF_A_WIDTH` elements, or one."""
    found = []
    for width in widths:
        count = max(1, min(8, _OF_A_WIDTH // width**2))
        (case,) = cases_of_shapes(f"{width}x{width}*{count},{4 * width}x{width}*{count}", None, None)
        found.append(dataclasses.replace(case, name=f"width {width}", option="--widths"))
    return found


def _checked(weights: Sequence[WeightSpec], tp: int) -> tuple[WeightSpec, ...]:
    """The weights, whole if there is one rank; refuses what the ranks cannot divide."""
    if tp == 1:
        return tuple(dataclasses.replace(weight, dim=None) for weight in weights)
    for weight in weights:
        weight.local_shape(tp)
    return tuple(weights)

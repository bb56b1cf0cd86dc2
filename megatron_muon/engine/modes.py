"""The ways in which the ranks of a tensor-parallel group share the work, and what each costs.

All but ``blockwise`` give the update of the whole logical matrices:

``owner``
    Packed all-to-all: each rank receives some of the matrices whole, orthogonalizes them, and sends the shards back.
``gram``
    Each rank owns some of the Gram matrices: partial ones are sent to the owner, its polynomials come back, and each
    rank applies them to its columns. No matrix is ever whole on a rank. For matrices divided along their longer side,
    in an iteration that Gram Newton-Schulz is accurate in; others are exchanged as in ``owner``.
``duplicated``
    All-gather; every rank orthogonalizes everything.
``distributed``
    The shards stay where they are; Gram matrices are summed over the ranks once a step of the iteration.
``blockwise``
    Each shard is orthogonalized by itself: no communication, but another update, which changes with the size of the
    group.
``auto``
    For each shape the cheapest of ``owner``, ``gram`` and ``distributed`` (:mod:`megatron_muon.engine.costs`), or one
    of the first two for all, whichever is quicker.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_muon.choices import TP_MODES

MODES = AUTO, OWNER, GRAM, DUPLICATED, DISTRIBUTED, BLOCKWISE = TP_MODES

EXACT = tuple(mode for mode in MODES if mode != BLOCKWISE)
"""Modes that give the update of whole matrices."""

OWNED = (OWNER, GRAM)
"""Modes that share matrices, or the work on them, out among the ranks: each matrix has an owner."""

DIVIDED = (GRAM, DISTRIBUTED)
"""Modes in which matrices stay divided: no rank has one whole, and ranks add up Gram matrices while they iterate."""

REPEATED = (DUPLICATED,)
"""Modes in which every rank has all matrices whole, and does all the work."""

LOCAL = "local"
"""The mode of matrices that a rank holds whole: nothing is exchanged."""

LENT, SPLIT = "lent", "split"
"""The modes of matrices that another data-parallel rank orthogonalizes, or that several orthogonalize together."""


NODE = 8
"""Ranks that reach one another at the rates within a node. A constant: all ranks must know the same."""


@dataclass(frozen=True)
class Machine:
    """Rates that turn operations and bytes into seconds, to compare modes.

    Only their ratio matters, and only for choices that are close. They are constants, not measurements of the moment:
    every rank, and every run, must choose alike.

    Attributes:
        flops: operations a second of one rank.
        bytes: bytes a second that one rank sends.
        latency: seconds of one collective.
        between: the same two, bytes and latency, of groups that reach beyond a node; None: they are no others.
    """

    flops: float
    bytes: float
    latency: float
    between: tuple[float, float] | None = None

    @classmethod
    def of(cls, device_type: str) -> Machine:
        """Rates of a current accelerator, with NVLink and 400 Gb/s between nodes, or of a CPU core and its memory."""
        if device_type == "cuda":
            return cls(flops=5e14, bytes=3e11, latency=2e-5, between=(4.3e10, 1.2e-4))
        return cls(flops=1e11, bytes=1e9, latency=3e-4)

    def over(self, span: int) -> Machine:
        """Its rates in a group that reaches over ``span`` consecutive ranks."""
        return self if span <= NODE or self.between is None else Machine(self.flops, *self.between)


@dataclass(frozen=True)
class Sizes:
    """Bytes of one element of what ranks send each other.

    Attributes:
        wire: bytes of an element that is sent to be orthogonalized.
        back: bytes of an orthogonalized element that is sent back.
        gram: bytes of an element of partial Gram matrices and polynomials.
    """

    wire: int
    back: int
    gram: int


@dataclass(frozen=True)
class Cost:
    """What one rank does.

    Attributes:
        flops: operations in matrix products.
        bytes: sent to other ranks; all-gathers and all-reduces by the ring algorithm.
        collectives: number of collective operations.
    """

    flops: float = 0
    bytes: float = 0
    collectives: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.collectives + other.collectives)

    def seconds(self, machine: Machine) -> float:
        """The time that it takes on a machine if nothing overlaps."""
        return self.flops / machine.flops + self.bytes / machine.bytes + self.collectives * machine.latency

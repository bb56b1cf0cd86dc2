"""Where the parts of a DTensor lie, and whose they are: from its placements to what the engine knows as a shard."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from megatron_muon.agree import backends_of
from megatron_muon.engine.plan import Piece
from megatron_muon.engine.shards import Shard
from megatron_muon.errors import ConfigError, sizes

if TYPE_CHECKING:  # torch needs seconds to import them
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class Division(NamedTuple):
    """How a DTensor is divided.

    Attributes:
        group: name of the group whose ranks have the other parts, and the copies, of its matrices; empty if there are
            none.
        shard: what this rank has among them; None if it is all, and there is no copy.
        piece: where this rank's part lies in the matrices.
    """

    group: str
    shard: Shard | None
    piece: Piece


class Divisions:
    """The divisions of an optimizer's DTensors, found once for each mesh, shape and placement.

    Attributes:
        groups: the groups that they name.
    """

    def __init__(self) -> None:
        self.groups: dict[str, dist.ProcessGroup] = {}
        self._known: dict[tuple[Any, ...], Division] = {}
        self._of_ranks: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def of(self, weight: DTensor, name: str = "") -> Division:
        """The division of a weight of two dimensions or three.

        The ranks of its mesh ask for those of their weights in one order: for groups over several dimensions of a mesh
        they make process groups.

        Args:
            weight: the DTensor.
            name: for messages.

        Raises:
            ConfigError: for placements of which it is not clear who has which rows and columns; on all ranks alike.
        """
        key = weight.device_mesh, weight.placements, weight.shape
        if key not in self._known:
            self._known[key] = self._new(weight, name or f"a weight of {sizes(weight.shape)}")
        return self._known[key]

    def _new(self, weight: DTensor, name: str) -> Division:
        mesh, dims = weight.device_mesh, weight.dim()
        orders = [_order(weight, dim, name) for dim in range(dims)]
        # Ranks with other experts of a stack have other matrices.
        apart = {number for order in orders[:-2] for number in order}
        meeting = [number for number in range(mesh.ndim) if number not in apart and mesh.size(number) > 1]
        own = mesh.get_coordinate()
        if own is None:
            raise ConfigError(f"{name} is on a mesh that rank {dist.get_rank()} is not in: give it to its own ranks.")
        of_ranks = dict[int, Piece]()
        for some in itertools.product(*(range(mesh.size(number)) for number in meeting)):
            place = list(own)
            for number, coordinate in zip(meeting, some, strict=True):
                place[number] = coordinate
            edges = [_edges(weight.size(dim), orders[dim], mesh, place) for dim in (-2, -1)]
            copy = [place[number] for number in meeting if number not in orders[-2] and number not in orders[-1]]
            shape = [mesh.size(number) for number in meeting if number not in orders[-2] and number not in orders[-1]]
            of_ranks[int(mesh.mesh[tuple(place)])] = Piece(edges[0], edges[1], _number(copy, shape))
        piece = of_ranks[dist.get_rank()]
        local, found = weight.to_local().shape[-2:], tuple(stop - start for start, stop in piece[:2])
        if tuple(local) != found:
            raise ConfigError(
                f"{name} has {sizes(local)} on rank {dist.get_rank()} where its placements {weight.placements} say "
                f"{sizes(found)}: distribute it by torch.chunk's parts, as fully_shard and parallelize_module do."
            )
        if len(of_ranks) == 1:
            return Division("", None, piece)
        group = mesh.get_group(meeting[0]) if len(meeting) == 1 else self._over(tuple(sorted(of_ranks)))
        device = weight.device.type
        if device not in backends_of(group):
            raise ConfigError(
                f"{name} is on {device}, between which the {dist.get_backend(group)} groups of its mesh send nothing: "
                "begin with init_process_group(backend='cpu:gloo,cuda:nccl'), which its optimizer's step needs."
            )
        pieces = tuple(of_ranks[rank] for rank in dist.get_process_group_ranks(group))
        title = _title(mesh, meeting, sorted(of_ranks))
        self.groups[title] = group
        rows, columns = ({each[side] for each in pieces} != {(0, weight.size(side - 2))} for side in (0, 1))
        dim = -1 if columns else -2 if rows else 0
        return Division(title, Shard(dim, group, () if _is_plain(pieces, dim) else pieces), piece)

    def _over(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """The process group of ranks over several dimensions of a mesh."""
        if len(ranks) == dist.get_world_size() and dist.group.WORLD is not None:
            return dist.group.WORLD
        if ranks not in self._of_ranks:
            made: Any = dist.new_group(list(ranks), use_local_synchronization=True)
            self._of_ranks[ranks] = made
        return self._of_ranks[ranks]


def _order(weight: DTensor, dim: int, name: str) -> list[int]:
    """The dimensions of the mesh that divide a dimension of the weight, in the order in which they do.

    FSDP2 divides what tensor parallelism has divided before, though its dimension of the mesh comes first: placements
    say so by a ``_StridedShard`` whose factor is the number of parts that there were.
    """
    found: list[int] = []
    for number in reversed(range(weight.device_mesh.ndim)):
        placement: Any = weight.placements[number]
        kind = type(placement).__name__.lstrip("_")
        if kind == "Replicate":
            continue
        parts = math.prod(weight.device_mesh.size(each) for each in found)
        strided = kind == "StridedShard"
        if not strided and kind != "Shard":
            raise ConfigError(
                f"{name} has the placement {placement}, a weight whose numbers no rank has: redistribute it to Shard "
                "or Replicate before the optimizer is built."
            )
        if placement.dim % weight.dim() != dim:
            continue
        if strided and placement.split_factor != parts:
            raise ConfigError(
                f"{name} has the placements {weight.placements}, of which it is not clear who has which rows: a "
                f"_StridedShard whose factor is {placement.split_factor} beside {parts} parts. fully_shard and "
                "parallelize_module make others."
            )
        found = [*found, number] if strided else [number, *found]
    return found


def _edges(size: int, order: Sequence[int], mesh: DeviceMesh, place: Sequence[int]) -> tuple[int, int]:
    """First and last (exclusive) of what a rank has of a dimension: parts as of ``torch.chunk``, and parts of them."""
    start, stop = 0, size
    for number in order:
        each = -(-(stop - start) // mesh.size(number))
        first = start + place[number] * each
        start, stop = min(first, stop), min(first + each, stop)
    return start, stop


def _number(place: Sequence[int], shape: Sequence[int]) -> int:
    found = 0
    for coordinate, size in zip(place, shape, strict=True):
        found = found * size + coordinate
    return found


def _is_plain(pieces: Sequence[Piece], dim: int) -> bool:
    """Whether pieces are equal shards of one dimension in rank order, which the engine knows without them."""
    edges, others = [each.rows for each in pieces], [each.columns for each in pieces]
    if dim == -1:
        edges, others = others, edges
    size = edges[0][1]
    in_order = all(each == (number * size, (number + 1) * size) for number, each in enumerate(edges))
    return dim != 0 and in_order and len(set(others)) == 1 and len({each.copy for each in pieces}) == 1


def _title(mesh: DeviceMesh, dims: Sequence[int], ranks: Sequence[int]) -> str:
    """A name that is the same on all ranks of a group, and another's in no group of this rank."""
    names = " x ".join(mesh.mesh_dim_names[number] if mesh.mesh_dim_names else f"mesh {number}" for number in dims)
    listed = ", ".join(map(str, ranks))
    if len(ranks) > 8:
        listed = f"{ranks[0]} .. {ranks[-1]}; {zlib.crc32(listed.encode()):08x}"
    return f"{names} (ranks {listed})"

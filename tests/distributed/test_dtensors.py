"""Muon on DTensors: updates are those of one process, whatever the placements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_muon import ConfigError, Muon, state_bytes
from megatron_muon.optimizers.fading import EVERY
from megatron_muon.optimizers.graph import capture
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, SCALAR, MatrixLayout, Section
from tests.pool import RankPool

TOLERANCE = 2e-6  # float32: products of the same numbers, in batches of other sizes
OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "fp32_matmul_prec": "highest"}
FUSED = MatrixLayout("qkv", (Section("q", 9), Section("k", 4), Section("v", 4)))
HEADS = MatrixLayout("heads", (Section("q", 8, matrix_rows=4), Section("k", 4, matrix_rows=4)))
ROWS = MatrixLayout("in_proj", (Section("x", 7), Section("dt", 3, SCALAR), Section("z", 7)))
STACK = MatrixLayout("experts", stacked=True)

Case = tuple[str, tuple[int, ...], MatrixLayout | None]
"""Placements, a letter for each dimension of the mesh (R, a number, or s for FSDP2's beside tensor parallelism), the
shape of a weight, and its layout."""

ONE: list[Case] = [
    ("0", (12, 8), None),
    ("0", (13, 6), None),
    ("0", (3, 9), None),  # four ranks: the last has nothing
    ("1", (7, 12), None),
    ("1", (12, 10), None),
    ("R", (9, 5), None),
    ("R", (10, 10), None),
    ("0", (17, 6), FUSED),
    ("0", (36, 8), HEADS),
    ("0", (24, 8), HEADS),
    ("0", (17, 6), ROWS),
    ("0", (34, 5), ROWS),
    ("1", (17, 8), ROWS),
    ("0", (5, 6, 7), STACK),
    ("1", (3, 6, 8), STACK),
    ("2", (3, 5, 7), STACK),
]
TWO: list[Case] = [
    ("R0", (13, 6), None),
    ("0R", (13, 6), None),
    ("RR", (6, 9), None),
    ("R1", (6, 10), None),
    ("00", (13, 6), None),
    ("s0", (13, 6), None),
    ("s0", (12, 20), None),
    ("01", (13, 10), None),
    ("10", (7, 11), None),
    ("s0", (17, 6), FUSED),
    ("01", (17, 6), FUSED),
    ("01", (24, 8), HEADS),
    ("s0", (36, 8), HEADS),
    ("R0", (24, 8), HEADS),
    ("01", (17, 6), ROWS),
    ("s0", (34, 6), ROWS),
    ("01", (5, 6, 8), STACK),
    ("12", (3, 6, 8), STACK),
    ("0R", (5, 6, 8), STACK),
]


def _placements(letters: str, mesh: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    made = {"R": Replicate(), "s": _StridedShard(0, split_factor=mesh.size(mesh.ndim - 1))}
    return [made[letter] if letter in made else Shard(int(letter)) for letter in letters]


def _numbers(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights(cases: Sequence[Case], mesh: Any) -> list[nn.Parameter]:
    """The weights of cases, as DTensors, or whole without a mesh."""
    found = []
    for number, (letters, shape, layout) in enumerate(cases):
        weight = nn.Parameter(_placed(_numbers(shape, number), letters, mesh))
        if layout is not None:
            setattr(weight, LAYOUT_ATTRIBUTE, layout)
        found.append(weight)
    return found


def _placed(whole: torch.Tensor, letters: str, mesh: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return whole if mesh is None else distribute_tensor(whole, mesh, _placements(letters, mesh), src_data_rank=None)


def _step(optimizer: Muon, weights: Sequence[nn.Parameter], cases: Sequence[Case], mesh: Any, steps: int = 3) -> None:
    for step in range(steps):
        for number, (weight, (letters, shape, _)) in enumerate(zip(weights, cases, strict=True)):
            grad = _numbers(shape, 100 * (step + 1) + number)
            weight.grad = _partial(grad, mesh) if letters == "R" and mesh else _placed(grad, letters, mesh)
        optimizer.step()


def _partial(whole: torch.Tensor, mesh: Any) -> torch.Tensor:
    """A gradient as tensor parallelism leaves it for weights that all ranks have: to be summed."""
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(whole / mesh.size(), mesh, [Partial()], run_check=False)


def differences(cases: Sequence[Case], shape: tuple[int, ...], **options: Any) -> list[float]:
    """The largest difference of each weight from that of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", shape)
    weights, alone = _weights(cases, mesh), _weights(cases, None)
    for params, own in ((weights, mesh), (alone, None)):
        optimizer = Muon(params, **OPTIONS | options)
        _step(optimizer, params, cases, own)
        for weight in params:
            optimizer.state[weight]["step"] = EVERY  # momentum is looked at, whether it has only faded
        _step(optimizer, params, cases, own, 1)
    pairs: list[tuple[Any, torch.Tensor]] = list(zip(weights, alone, strict=True))
    return [float((weight.full_tensor() - whole).abs().max()) for weight, whole in pairs]


@pytest.mark.parametrize(
    "ranks, cases, shape",
    [
        pytest.param(2, ONE, (2,), id="2", marks=pytest.mark.slow),
        pytest.param(3, ONE, (3,), id="3"),
        pytest.param(4, ONE, (4,), id="4", marks=pytest.mark.slow),
        pytest.param(4, TWO, (2, 2), id="2x2"),
    ],
)
def test_updates_are_those_of_one_process(
    pool: RankPool, ranks: int, cases: list[Case], shape: tuple[int, ...]
) -> None:
    for found in pool.run(differences, ranks, cases, shape):
        assert dict(enumerate(found)) == pytest.approx(dict.fromkeys(range(len(found)), 0.0), abs=TOLERANCE)


MEASURED: list[Case] = [("0R", (13, 6), None), ("s0", (17, 6), FUSED), ("01", (13, 10), None), ("10", (24, 8), HEADS)]


def measured() -> list[float]:
    """Differences where sums over rows, columns, and whole matrices are taken, and faded momentum is looked for."""
    found = differences(MEASURED, (2, 2), variant="normuon", scale_mode="update_norm")
    return found + differences(MEASURED[:2], (2, 2), scale_mode="spectral_norm")


@pytest.mark.slow
def test_sums_over_blocks_and_copies(pool: RankPool) -> None:
    for found in pool.run(measured, 4):
        assert found == pytest.approx([0.0] * len(found), abs=TOLERANCE)


class Model(nn.Module):
    """Weights whose rows no number of ranks divides; one of them has rows under Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 17, bias=False), nn.Linear(17, 6, bias=False)
        for number, weight in enumerate(self.parameters()):
            weight.data = _numbers(weight.shape, number) / 4.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + y

    def optimizer(self, **options: Any) -> Muon:
        """Of its weights, once they are what they are to be."""
        setattr(self.up.weight, LAYOUT_ATTRIBUTE, ROWS)
        names, weights = zip(*self.named_parameters(), strict=True)
        return Muon([{"params": list(weights), "param_names": list(names)}], **OPTIONS | options)

    def train(self, optimizer: Any, steps: range, ranks: int = 1) -> list[float]:  # type: ignore[override]
        """Losses over all ranks' rows of data, before each step with clipped gradients."""
        losses = []
        for step in steps:
            rank = dist.get_rank() if ranks > 1 else 0
            x = _numbers((12, 6), 1000 + step).chunk(ranks)[rank]
            loss = self(x).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            if ranks > 1:
                dist.all_reduce(total)
            losses.append(float(total) / ranks)
        return losses


def _sharded(**options: Any) -> Model:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)
    return model


def fsdp(folder: str, saved: bool, offload: bool, reshard: bool) -> tuple[list[float], list[str]]:
    """Losses of four steps of FSDP2, or of the last two after two that others have saved; and where its state is."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy

    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    model = _sharded(reshard_after_forward=reshard, **policy)
    optimizer, ranks = model.optimizer(), dist.get_world_size()
    losses: list[float] = []
    if saved:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    else:
        losses = model.train(optimizer, range(2), ranks)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    losses += model.train(optimizer, range(2, 4), ranks)
    kept, local = state_bytes(optimizer).on_device, [weight.to_local().nbytes for weight in optimizer.state]
    assert kept["momentum_buffer"] == sum(local)  # this rank's part, not the whole
    kinds = {name: type(value).__name__ for name, value in optimizer.state[model.up.weight].items()}
    return losses, sorted(f"{name} {kind}" for name, kind in kinds.items())


def test_fsdp_trains_saves_and_reshards(pool: RankPool, tmp_path: Any) -> None:
    """Gradients are clipped; on two ranks, saved, and gone on with on one and on four."""
    alone = Model()
    optimizer = alone.optimizer()
    wanted = alone.train(optimizer, range(4))
    for losses, kinds in pool.run(fsdp, 2, str(tmp_path), saved=False, offload=False, reshard=True):
        assert losses == pytest.approx(wanted, abs=TOLERANCE)
        assert kinds == ["exp_avg_sq DTensor", "momentum_buffer DTensor", "momentum_peak DTensor", "step int"]
    for ranks, offload, reshard in ((1, False, True), (4, True, False)):
        for losses, _ in pool.run(fsdp, ranks, str(tmp_path), saved=True, offload=offload, reshard=reshard):
            assert losses == pytest.approx(wanted[2:], abs=TOLERANCE)


def state_made_alone() -> list[tuple[bool, list[int], float]]:
    """For torch's two functions: whether weights keep their bits, the counts, and how far two steps are from others.

    The others are those of an optimizer of which nobody has asked for state.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def set_state(model: Model, optimizer: Muon) -> None:
        empty: Any = {"state": {}, "param_groups": []}
        with pytest.raises((RuntimeError, KeyError, ValueError)):  # it has made state by then, and finds none saved
            set_optimizer_state_dict(model, optimizer, empty)

    found, ranks = [], dist.get_world_size()
    for ask in (get_optimizer_state_dict, set_state):
        one, other = _sharded(), _sharded()
        optimizer, its = one.optimizer(lr=0.02), other.optimizer(lr=0.02)
        before = [weight.to_local().clone() for weight in one.parameters()]
        ask(one, optimizer)
        same = all(map(torch.equal, before, (weight.to_local() for weight in one.parameters())))
        counts = [optimizer.param_groups[0]["step"], *(state["step"] for state in optimizer.state.values())]
        losses, wanted = one.train(optimizer, range(3), ranks), other.train(its, range(3), ranks)
        found.append((same, counts, max(abs(a - b) for a, b in zip(losses, wanted, strict=True))))
    return found


def test_state_is_made_without_a_count(pool: RankPool) -> None:
    """torch.distributed.checkpoint makes it by a step at rate 0 with gradients of zeros."""
    assert pool.run(state_made_alone, 2) == [[(True, [0, 0, 0], 0.0)] * 2] * 2


def counts_of_two_meshes() -> list[int]:
    """After a step that makes state alone: all ranks share a weight, the first two another."""
    from torch.distributed.device_mesh import DeviceMesh

    meshes = [DeviceMesh("cpu", [0, 1, 2]), DeviceMesh("cpu", [0, 1])]
    mine = [mesh for mesh in meshes if mesh.get_coordinate() is not None]
    weights = [weight for mesh in mine for weight in _weights([("0", (12, 8), None)], mesh)]
    optimizer = Muon(weights, **{**OPTIONS, "lr": 0.0})
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return [optimizer.param_groups[0]["step"]]


def test_ranks_of_several_groups_count_every_step(pool: RankPool) -> None:
    """They do not know of all ranks that they share weights with whether these take it."""
    assert pool.run(counts_of_two_meshes, 3) == [[1]] * 3


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "partial": ("P", {}, r"w has the placement .*P.*, a weight whose numbers no rank has: redistribute it"),
    "order": ("?", {}, r"w has the placements .*not clear who has which rows.*factor is 3 beside 1 parts"),
    "blockwise": ("0", {"tp_mode": "blockwise"}, r"w is a DTensor: tp_mode='blockwise' and blockwise_period take"),
    "offload": ("0", {"offload": "momentum"}, r"w is a DTensor: offload='momentum' moves plain tensors\. Use"),
    "grid": (
        "01",
        {"scale_mode": "spectral_norm"},
        r"w is a DTensor whose rows and columns are divided, with scale_mod",
    ),
    "columns": (
        "1",
        {"momentum_dtype": "int8"},
        r"w is a DTensor whose columns are divided, with .* int8, which go by",
    ),
}


def refusals() -> list[str]:
    """The messages of what cannot be, on this rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    found, mesh, grid = [], init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    made = {"P": Partial(), "?": _StridedShard(0, split_factor=3), "0": Shard(0), "1": Shard(1)}
    for letters, options, _ in REFUSED.values():
        own = mesh if len(letters) == 1 else grid
        weight = nn.Parameter(DTensor.from_local(torch.ones(3, 4), own, [made[letter] for letter in letters]))
        with pytest.raises(ConfigError) as error:
            Muon([{"params": [weight], "param_names": ["w"]}], lr=0.1, **options)
        found.append(str(error.value))
    return found


def test_what_is_not_understood_is_refused_by_name_on_all_ranks(pool: RankPool) -> None:
    first, *others = pool.run(refusals, 4)
    assert others == [first] * 3
    for message, (_, _, pattern) in zip(first, REFUSED.values(), strict=True):
        assert re.match(pattern, message), message


def one_without_gradient() -> tuple[str, bool]:
    """What a step says where one rank lacks the gradient of one weight, and whether anything has moved."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    cases: list[Case] = [("0", (6, 5), None), ("0", (6, 5), None)]
    weights = _weights(cases, mesh)
    optimizer = Muon([{"params": weights, "param_names": ["a", "b"]}], **OPTIONS)
    _step(optimizer, weights, cases, mesh, 1)
    before = [weight.to_local().clone() for weight in weights]  # type: ignore[attr-defined]
    for call in (optimizer.sleep, lambda: capture(optimizer)):
        with pytest.raises(ConfigError, match="of an optimizer of DTensors"):
            call()
    weights[dist.get_rank()].grad = None
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    pairs: list[tuple[torch.Tensor, Any]] = list(zip(before, weights, strict=True))
    return str(error.value), all(torch.equal(old, weight.to_local()) for old, weight in pairs)


def test_gradients_on_some_ranks_alone_are_refused(pool: RankPool) -> None:
    for message, is_as_before in pool.run(one_without_gradient, 2):
        assert "a has a gradient on ranks [1] of the mesh 0 (ranks 0, 1) group and none on ranks [0]" in message
        assert is_as_before


def bytes_sent(rows: int, columns: int, count: int) -> tuple[float, float]:
    """Bytes that this rank sends in a step of four FSDP2 ranks: of Muon, and of torch.optim.Muon."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sent(TorchDispatchMode):
        """Bytes of functional collectives, by the ring algorithm."""

        total = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ranks, name = dist.get_world_size(), str(func)
            if any(getattr(each, "__name__", "") == "DTensor" for each in types):
                return NotImplemented
            if "_c10d_functional" in name and "wait" not in name:
                size = args[0].numel() * args[0].element_size()
                parts = {
                    "all_gather": ranks - 1,
                    "all_reduce": 2 * (ranks - 1) / ranks,
                    "reduce_scatter": 1 - 1 / ranks,
                }
                self.total += size * next((share for part, share in parts.items() if part in name), 0.0)
            return func(*args, **kwargs or {})

    mesh, cases = init_device_mesh("cpu", (4,)), [("0", (rows, columns), None)] * count
    ours, theirs = _weights(cases, mesh), _weights(cases, mesh)
    own, other = Muon(ours, lr=0.02, ns_dtype="bf16"), torch.optim.Muon(theirs, lr=0.02)
    _step(own, ours, cases, mesh, 1)
    for engine in own.engines:
        engine.counters.reset()
    _step(own, ours, cases, mesh, 1)
    for number, weight in enumerate(theirs):
        weight.grad = _placed(_numbers((rows, columns), number), "0", mesh)
    with Sent() as sent:
        other.step()
    return sum(engine.counters.bytes for engine in own.engines), sent.total


def test_a_step_sends_each_matrix_there_and_back(pool: RankPool) -> None:
    """Three quarters of this rank's quarter go to owners, and as much comes back, in bfloat16."""
    rows, columns, count, ranks = 24, 16, 8, 4
    for own, other in pool.run(bytes_sent, ranks, rows, columns, count):
        assert own == 2 * (1 - 1 / ranks) * rows * columns * count / ranks * 2
        # Of each matrix the norm, and in each of five steps the Gram matrix twice, summed over the ranks.
        assert other == count * (5 * 2 * columns * columns + 1) * (2 - 2 / ranks) * 2

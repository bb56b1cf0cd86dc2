"""The pieces that checkpoints are made of, without processes."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_muon.checkpoint import pieces
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.keys import (
    ALONE,
    is_bucket,
    name_of,
    parse_bucket,
    parse_state,
    without_chain,
)
from megatron_muon.checkpoint.param_state import ParamState
from megatron_muon.checkpoint.pieces import StoredTensor, part_of
from megatron_muon.checkpoint.record import (
    RECORD,
    WEIGHT,
    JoinedRecord,
    RankRecord,
    Record,
    Rule,
    WeightRecord,
    _packed,
    layout_text,
    numbers_of,
)
from megatron_muon.checkpoint.request import Request
from megatron_muon.checkpoint.sharding import places_of, tensors_of
from megatron_muon.checkpoint.shards import boxes
from megatron_muon.checkpoint.sources import difference, gradients_to_average
from megatron_muon.checkpoint.stored import records_in
from megatron_muon.cpu.optimizers import GroupStepAdamW
from megatron_muon.plugin.optimizer_state import _spans
from megatron_muon.routing.layout import SCALAR, WHOLE, MatrixLayout, Section

# --- names -----------------------------------------------------------------------------------------------------------


def test_parts_of_keys() -> None:
    key = "optimizer.state.exp_avg.decoder.layers.mlp.router.weight"
    weight = "decoder.layers.mlp.router.weight"
    assert parse_state(key) == ("", "exp_avg", weight)
    assert parse_state(f"chained_1.{key}{ALONE}3") == ("chained_1.", "exp_avg", f"{weight}{ALONE}3")
    assert without_chain(f"chained_12.{key}") == without_chain(key) == key
    assert parse_state(weight) is None and without_chain(weight) == weight
    assert (name_of(weight, (2, 5)), name_of(weight, ())) == (f"{weight}[2,5]", weight)


def test_keys_of_buckets() -> None:
    key = "chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_1.dtype_(a, b).bucket_idx_12.exp_avg"
    assert is_bucket(key) and parse_state(key) is None and not is_bucket("optimizer.state.exp_avg.w")
    assert parse_bucket(key) == parse_bucket(key.removeprefix("chained_1.")) == (0, 1, 12, "exp_avg")
    assert parse_bucket("optimizer.state.exp_avg.w") is parse_bucket(f"{key}.more") is None


# --- slices ----------------------------------------------------------------------------------------------------------


def test_spans_of_a_weight_over_shards() -> None:
    """A weight at [10, 30) of a buffer, in a bucket of 40 elements from 0 on, four ranks."""
    assert _spans(10, 30, 0, 40, 4) == ((0, 0), (0, 10), (10, 20), (0, 0))
    assert _spans(5, 12, 0, 40, 4) == ((0, 5), (5, 7), (0, 0), (0, 0))
    assert _spans(105, 112, 100, 40, 4) == ((0, 5), (5, 7), (0, 0), (0, 0))


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 1), (1, 6), (2, 3, 4)])
def test_boxes_of_a_slice(shape: tuple[int, ...]) -> None:
    """Every element of it once, in order, in as few boxes as there can be."""
    elements = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(elements.numel() + 1):
        for stop in range(start, elements.numel() + 1):
            found = list(boxes(start, stop, shape))
            parts = [
                elements[tuple(map(slice, offsets, map(sum, zip(offsets, sizes, strict=True))))]
                for offsets, sizes in found
            ]
            assert [part.shape for part in parts] == [sizes for _, sizes in found]
            assert [int(x) for part in parts for x in part.flatten()] == list(range(start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)


def test_slices_of_a_fused_weight_in_place() -> None:
    """Of the third of five layers, on the second of two tensor-parallel ranks, in halves that a factory makes."""
    weight = torch.arange(24.0).view(8, 3)
    param = torch.nn.Parameter(weight)
    base = sharded("w", param, (0, 2, 5), (1, 1, 2), before=1)
    (place,) = places_of([param], {"w": apply_swiglu_sharded_factory(base, ((0, 2, 5),))})
    for source in ("optimizer.state.m", f"optimizer.state.m{ALONE}"):
        whole, read = torch.zeros(5, 16, 3), torch.full((5, 16, 3), -1.0)
        for part in place.sharded(source, weight, (0, 0, 0)):
            at(whole if part.global_shape == whole.shape else whole[2], part).copy_(part.data)
        assert torch.equal(torch.cat([whole[2, 4:8], whole[2, 12:]]), weight)
        for span in ((0, 5), (5, 20), (20, 20), (20, 24)):
            state = weight.view(-1)[slice(*span)].clone()
            for part in place.sharded(source, state, (0, 0, 0), span):
                assert part.data.untyped_storage().data_ptr() == state.untyped_storage().data_ptr(), "no copy"
                at(read if part.global_shape == read.shape else read[2], part).copy_(part.data)
        assert torch.equal(read, torch.where(read < 0, read, whole)) and (read >= 0).sum() == 24


def at(whole: torch.Tensor, part: ShardedTensor) -> torch.Tensor:
    """The elements of a global tensor that a rank has."""
    return whole[
        tuple(map(slice, part.global_offset, map(sum, zip(part.global_offset, part.local_shape, strict=True))))
    ]


def test_factory_that_does_not_cut_rows_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 6))
    base = sharded("w", weight)
    with pytest.raises(CheckpointError, match="w: the model saves this weight in parts that are no blocks of its rows"):
        places_of([weight], {"w": _split_tensor_factory(base, [2, 4], ["x", "y"], 1)})


# --- reading in pieces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [8, 50, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_boxes_of_stored_tensors(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int) -> None:
    """Rows that are larger than a piece as well; a file within a file; targets of another type and strides."""
    monkeypatch.setattr(pieces, "PIECE", piece)
    stored = torch.randn(1, 7, 3, 5).to(dtype)
    for tensor, offsets, sizes in (
        (stored, (0, 2, 0, 1), (1, 4, 3, 3)),
        (stored[0, :, 1], (3, 0), (4, 5)),
        (stored[0, :, 0, :].T, (1, 1), (3, 6)),
        (stored[0, 0, 0, 0], (), ()),
    ):
        file = io.BytesIO(b"before")
        file.seek(6)
        torch.save(tensor, file)
        view = part_of(file, SimpleNamespace(offset=6, length=file.tell() - 6))
        box = tensor[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
        target = torch.zeros(*sizes, 2)[..., 1]
        StoredTensor(view, "it").read_into(target, offsets)
        assert torch.equal(target, box.float())


def test_file_that_is_cut() -> None:
    """The index of torch's zip file is at its end: what is cut cannot be opened."""
    file = io.BytesIO()
    torch.save(torch.ones(64, 8), file)
    with pytest.raises(CheckpointError, match="it is damaged: it cannot be read"):
        StoredTensor(io.BytesIO(file.getvalue()[:2000]), "it")


# --- the record ------------------------------------------------------------------------------------------------------

MUON = Rule("muon", "whole", ("momentum_buffer",))
ADAM = Rule("adam", "", ("exp_avg", "exp_avg_sq"))


def weight(key: str, index: tuple[int, ...], siblings: int, rule: Rule) -> WeightRecord:
    return WeightRecord(key, index, siblings, rule, (("momentum", 0.9), ("betas", [0.9, 0.95])))


def test_record_keeps_everything() -> None:
    """Of three ranks; the first two have shards of one weight."""
    sums = (("w[0]", "momentum_buffer"), ("w[0]", WEIGHT))
    parts = [
        RankRecord((weight("w", (0,), 2, MUON),), sums),
        RankRecord((weight("w", (0,), 2, MUON),), sums),
        RankRecord(
            (weight("w", (1,), 2, MUON), weight("v", (), 1, ADAM)), (("v", WEIGHT), ("w[1]", "momentum_buffer"))
        ),
    ]
    high = 1 << 64
    values = [[5 * high - 1, high - 1], [3 + 4 * high, 3], [4, high * high - 1]]
    record = JoinedRecord(parts).filled(7, [_packed(each) for each in values])
    assert Record.from_plain(record.to_plain()) == record
    assert record.step == 7 and record.model == {"w[0]": 2, "v": 4}
    assert record.sums["w[0]"] == {"momentum_buffer": 2 + 8 * high}, "each half adds up for itself, modulo 2**64"
    assert record.sums["w[1]"] == {"momentum_buffer": high * high - 1}
    assert (record.sum_of("v", WEIGHT), record.sum_of("v", "exp_avg")) == (4, None)
    assert str(record.rule("w[1]")) == "muon (whole)" and record.rule("other") is None
    assert record.numbers == [{"momentum": 0.9, "betas": [0.9, 0.95]}] and len(record.rules) == 2
    assert record.alone == []
    assert JoinedRecord([RankRecord((), ())]).filled(0, [b""]).weights == {}


def test_record_keeps_numbers_that_change_in_place() -> None:
    """They are told again when they are others; Megatron-Core's are tuples, a framework's may be lists."""
    group: dict[str, Any] = {"betas": [0.9, 0.95], "step": 3}
    before = numbers_of(group)
    group["betas"][0] = 0.5
    assert before == (("betas", [0.9, 0.95]),) != numbers_of(group)


def test_record_without_sums_of_the_model_is_read() -> None:
    plain = JoinedRecord([]).record.to_plain()
    del plain["model"], plain["digest"]
    assert Record.from_plain({**plain, "version": 2}).model == {}
    with pytest.raises(ValueError, match="is not what was saved"):
        Record.from_plain(plain)


def test_record_knows_states_that_not_all_layers_have() -> None:
    weights = (weight("w", (0,), 3, MUON), weight("w", (1,), 3, ADAM), weight("w", (2,), 3, MUON))
    assert JoinedRecord([RankRecord(weights, ())]).record.alone == [
        ("exp_avg", "w"),
        ("exp_avg_sq", "w"),
        ("momentum_buffer", "w"),
    ]


def test_newer_form_is_refused() -> None:
    plain = {**JoinedRecord([]).record.to_plain(), "version": 4, "package": "9.9"}
    with pytest.raises(ValueError, match=r"form 4, written by megatron_muon 9\.9"):
        Record.from_plain(plain)
    common = {"optimizer": {RECORD: {"version": 4, "package": "9.9", "somewhere": "else"}}}
    with pytest.raises(CheckpointError, match=r"folder: its optimizer state has form 4, written by megatron_muon 9\.9"):
        records_in("folder", common)
    del plain["digest"]
    assert Record.from_plain({**plain, "version": 1}).version == 1


def test_record_that_was_changed_is_refused() -> None:
    with pytest.raises(ValueError, match="is not what was saved"):
        Record.from_plain({**JoinedRecord([]).record.to_plain(), "step": 1})


def test_differences_between_rules() -> None:
    assert difference("w", MUON, MUON) is None
    assert difference("w", ADAM, MUON) == "w: adam in the checkpoint, muon (whole) now"
    assert difference("w", None, MUON) == "w: not trained in the checkpoint, muon (whole) now"


def test_layout_text_does_not_depend_on_sizes() -> None:
    def layout(scale: int) -> MatrixLayout:
        sections = (Section("q", 4 * scale, matrix_rows=2 * scale), Section("b", scale, SCALAR))
        return MatrixLayout("in_proj", sections)

    assert layout_text(layout(1)) == layout_text(layout(3)) == "in_proj: q by head, b scalar"
    assert layout_text(WHOLE) == "whole"
    # As on two tensor-parallel ranks, of which the first has rows of the latents only.
    sections = [Section(name, 8) for name in ("q_latent", "kv_latent", "q_latent", "kv_latent", "k_rope")]
    assert layout_text(MatrixLayout("down", tuple(sections))) == "down: q_latent, kv_latent, k_rope"


# --- the second moment that Muon has not -----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.95])
def test_second_moment_of_noise_is_found_in_its_average(decay: float) -> None:
    average = torch.zeros(100, 100)
    for _ in range(200):
        average.lerp_(3.0 * torch.randn(100, 100), 1.0 - decay)
    estimate = average.square().mean() * gradients_to_average(decay)
    assert estimate.item() == pytest.approx(9.0, rel=0.1)


# --- places ----------------------------------------------------------------------------------------------------------


def sharded(key: str, data: torch.Tensor, *offsets: tuple[int, int, int], before: int = 0) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, data, *offsets, replica_id=(0, 0, 0), prepend_axis_num=before)


def test_weight_that_the_model_saves_in_parts() -> None:
    """Views of a fused weight under keys of their own: its state is cut in the same way."""
    param = torch.nn.Parameter(torch.randn(6, 4))
    state = {"a": sharded("q", param.data[:4]), "b": sharded("kv", param.data[4:])}
    (place,) = places_of([param], state)
    assert (place.name, place.siblings) == ("q", 1)
    momentum = torch.arange(24.0).reshape(6, 4)
    parts = tensors_of(place.sharded("optimizer.state.m", momentum, (0, 0, 0)))
    assert [part.key for part in parts] == ["optimizer.state.m.q", "optimizer.state.m.kv"]
    assert torch.equal(torch.cat([part.data for part in parts]), momentum)
    rows = tensors_of(place.sharded("optimizer.state.r", momentum[:, :1], (0, 0, 0)))
    assert [tuple(part.data.shape) for part in rows] == [(4, 1), (2, 1)]


def test_weight_that_is_not_saved_is_refused() -> None:
    param = torch.nn.Parameter(torch.randn(6, 4))
    with pytest.raises(CheckpointError, match=r"not saved:\n  a weight of shape 6 x 4\n.*has neither"):
        places_of([param], {"a": sharded("q", param.data[:4])})


def test_one_layer_of_a_stack() -> None:
    param = torch.nn.Parameter(torch.randn(3, 4))
    (place,) = places_of([param], {"w": sharded("w", param, (0, 2, 5), (1, 1, 2), before=1)})
    assert (place.name, place.siblings) == ("w[2]", 5)
    (stacked,) = tensors_of(place.sharded("optimizer.state.m", torch.ones(3, 4), (0, 0, 1)))
    assert (stacked.global_shape, stacked.global_offset, stacked.replica_id) == ((5, 6, 4), (2, 3, 0), (0, 0, 1))
    (alone,) = tensors_of(place.sharded(f"optimizer.state.m{ALONE}", torch.ones(3, 4), (0, 0, 1)))
    assert (alone.key, alone.global_shape, alone.global_offset) == (f"optimizer.state.m.w{ALONE}2", (6, 4), (3, 0))
    (columns,) = tensors_of(place.sharded("optimizer.state.c", torch.ones(1, 4), (0, 0, 0)))
    assert (columns.global_shape, columns.replica_id) == ((5, 1, 4), (0, 1, 0)), "the second shard has a copy"
    with pytest.raises(CheckpointError, match=r"a state of shape 2 x 4 has no place beside a weight of shape 3 x 4:"):
        place.sharded("optimizer.state.x", torch.ones(2, 4), (0, 0, 0))


@pytest.mark.parametrize("fused", [False, True])
def test_step_counts_are_put_where_the_optimizer_counts(fused: bool) -> None:
    """torch's Adam counts in the state of each weight, fused ones in the group, as all on the CPU runtime."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    inner = (GroupStepAdamW if fused else torch.optim.AdamW)(params)
    for param in params:
        param.grad = torch.ones(2)
    inner.step()
    request = Request.__new__(Request)
    request.held = [ParamState(param, inner, inner.param_groups[0], param, None) for param in params]
    request._set_steps(7)
    inner.step()
    counts = [inner.param_groups[0]["step"]] if fused else [inner.state[param]["step"] for param in params]
    assert [int(count) for count in counts] == [8] * len(counts)

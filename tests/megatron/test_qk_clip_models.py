"""QK-clip of models of every kind: frozen and absent attention, several optimizers, every way to drive a step."""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import io
import weakref
from typing import Any, NamedTuple

import torch

from megatron_muon.errors import ConfigError
from megatron_muon.plugin.qk_clip import clip_of
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.qk_clip import GQA, LATENT
from tests.megatron.test_cpu_mamba import MAMBA
from tests.pool import RankPool

PP2 = Layout(pp=2, overlap=False)
"""Without overlap, which asks each weight that can be trained for a gradient in the first step."""
CLIP = {"qk_clip": True, "qk_clip_threshold": 0.05}


def build(frozen: tuple[str, ...] = (), optimizer: dict[str, Any] | None = None, **model: Any) -> harness.Run:
    """A run of a model in which the weights of these names were frozen before DDP was made."""
    import megatron_muon
    from megatron_muon.routing import global_names

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    PP2.initialize()
    chunks = harness.build_model(PP2, **{**CLIP, **model})
    for name, param in global_names(chunks[0]):
        if any(fnmatch.fnmatch(name, pattern) for pattern in frozen):
            param.requires_grad_(False)
    chunks = harness.wrap(chunks, PP2)
    config = harness.optimizer_config(PP2, **(optimizer or {}))
    return harness.Run(PP2, chunks, get_megatron_optimizer(config, chunks))


class Seen(NamedTuple):
    """What a rank has seen of a run of two steps."""

    measured: list[str]
    clipped: list[str]
    text: str
    maximum: float
    heads: int
    scalars: list[str]
    moved: bool


QKV = "*.linear_qkv.weight"
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "some": (("decoder.layers.0.*", "decoder.layers.2.self_attention.*", "decoder.layers.3" + QKV), GQA),
    "all": ((QKV,), GQA),
    "logged": ((QKV,), {**GQA, "qk_clip": False, "log_max_attention_logit": True}),
    "absent": ((), {**MAMBA, "pattern": "M-|M-"}),
    "one stage": ((), {**MAMBA, "pattern": "M-|*-"}),
    "half": (("*.linear_q_up_proj.weight",), LATENT),
}


def see_each() -> dict[str, Seen | str]:
    return {name: see(*case) for name, case in CASES.items()}


def see(frozen: tuple[str, ...], model: dict[str, Any]) -> Seen | str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            run = build(frozen, **model)
        except ConfigError as error:
            return str(error)
    from megatron.core.optimizer.qk_clip import clip_qk

    before = {name: param.detach().clone() for name, param in run.chunks[0].named_parameters()}
    run.losses(2)
    still = {name for name, param in run.chunks[0].named_parameters() if not param.requires_grad}
    moved = any(not torch.equal(before[name], run.chunks[0].get_parameter(name)) for name in still)
    lines = "\n".join(line for line in text.getvalue().splitlines() if line.startswith("QK-clip"))
    maximum, clip = float(clip_qk(run.chunks)), clip_of(run.chunks)
    if clip is None:
        return Seen([], [], lines, maximum, 0, [], moved)
    layers = [clip.names[number] for number in sorted({*clip.heads.layer[clip._clippable].tolist()})]
    return Seen(clip.names, layers, lines, maximum, int(clip.heads_clipped), list(clip.scalars()), moved)


def test_frozen_attention_is_measured_and_absent_attention_said(pool: RankPool) -> None:
    first, second = pool.run(see_each, 2)
    layers = [f"decoder.layers.{number}.self_attention" for number in range(4)]
    for found in (first, second):
        some = found["some"]
        assert some.measured == layers and some.clipped == layers[1:2] and not some.moved
        assert some.maximum > 0.05 and some.heads == 4  # of the layer's, not of the model's 16
        for name in ("all", "logged"):
            frozen = found[name]
            assert frozen.measured == layers and frozen.clipped == [] and not frozen.moved
            assert frozen.maximum > 0.05 and frozen.scalars == ["max_attention_logit"]
        absent = found["absent"]
        assert absent.measured == [] and absent.maximum == 0
        stage = found["one stage"]
        assert stage.measured == stage.clipped and len(stage.measured) == 1 and stage.heads > 0
        assert found["half"].startswith("--qk-clip: of the query and key weights of decoder.layers.0.self_attention")
    for name in ("some", "all", "logged", "one stage"):
        assert first[name].maximum == second[name].maximum
    assert first["some"].text.splitlines()[:2] == [
        "QK-clip: 4 heads in 1 layers are clipped above 0.05 (alpha 0.5, shared keys: q_only)",
        "QK-clip: attention logits of 12 heads in 3 layers are measured, not clipped",
    ]
    assert first["absent"].text == "QK-clip: the model has no softmax attention, nothing is measured"
    assert second["absent"].text == second["some"].text == ""


DRIVERS = ("step", "chain", "halves", "prepared before", "skipped first")


def drive_each() -> dict[str, tuple[list[torch.Tensor], int, float]]:
    return {driver: drive(driver) for driver in DRIVERS}


def drive(driver: str) -> tuple[list[torch.Tensor], int, float]:
    """Two steps: weights, heads clipped in the last one, and the largest logit that Megatron is told."""
    run = build(optimizer={"clip_grad": 0.0}, **GQA)
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.qk_clip import clip_qk

    its = run.optimizer

    def halves() -> tuple[bool, float, None]:
        """Of MIMO, and of loops that look at the gradients between."""
        its.prepare_grads()
        return its.step_with_ready_grads(), 0.0, None

    def prepared() -> Any:
        """Of loops that look at the norm before they call ``step``."""
        its.prepare_grads()
        its.get_grad_norm()
        return step()

    step = its.step
    if driver == "chain":
        run.optimizer = ChainedOptimizer([its])
    elif driver == "halves":
        its.step = halves
    elif driver == "prepared before":
        its.step = prepared
    elif driver == "skipped first":
        # Logits of a step that is thought better of are none of the next one's.
        its.step = lambda: (its.prepare_grads(), 0.0, None)
        data, run.data = run.data, harness.Data(global_batch=8)
        with torch.no_grad():
            for param in run.chunks[0].parameters():
                param.mul_(4.0)
        with contextlib.suppress(AssertionError):
            run.losses(1)
        with torch.no_grad():
            for param in run.chunks[0].parameters():
                param.div_(4.0)
        run.data, its.step, run.step = data, step, 0
    run.losses(2)
    weights = [param.detach().clone() for param in run.chunks[0].parameters()]
    return weights, int(clip_of(run.chunks).heads_clipped), float(clip_qk(run.chunks))


def test_every_way_to_drive_a_step_clips(pool: RankPool) -> None:
    for found in pool.run(drive_each, 2):
        weights, heads, maximum = found["step"]
        assert heads > 0 and maximum > 0.05
        for driver in DRIVERS:
            same = all(torch.equal(mine, its) for mine, its in zip(found[driver][0], weights, strict=True))
            assert same and found[driver][1:] == (heads, maximum), driver


def two_on_one() -> dict[str, Any]:
    """One optimizer for a backbone, and one, built later, for the rest of the same chunks."""
    run = build(**GQA)
    from megatron.core.optimizer import get_megatron_optimizer

    backbone, chunk = clip_of(run.chunks), run.chunks[0]
    cores = [module for module in chunk.modules() if hasattr(module, "scale_mask_softmax")]
    hooks = [len(core.scale_mask_softmax._forward_pre_hooks) for core in cores]
    run.losses(1)
    found: dict[str, Any] = {"alone": (int(backbone.heads_clipped), backbone.max_logit.item())}
    for name, param in chunk.named_parameters():
        param.requires_grad_("mlp" in name)
    config = harness.optimizer_config(PP2, name="adam")
    run.optimizer, first = get_megatron_optimizer(config, run.chunks), run.optimizer
    found["kept"] = clip_of(run.chunks) is backbone
    run.losses(1)
    second = clip_of(run.chunks)
    found["second"] = (second is not backbone, second.settings.clip, second.max_logit.item() > 0.05)
    run.optimizer = first
    run.losses(1)
    found["again"] = (clip_of(run.chunks) is backbone, int(backbone.heads_clipped))
    gone = [weakref.ref(second), *map(weakref.ref, first.chained_optimizers)]
    del second, first, backbone
    run.optimizer = None
    gc.collect()
    found["left"] = [reference() is not None for reference in gone]
    found["hooks"] = [
        len(core.scale_mask_softmax._forward_pre_hooks) - count for core, count in zip(cores, hooks, strict=True)
    ]
    found["known"] = clip_of(run.chunks)
    return found


def test_two_optimizers_of_the_same_chunks(pool: RankPool) -> None:
    """Each has its own maxima; one that is dropped leaves nothing in the model, which lives on."""
    for found in pool.run(two_on_one, 2):
        assert found["alone"][0] == 16 and found["alone"][1] > 0.05
        assert found["second"] == (True, False, True)
        assert found["again"][0] and found["again"][1] > 0
        assert not any(found["left"]) and found["hooks"] == [-1, -1] and found["known"] is None

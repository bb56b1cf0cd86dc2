"""QK-clip in Megatron-Core: measured in its attention layers, applied in its optimizers' step, logged with the rest.

Megatron's own function, called after the step, is replaced: it finds the work done and returns the maximum.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_muon._patching import Original, Patches
from megatron_muon.errors import ConfigError
from megatron_muon.monitor.sources import Report
from megatron_muon.plugin import options, recording
from megatron_muon.plugin.arguments import given
from megatron_muon.plugin.groups import ranks_of
from megatron_muon.plugin.qk_clip_build import FLAGS, build_clip
from megatron_muon.qk_clip.clip import QKClip
from megatron_muon.refusals import QK_CLIP, UNMEASURED, refuse
from megatron_muon.routing.wrappers import unwrapped

PATCHES = Patches()

_CLIPS: weakref.WeakKeyDictionary[torch.nn.Module, Callable[[], QKClip | None]] = weakref.WeakKeyDictionary()
"""Of model chunks without wrappers, the clip of the optimizer that has stepped last. Its optimizer keeps it alive."""


def clip_of(model: Any) -> QKClip | None:
    """The clip of a model, by its chunks or one of them; None if it has no optimizer, or nothing to measure."""
    chunk = model[0] if isinstance(model, Sequence) else model
    return _CLIPS.get(unwrapped(chunk), lambda: None)()


def _take_note(chunks: Sequence[torch.nn.Module], clip: QKClip) -> None:
    for chunk in chunks:
        _CLIPS[unwrapped(chunk)] = weakref.ref(clip)


@PATCHES.around(
    "megatron.core.optimizer.qk_clip:clip_qk",
    "Megatron's own clipping fails under tensor parallelism, with gates, biases, MTP and hybrid layers",
)
def _clip_qk(original: Original, model: Any, log_max_only: bool = False) -> torch.Tensor | float:
    """What Megatron calls after the optimizer's step: the largest logit of the step, a scalar on the device.

    As Megatron's own, 0 for a model without softmax attention.
    """
    chunks = [unwrapped(part) for chunk in model for part in _parts(chunk)]
    if not all(chunk in _CLIPS for chunk in chunks):
        raise ConfigError(
            "--qk-clip: the model's optimizer was not built by megatron.core.optimizer.get_megatron_optimizer, so "
            "nothing was measured or clipped. Build it with that function, after megatron_muon.install()."
        )
    clips = {clip for clip in map(clip_of, chunks) if clip is not None}
    return torch.stack([clip.max_logit for clip in clips]).max() if clips else 0.0


def _parts(chunk: Any) -> Sequence[torch.nn.Module]:
    """What has an optimizer of its own: a chunk, or each model of a ``MimoModel`` on this rank."""
    if type(unwrapped(chunk)).__name__ != "MimoModel":
        return [chunk]
    parts = [unwrapped(chunk).language_model, *unwrapped(chunk).modality_submodules.values()]
    return [part for part in parts if part is not None]


class _Logits:
    """What is logged of a clip, see :class:`Source`."""

    title, prefix = "QK-clip", "qk-clip"

    def __init__(self, clip: QKClip) -> None:
        self._clip = clip

    def report(self, iteration: int) -> Report:
        record: dict[str, Any] = {**self._clip.scalars()}
        text = f"max attention logit {record['max_attention_logit']:.5g}"
        if self._clip.settings.clip:
            text += f", heads clipped {record['heads_clipped']}"
        if self._by_layer(iteration):
            record["max_attention_logits"] = self._clip.by_layer()
        return Report(text, record)

    def scalars(self, iteration: int) -> dict[str, float]:
        values = {"max attention logit": self._clip.max_logit.item()}
        if self._clip.settings.clip:
            values["heads clipped"] = self._clip.heads_clipped.item()
        return values | (self._clip.by_layer() if self._by_layer(iteration) else {})

    def _by_layer(self, iteration: int) -> bool:
        interval = self._clip.settings.log_layers
        return interval > 0 and iteration % interval == 0


def build(optimizer: Any, config: Any, chunks: Sequence[torch.nn.Module], pg_collection: Any) -> None:
    """Measure logits, and clip weights inside the optimizer's step, before parameters are gathered."""
    ranks = ranks_of(pg_collection)
    clip = build_clip(config, chunks, options.of(config), optimizer, ranks)
    if clip is not None:
        _connect(optimizer, chunks, clip)
        if ranks.is_last:
            recording.watch(optimizer, _Logits(clip))
    for chunk in chunks:
        _CLIPS.setdefault(unwrapped(chunk), lambda: None)


def _connect(optimizer: Any, chunks: Sequence[torch.nn.Module], clip: QKClip) -> None:
    """Clip in the two halves of a step, and not in ``step()``: chains and MIMO call the halves of their parts."""
    prepare, zero_grad = optimizer.prepare_grads, optimizer.zero_grad

    def prepare_grads() -> bool:
        _take_note(chunks, clip)
        return clip.prepare(prepare)

    def forget_and_zero(*args: Any, **kwargs: Any) -> None:
        clip.forget()
        zero_grad(*args, **kwargs)

    _take_note(chunks, clip)
    optimizer.prepare_grads, optimizer.zero_grad = prepare_grads, forget_and_zero
    optimizer.step_with_ready_grads = functools.partial(clip.step, optimizer.step_with_ready_grads)


@PATCHES.around("megatron.training.arguments:validate_args", "--qk-clip works without TransformerEngine too")
def _with_check(original: Original, args: Any, *rest: Any, **kwargs: Any) -> Any:
    refuse(UNMEASURED, given(args))
    asked = {name: getattr(args, name, False) for name in FLAGS}
    if not any(asked.values()):
        return original(args, *rest, **kwargs)
    refuse(QK_CLIP, args)
    # Megatron's check asks for TransformerEngine 2.9 and for nothing else that is not checked above.
    for name in asked:
        setattr(args, name, False)
    try:
        return original(args, *rest, **kwargs)
    finally:
        for name, value in asked.items():
            setattr(args, name, value)


@PATCHES.making(
    "megatron.core.extensions.transformer_engine:TEDotProductAttention",
    "TransformerEngine is asked for maxima only where they are taken from it: that forbids its flash kernels",
)
def _with_choice(original: Any) -> Any:
    if not isinstance(original, type):
        return original  # without TransformerEngine there is no such class

    class TEDotProductAttention(original):
        """Megatron's, asked for maxima only if they are to come from it and can."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            from megatron.core.utils import is_te_min_version

            wanted = options.current().qk_logits
            can = is_te_min_version("2.9.0") and config.params_dtype in (torch.bfloat16, torch.float16)
            if any(getattr(config, flag, False) for flag in FLAGS) and not (wanted in ("auto", "te") and can):
                config = copy.copy(config)
                for flag in FLAGS:
                    setattr(config, flag, False)
            super().__init__(config, *args, **kwargs)

    TEDotProductAttention.__qualname__ = original.__qualname__
    TEDotProductAttention.__module__ = original.__module__
    return TEDotProductAttention

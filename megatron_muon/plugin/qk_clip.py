"""QK-clip in Megatron-Core: measured in its attention layers, applied in its optimizers' step, logged with the rest.

Megatron's own function, called after the step, is replaced: it finds the work done and returns the maximum.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_muon._patching import Patch
from megatron_muon.agree import Ranks
from megatron_muon.errors import ConfigError
from megatron_muon.monitor.sources import Report
from megatron_muon.plugin import options, recording
from megatron_muon.plugin.groups import ranks_of
from megatron_muon.plugin.qk_clip_build import FLAGS, build_clip
from megatron_muon.qk_clip.clip import QKClip
from megatron_muon.refusals import QK_CLIP, refuse

__all__ = ["clip_of", "patches"]

_CLIP = "muon_qk_clip"
"""Attribute of a model chunk that carries its :class:`QKClip`."""


def patches() -> list[Patch]:
    """Hooks on the optimizer, on Megatron's clipping and flags, and on TransformerEngine's attention."""
    return [
        Patch(
            "megatron.core.optimizer:get_megatron_optimizer",
            _with_clip,
            "attention logits are measured, and weights clipped inside the step, before parameters are gathered",
        ),
        Patch(
            "megatron.core.optimizer.qk_clip:clip_qk",
            lambda original: functools.wraps(original)(functools.partial(_clip_qk)),
            "Megatron's own clipping fails under tensor parallelism, with gates, biases, MTP and hybrid layers",
        ),
        Patch(
            "megatron.training.arguments:validate_args",
            _with_check,
            "--qk-clip works without TransformerEngine too",
        ),
        Patch(
            "megatron.core.extensions.transformer_engine:TEDotProductAttention",
            _with_choice,
            "TransformerEngine is asked for maxima only where they are taken from it: that forbids its flash kernels",
        ),
    ]


def clip_of(model: Any) -> QKClip | None:
    """The clip of a model, by its chunks or one of them; None if its optimizer was built without."""
    chunk = model[0] if isinstance(model, Sequence) else model
    return getattr(chunk, _CLIP, None)


def _clip_qk(model: Any, log_max_only: bool = False) -> torch.Tensor:
    """What Megatron calls after the optimizer's step: the largest logit of the step, a scalar on the device."""
    clip = clip_of(model)
    if clip is None:
        raise ConfigError(
            "--qk-clip: the model's optimizer was not built by megatron.core.optimizer.get_megatron_optimizer, so "
            "nothing was measured or clipped. Build it with that function, after megatron_muon.install()."
        )
    return clip.max_logit


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


def _with_clip(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        config, chunks = given["config"], given["model_chunks"]
        ranks = _ranks(chunks, given.get("pg_collection"))
        clip = build_clip(config, chunks, options.of(config), optimizer, ranks)
        if clip is not None:
            optimizer.step = functools.partial(clip.step, optimizer.step)
            if ranks.is_last:
                recording.watch(optimizer, _Logits(clip))
        for chunk in chunks:
            setattr(chunk, _CLIP, clip)
        return optimizer

    return get_megatron_optimizer


def _ranks(chunks: Sequence[torch.nn.Module], pg_collection: Any) -> Ranks:
    """The ranks of a model."""
    if type(chunks[0]).__name__ == "MimoModel":
        # Its parts have groups of their own, and its optimizer agrees over all ranks of the run.
        return Ranks.of_world()
    return ranks_of(pg_collection)


def _with_check(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
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

    return validate_args


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

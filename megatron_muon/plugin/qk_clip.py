"""QK-clip in Megatron-Core: measured in its attention layers, applied in its optimizers' step, logged with the rest.

Megatron's own function, called after the step, is replaced: it finds the work done and returns the maximum.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon._patching import Patch
from megatron_muon.errors import ConfigError
from megatron_muon.plugin import options
from megatron_muon.plugin.qk_clip_build import FLAGS, build_clip, check_numbers
from megatron_muon.qk_clip.clip import QKClip

__all__ = ["clip_of", "log_scalars", "patches"]

_CLIP = "muon_qk_clip"
"""Attribute of a model chunk that carries its :class:`QKClip`."""


def patches() -> list[Patch]:
    """Hooks on the optimizer, on Megatron's clipping, flags and log, and on TransformerEngine's attention."""
    return [
        Patch(
            "megatron.core.optimizer:get_megatron_optimizer",
            _with_clip,
            "attention logits are measured, and weights clipped inside the step, before parameters are gathered",
        ),
        Patch(
            "megatron.core.optimizer.qk_clip:clip_qk",
            lambda original: _clip_qk,
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
        Patch(
            "megatron.training.training:training_log",
            _with_log,
            "the largest logit and the number of clipped heads are logged, over the whole model",
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


def _with_clip(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_megatron_optimizer(config: Any, model_chunks: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        optimizer = original(config, model_chunks, *args, **kwargs)
        clip = build_clip(config, model_chunks, options.of(config), optimizer)
        if clip is not None:
            optimizer.step = functools.partial(clip.step, optimizer.step)
        for chunk in model_chunks:
            setattr(chunk, _CLIP, clip)
        _log.clip = clip
        return optimizer

    return get_megatron_optimizer


def _with_check(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        asked = {name: getattr(args, name, False) for name in FLAGS}
        if not any(asked.values()):
            return original(args, *rest, **kwargs)
        check_numbers(asked["qk_clip"], args.qk_clip_threshold, args.qk_clip_alpha)
        for name in ("use_torch_fsdp2", "use_megatron_fsdp"):
            if asked["qk_clip"] and getattr(args, name, False):
                raise ConfigError(
                    f"--{name.replace('_', '-')} with --qk-clip: FSDP's shards are not clipped; use "
                    "--use-distributed-optimizer."
                )
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


class _Log:
    """What is said about the clip of the model in training, on the last rank, which has Megatron's writers.

    At Megatron's intervals, where it waits for the device itself.
    """

    def __init__(self) -> None:
        self.clip: QKClip | None = None
        self.scalars: dict[str, float] = {}

    def write(self, iteration: int) -> None:
        """Write what is due after ``iteration``."""
        if self.clip is None or dist.get_rank() != dist.get_world_size() - 1:
            return
        args = options.training_arguments()
        if iteration % args.log_interval == 0:
            self._print(self.clip, iteration)
        if iteration % args.tensorboard_log_interval == 0:
            self._to_writers(self.clip, iteration)

    def _print(self, clip: QKClip, iteration: int) -> None:
        self.scalars = clip.scalars()
        clipped = f", heads clipped {self.scalars['heads_clipped']}" if clip.settings.clip else ""
        logit = self.scalars["max_attention_logit"]
        print(f" QK-clip after iteration {iteration}: max attention logit {logit:.5g}{clipped}", flush=True)

    def _to_writers(self, clip: QKClip, iteration: int) -> None:
        training = sys.modules["megatron.training.global_vars"]
        tensorboard, wandb = training.get_tensorboard_writer(), training.get_wandb_writer()
        if not tensorboard and not wandb:
            return
        values = {"max attention logit": clip.max_logit.item()}
        if clip.settings.clip:
            values["heads clipped"] = clip.heads_clipped.item()
        if (interval := clip.settings.log_layers) and iteration % interval == 0:
            values |= clip.by_layer()
        for name, value in values.items():
            if tensorboard:
                tensorboard.add_scalar(f"qk-clip/{name}", value, iteration)
            if wandb:
                wandb.log({f"qk-clip/{name}": value}, iteration)


_log = _Log()


def log_scalars(iteration: int) -> dict[str, Any]:
    """What a record of an iteration that Megatron has just logged says too; empty without QK-clip."""
    clip = _log.clip
    if clip is None:
        return {}
    layers = clip.settings.log_layers and iteration % clip.settings.log_layers == 0
    return {**_log.scalars, **({"max_attention_logits": clip.by_layer()} if layers else {})}


def _with_log(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        _log.write(signature.bind(*args, **kwargs).arguments["iteration"])
        return result

    return training_log

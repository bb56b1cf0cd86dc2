"""The largest pre-softmax logit of each head, measured in training's forward passes.

Sources, by ``--muon-qk-logits``:

* ``scores``: Megatron's local attention has the scores at hand; their maximum over visible keys is exact and costs one
  pass over them.
* ``te``: TransformerEngine from 2.9 on returns the maxima from its kernels (fused and unfused, 16 bits).
* ``exact``: the products of queries and keys once more, in chunks, for any core attention. Costs about a sixth of
  attention's operations.
* ``lse``: the log-sum-exp of PyTorch's flash kernel, from a pass of its own: an upper bound, too high by at most the
  logarithm of the number of visible keys (8.3 for 4096) and by little when large logits dominate.
* ``own``: a core attention of the user calls :func:`record`.

Maxima go into a static buffer, in place, so that CUDA graphs can capture it. Evaluation (modules in ``eval()``) does
not count; recomputed activations count twice, which changes no maximum.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.context_parallel import balanced_positions, gathered
from megatron_muon.errors import ConfigError

_CHUNK = 1 << 22
"""Scores looked at together: bounds the memory of a measurement to 16 MiB of float32."""


@dataclass(eq=False)
class Gauge:
    """Where an optimizer has the maxima of one core attention's heads. It alone keeps the gauge alive.

    Attributes:
        name: of the attention layer.
        maxima: (heads on this rank,) float32, a view of the model's buffer.
        cp_group: the context-parallel group; None without.
        source: from :func:`source_of`.
        active: whether this step is measured.
        rehearses: whether the forward pass under way is no step's: Megatron-Core warms up what it will capture in a
            CUDA graph, on whatever the memory of its inputs holds.
    """

    name: str
    maxima: torch.Tensor
    cp_group: dist.ProcessGroup | None = None
    source: str = "own"
    active: bool = True
    rehearses: Callable[[], bool] = lambda: False

    def counts(self, module: torch.nn.Module) -> bool:
        """Whether a forward pass of a module is to be measured."""
        return self.active and module.training and not self.rehearses()

    @torch.no_grad()
    def take(self, values: torch.Tensor) -> None:
        """Take note of the maxima of one forward pass.

        Args:
            values: one for each head of this rank; or for each head of this rank's part of them, where context
                parallelism by all-to-all divides heads.

        Raises:
            ValueError: for any other number of values.
        """
        values = values.detach().reshape(-1).to(self.maxima.dtype)
        target = self.maxima
        if values.numel() != target.numel():
            parts = self.cp_group.size() if self.cp_group is not None else 1
            if values.numel() * parts != target.numel():
                raise ValueError(
                    f"{self.name}: {values.numel()} maxima of attention logits for {target.numel()} heads on this rank"
                )
            assert self.cp_group is not None
            target = target.view(parts, -1)[self.cp_group.rank()]
        torch.maximum(target, values, out=target)


_GAUGES: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakSet[Gauge]] = weakref.WeakKeyDictionary()
"""Of core attentions. One that is trained by several optimizers has a gauge of each, a copy of it has none."""


def record(core_attention: torch.nn.Module, values: torch.Tensor) -> None:
    """Report a forward pass's logits, from a core attention that knows them (``--muon-qk-logits own``).

    Does nothing where QK-clip is off, in evaluation, and in steps that are not measured.

    Args:
        core_attention: the module.
        values: (heads on this rank,) the largest logit of each head, scaled and masked, before the softmax; or an upper
            bound such as the largest log-sum-exp of its rows.
    """
    for gauge in _GAUGES.get(core_attention, ()):
        if gauge.counts(core_attention) and gauge.source in ("own", "te"):
            gauge.take(values)


def source_of(core: Any, wanted: str, name: str) -> str:
    """Where the maxima of a core attention come from.

    Raises:
        ConfigError: if ``wanted`` cannot be had from it.
    """
    local = isinstance(getattr(core, "scale_mask_softmax", None), torch.nn.Module)
    te = hasattr(core, "current_max_attn_logits")
    flag = f"--muon-qk-logits {wanted}"
    if wanted == "auto":
        if local or te:
            return "scores" if local else "te"
        if _is_a(core, "TEDotProductAttention"):
            return "exact"
        raise ConfigError(
            f"{name}: {type(core).__name__} is no core attention whose logits are known how to get. Add "
            "--muon-qk-logits exact (its queries times its keys; for sparse attention an upper bound), or have it call "
            "megatron_muon.qk_clip.record and add --muon-qk-logits own."
        )
    if wanted == "scores" and not local:
        raise ConfigError(f"{flag}: {name} ({type(core).__name__}) shows no scores; use auto or exact.")
    if wanted == "te" and not te:
        raise ConfigError(
            f"{flag}: {name} ({type(core).__name__}) does not return maxima; that takes TransformerEngine 2.9 or later "
            "and bfloat16 or float16. Use auto or exact."
        )
    return wanted


def attach(core: Any, gauge: Gauge) -> None:
    """Let a core attention fill a gauge, as long as there is the gauge."""
    _GAUGES.setdefault(core, weakref.WeakSet()).add(gauge)
    if gauge.source == "own":
        return
    if gauge.source == "te":
        handle = core.register_forward_hook(_from_te)
    else:
        module, measure = (core.scale_mask_softmax, _of_scores) if gauge.source == "scores" else (core, _of_inputs)
        handle = module.register_forward_pre_hook(_before(module, gauge, measure), with_kwargs=True)
    weakref.finalize(gauge, handle.remove)


def _before(
    own: Any, gauge: Gauge, measure: Callable[[Any, dict[str, Any], Gauge], torch.Tensor]
) -> Callable[..., None]:
    """A hook that gives ``gauge`` the maxima of a forward pass, if it counts, and if its module is no copy of ``own``.

    It keeps neither alive.
    """
    signature = inspect.signature(own.forward)
    reference, mine = weakref.ref(gauge), weakref.ref(own)

    @torch.no_grad()
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        gauge = reference()
        if gauge is not None and gauge.counts(module) and mine() is module:
            gauge.take(measure(module, signature.bind(*args, **kwargs).arguments, gauge))

    return hook


def _of_scores(softmax: Any, given: dict[str, Any], gauge: Gauge) -> torch.Tensor:
    """The maxima of what Megatron's softmax is given."""
    scores, hidden = given["input"], given["mask"]
    rows, columns = scores.shape[-2:]
    window = softmax.window_size
    causal = hidden is None and rows > 1 and _name(softmax.attn_mask_type) == "causal"
    if window is not None or causal:
        positions = torch.arange(columns, device=scores.device)
        left, right = window or (-1, 0)
        hidden = hidden_keys(positions[-rows:], positions, (left, max(right, 0)))
    return score_maxima(scores, hidden) * (softmax.scale or 1.0)


def _from_te(core: Any, args: Any, output: Any) -> None:
    """TransformerEngine has its maxima in an attribute; it is emptied, for Megatron would add them up itself."""
    values = core.current_max_attn_logits
    core.current_max_attn_logits = None
    if values is not None:
        record(core, values)


def _of_inputs(core: Any, given: dict[str, Any], gauge: Gauge) -> torch.Tensor:
    """The maxima of a core attention's products, found once more."""
    given = {**given, **given.pop("kwargs", {})}
    for name in ("packed_seq_params", "attention_bias"):
        if given.get(name) is not None:
            raise ConfigError(
                f"--muon-qk-logits: {gauge.name} is given {name}, which the measurement does not know. Use te "
                "(TransformerEngine 2.9 or later) or leave --qk-clip off."
            )
    mask_type = _name(given.get("attn_mask_type") or core.attn_mask_type)
    softmax = getattr(core, "scale_mask_softmax", core)
    measure = key_maxima if gauge.source == "exact" else log_sum_exp
    return measure(
        given["query"],
        given["key"],
        core.softmax_scale * (getattr(softmax, "scale", None) or 1.0),
        hidden=given.get("attention_mask") if mask_type not in ("causal", "no_mask") else None,
        causal="causal" in mask_type,
        window=getattr(softmax, "window_size", None),
        cp_group=gauge.cp_group,
    )


def hidden_keys(
    query_positions: torch.Tensor, key_positions: torch.Tensor, window: tuple[int, int] = (-1, 0)
) -> torch.Tensor:
    """Which keys a window hides; by default a causal one.

    Args:
        query_positions: (queries,) in the sequence.
        key_positions: (keys,).
        window: how many keys to the left and to the right of itself a query sees; -1: all.

    Returns:
        (queries, keys) bool, True where hidden.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    left, right = window
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= distance < -right
    return hidden


def score_maxima(scores: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """The largest visible score of each head.

    Args:
        scores: (batch, heads, queries, keys).
        hidden: bool, of a shape that broadcasts to ``scores``, True where a query does not see a key; None if it sees
            all.

    Returns:
        (heads,) float32, or float64 for such scores; ``-inf`` for heads without a visible key.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if hidden is None:
        return scores.amax(dim=(0, 2, 3)).to(dtype)
    each = scores[:, 0].numel()
    step = max(1, _CHUNK // max(1, each))
    found = []
    for first in range(0, scores.size(1), step):
        some = scores[:, first : first + step]
        mask = hidden if hidden.dim() < 3 or hidden.size(-3) == 1 else hidden[..., first : first + step, :, :]
        found.append(some.masked_fill(mask, float("-inf")).amax(dim=(0, 2, 3)))
    return torch.cat(found).to(dtype)


def key_maxima(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    *,
    hidden: torch.Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The largest visible logit of each head, from queries and keys, in chunks of queries.

    Under context parallelism each rank has its part of the sequence in Megatron's balanced order (the first and the
    last of 2 x ranks pieces, and so on inwards); keys are gathered, and the result is the maximum over this rank's
    queries.

    Args:
        query: (queries, batch, heads, channels).
        key: (keys, batch, key heads, channels).
        scale: multiplies the products.
        hidden: bool mask that broadcasts to (batch, heads, queries, keys), True where hidden; None for none.
        causal: whether later keys are hidden.
        window: of sliding-window attention, see :func:`hidden_keys`.
        cp_group: the context-parallel group.

    Returns:
        (heads,) float32, or float64 for such queries.
    """
    queries, batch, heads, _ = query.shape
    positions = torch.arange(queries, device=query.device)
    if cp_group is not None and cp_group.size() > 1:
        key = gathered(key, cp_group)
        positions = balanced_positions(queries, cp_group.rank(), cp_group.size(), query.device)
    key_positions = torch.arange(key.size(0), device=key.device)
    groups = key.size(2)
    flat_key = key.permute(1, 2, 3, 0)  # batch, key heads, channels, keys
    flat_query = query.permute(1, 2, 0, 3).unflatten(1, (groups, heads // groups))
    left, right = window or (-1, -1)
    seen = (left, 0 if causal else right)
    step = max(1, _CHUNK // (batch * heads * key.size(0)))
    found = query.new_full((heads,), float("-inf"), dtype=torch.promote_types(query.dtype, torch.float32))
    for first in range(0, queries, step):
        some = flat_query[..., first : first + step, :]
        scores = torch.matmul(some.flatten(2, 3), flat_key).unflatten(2, (heads // groups, -1)).flatten(1, 2)
        mask = None if seen == (-1, -1) else hidden_keys(positions[first : first + step], key_positions, seen)
        if hidden is not None:
            rows = hidden if hidden.size(-2) == 1 else hidden[..., first : first + step, :]
            mask = rows if mask is None else mask | rows
        found = torch.maximum(found, score_maxima(scores, mask) * scale)
    return found


def log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    *,
    hidden: torch.Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The largest log-sum-exp of each head's rows, from PyTorch's flash kernel: an upper bound of its largest logit.

    Arguments and result are those of :func:`key_maxima`.

    Raises:
        ConfigError: for a mask other than causal or none, a window, or context parallelism.
    """
    left, right = window or (-1, -1)
    windowed = left >= 0 or (right >= 0 and not causal)
    if hidden is not None or windowed or (cp_group is not None and cp_group.size() > 1):
        raise ConfigError(
            "--muon-qk-logits lse: the flash kernel knows causal and full attention on whole sequences; with other "
            "masks, sliding windows and context parallelism use --muon-qk-logits exact."
        )
    if query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"--muon-qk-logits lse with {query.dtype} on a GPU: the flash kernel takes bfloat16 and float16. Use "
            "--bf16, or --muon-qk-logits exact."
        )
    share = query.size(2) // key.size(2)
    q = query.permute(1, 2, 0, 3)
    k = key.permute(1, 2, 0, 3).repeat_interleave(share, dim=1)
    if query.is_cuda:
        lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, 0.0, causal, False, scale=scale)[1]
    else:
        lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, causal, scale=scale)[1]
    # (batch, heads, queries); the CPU kernel of some torch versions gives (batch, queries, heads).
    return lse.amax(dim=(0, 2 if lse.size(1) == query.size(2) else 1)).float()


def _name(mask_type: Any) -> str:
    """``causal``, ``padding_causal``, ...: of Megatron's enumeration, or TransformerEngine's string."""
    return getattr(mask_type, "name", mask_type)


def _is_a(module: Any, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)

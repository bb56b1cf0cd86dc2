"""The QK-clip of a model: which attention layers it has, on all ranks, and what each rank connects to it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.config import MuonConfig, flag
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.registry import variant_asked_for
from megatron_muon.plugin.groups import device_of
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.plugin.optimizer_state import param_states
from megatron_muon.qk_clip.clip import ClipSettings, QKClip, Target
from megatron_muon.qk_clip.factors import Heads
from megatron_muon.qk_clip.measure import Gauge, attach, source_of
from megatron_muon.qk_clip.rows import Attention, Rows, has_norm, norm_rows, projection_rows
from megatron_muon.refusals import QK_CLIP, refuse
from megatron_muon.routing import _is_nonlinear_or_embedding, global_names
from megatron_muon.routing.layout import STIEFEL, layout_of

FLAGS = ("qk_clip", "log_max_attention_logit")
"""Fields of a model's config, and of the arguments, that ask for its logits."""


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a rank has found of one layer, for all ranks to agree on."""

    name: str
    heads: int
    groups: int
    clip: bool
    threshold: float
    alpha: float
    context: int
    graphs: str


def build_clip(
    config: Any, chunks: Sequence[torch.nn.Module], muon: MuonConfig, optimizer: Any, ranks: Ranks
) -> QKClip | None:
    """The clip of a model, whose ranks all call this; None if it has no layer to measure, on any rank.

    Raises:
        ConfigError: on all ranks, with the message of the first that has one.
    """
    layers: list[Attention] = []

    def look() -> tuple[bool, list[_Found]]:
        layers.extend(_layers(chunks))
        return any(map(_asks, _modules(chunks))), [_describe(layer) for layer in layers]

    asked, seen = zip(*ranks.gather(look), strict=True)
    found = sorted(_each_once(seen), key=lambda each: _in_order(each.name))
    if not found:
        if any(asked) and ranks.is_first:
            print("QK-clip: the model has no softmax attention, nothing is measured", flush=True)
        return None
    settings = _settings(found, config, muon)
    device = device_of(chunks)
    heads = Heads.of([(each.heads, each.groups) for each in found], device)
    weights = next((param.dtype for chunk in chunks for param in chunk.parameters()), torch.float32)
    dtype = torch.promote_types(weights, torch.float32)
    clip = QKClip([each.name for each in found], heads, settings, ranks, device, dtype)
    kept = _keeper(config, muon)
    notes, clipped = zip(*ranks.gather(lambda: _fill(clip, found, layers, muon, optimizer, kept)), strict=True)
    clip.clip_only(_each_once(clipped))
    if ranks.is_first:
        print("\n".join(f"QK-clip: {line}" for line in [*clip.describe(), *_each_once(notes)]), flush=True)
    return clip


def _keeper(config: Any, muon: MuonConfig) -> str:
    """What keeps the sizes of all of Muon's matrices, so that clipping them is undone; empty if nothing does."""
    if not is_ours(config.optimizer):
        return ""
    variant = variant_asked_for(muon.as_settings(), config)
    if variant.decays:
        return ""
    return f"{flag('variant')} {variant.name}" if muon.variant == variant.name else f"--optimizer {config.optimizer}"


def _refuse_kept(layer: Attention, rows: Sequence[Rows], kept: str) -> None:
    """Refuse to clip weights whose sizes are put back by the next step."""
    for param in (each.param for each in rows):
        if _is_nonlinear_or_embedding(param):
            continue
        keeper = f"{flag('param_rule')} GLOB=stiefel" if layout_of(param).direction == STIEFEL else kept
        if keeper:
            raise ConfigError(
                f"--qk-clip with {keeper}: {layer.name}'s query and key weights get the size back in the next step "
                f"that clipping takes from them. Leave --qk-clip off, or give them to Adam ({flag('param_rule')})."
            )


def _fill(
    clip: QKClip, found: Sequence[_Found], layers: Sequence[Attention], muon: MuonConfig, optimizer: Any, kept: str
) -> tuple[list[str], list[str]]:
    """Connect this rank's layers and optimizer to the clip; what there is to say, and the layers that are clipped."""
    from megatron.core.transformer.cuda_graphs import is_graph_warmup

    number = {each.name: index for index, each in enumerate(found)}
    first = list(itertools.accumulate((each.heads for each in found), initial=0))
    notes: list[str] = []
    clipped: list[str] = []
    for layer in layers:
        index = number[layer.name]
        core = layer.module.core_attention
        cp = layer.module.pg_collection.cp
        mine = clip.maxima_of(first[index] + layer.mine.start, layer.mine.stop - layer.mine.start)
        source = source_of(core, muon.qk_logits, layer.name)
        gauge = Gauge(layer.name, mine, cp if cp is not None and cp.size() > 1 else None, source, True, is_graph_warmup)
        attach(core, gauge)
        clip.gauges.append(gauge)
        notes.append(f"logits from {_SOURCES[source]} ({type(core).__name__})")
        if clip.settings.clip:
            rows = _rows(layer, index, first[index], clip.heads, muon, notes)
            _refuse_kept(layer, rows, kept)
            clip.rows += rows
            clipped += [layer.name] if rows else []
    if clip.rows:
        clip.watch(list(_targets(optimizer, clip.rows)))
    return notes, clipped


_SOURCES = {
    "scores": "the attention's scores",
    "te": "TransformerEngine",
    "exact": "queries times keys, a second time",
    "lse": "the flash kernel's log-sum-exp, an upper bound",
    "own": "the core attention itself",
}


def _rows(layer: Attention, number: int, first: int, heads: Heads, muon: MuonConfig, notes: list[str]) -> list[Rows]:
    """The rows to clip in a layer; none if they are frozen, or do not matter."""
    if not any(param.requires_grad for param in layer.module.parameters()):
        return []
    rows = _known_rows(layer, number, first, heads, muon, notes)
    trained = [each for each in rows if each.param.requires_grad]
    if trained and len(trained) < len(rows):
        raise ConfigError(
            f"--qk-clip: of the query and key weights of {layer.name} some are frozen, and a logit is the product of "
            "both: it cannot be clipped by half. Freeze all of them, or none, or leave --qk-clip off."
        )
    return trained


def _known_rows(
    layer: Attention, number: int, first: int, heads: Heads, muon: MuonConfig, notes: list[str]
) -> list[Rows]:
    """Rows that decide about the size of a layer's logits, frozen ones too."""
    if not has_norm(layer.module):
        rows = list(projection_rows(layer, first, heads))
        if not rows:
            raise ConfigError(
                f"--qk-clip: {layer.name} ({type(layer.module).__name__}) has no query and key projections that are "
                "known. Leave --qk-clip off (--log-max-attention-logit alone measures)."
            )
        return rows
    if muon.qk_clip_norm == "skip":
        notes.append(
            "WARNING queries and keys are normalised (--qk-layernorm), so that the size of their weights does not "
            "matter: those layers are not clipped. --muon-qk-clip-norm gains clips the gains of the norms."
        )
        return []
    rows = norm_rows(layer, number, heads)
    if not rows:
        raise ConfigError(
            f"--muon-qk-clip-norm gains: the norms of {layer.name} have no gains, so that their logits are bounded "
            "already. Use --muon-qk-clip-norm skip."
        )
    return rows


def _layers(chunks: Sequence[torch.nn.Module]) -> Iterator[Attention]:
    """The attention layers of this rank whose config asks for their logits, frozen ones too."""
    for chunk in chunks:
        names = {id(param): name for name, param in global_names(chunk)}
        for module in _modules([chunk]):
            core, first = getattr(module, "core_attention", None), next(module.named_parameters(), None)
            if not _asks(module) or not isinstance(core, torch.nn.Module) or type(core).__name__ == "IdentityOp":
                continue
            if first is None:  # without projections there is no layer whose logits they make
                continue
            local, param = first
            heads = module.config.num_attention_heads
            groups = module.config.num_query_groups if hasattr(module, "linear_qkv") else heads
            tp = module.pg_collection.tp
            yield Attention(names[id(param)].removesuffix(f".{local}"), module, heads, groups, tp.rank(), tp.size())


def _modules(chunks: Sequence[torch.nn.Module]) -> Iterator[Any]:
    return itertools.chain.from_iterable(chunk.modules() for chunk in chunks)


def _asks(module: Any) -> bool:
    return any(getattr(getattr(module, "config", None), flag, False) for flag in FLAGS)


def _describe(layer: Attention) -> _Found:
    config = layer.module.config
    return _Found(
        layer.name,
        layer.heads,
        layer.groups,
        config.qk_clip,
        float(config.qk_clip_threshold),
        config.qk_clip_alpha,
        config.context_parallel_size,
        getattr(config, "cuda_graph_impl", "none"),
    )


def _each_once[T](parts: Iterable[Iterable[T]]) -> list[T]:
    """What the ranks have, in their order."""
    return list(dict.fromkeys(itertools.chain.from_iterable(parts)))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _settings(found: Sequence[_Found], config: Any, muon: MuonConfig) -> ClipSettings:
    """What the layers' configs ask for, which must be one for all."""
    if len({(each.clip, each.threshold, each.alpha) for each in found}) > 1:
        raise ConfigError(
            "--qk-clip: the configs of the model's parts have different qk_clip, qk_clip_threshold or qk_clip_alpha; "
            "give them the same."
        )
    layers = {
        "qk_clip": found[0].clip,
        "qk_clip_threshold": found[0].threshold,
        "qk_clip_alpha": found[0].alpha,
        "context_parallel_size": found[0].context,
        "cuda_graph_impl": found[0].graphs,
        "muon_qk_logits_interval": muon.qk_logits_interval,
    }
    refuse(QK_CLIP, layers, config)
    return ClipSettings(
        clip=found[0].clip,
        threshold=found[0].threshold,
        alpha=found[0].alpha,
        rule=muon.qk_clip_rule,
        interval=muon.qk_logits_interval,
        log_layers=muon.qk_log_layers,
    )


def _targets(optimizer: Any, rows: Sequence[Rows]) -> Iterator[tuple[torch.optim.Optimizer, Target]]:
    """The tensors of this rank's optimizers that hold the weights to clip, whole or in slices."""
    wanted = {id(each.param): each for each in rows}
    for held in param_states(optimizer):
        mine = wanted.get(id(held.param))
        if mine is None or held.key is None:
            continue
        tensor = held.key if held.master is None else held.master
        yield held.inner, Target(tensor, mine, None if held.slices is None else held.slices.mine[0])

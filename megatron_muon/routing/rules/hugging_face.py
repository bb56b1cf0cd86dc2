"""Weights of Hugging Face's transformers, by the names of their classes: which rows are what, in one table.

A row names the class, the layer (or bare parameter) and a function that reads sizes from the module's own attributes,
as its forward pass does, and never from names of parameters. transformers 5 keeps all experts of a layer in two weights
of three dimensions; which way these lie the module tells itself (``is_transposed``, ``is_concatenated``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.routing.layout import SCALAR, TABLE, MatrixLayout, Section
from megatron_muon.routing.rules.linear import is_convolution, is_linear, weight_of
from megatron_muon.routing.treatment import ADAM, PER_HEAD, SPLIT, WHOLE_MATRIX, Treatment, WeightTreatment, fused

_PACKAGES = ("transformers.", "transformers_modules.")
"""The library, and where it puts models that come with code of their own."""


class _Rows(NamedTuple):
    """What the rows of a weight are.

    Attributes:
        sections: of one period, in memory order.
        periods: how often they are repeated.
        heads: section name -> rows of one head.
    """

    sections: list[Section]
    periods: int = 1
    heads: Mapping[str, int] | None = None


class _Fused(NamedTuple):
    """A row of the table.

    Attributes:
        classes: names of classes, ``*`` for any text.
        layer: attribute of the layer, or of the bare parameter.
        kind: what the weight is.
        option: the field of :class:`MuonConfig` that chooses; empty: its sections are matrices.
        rows: gives the rows, of the module and the number of rows of the weight.
    """

    classes: tuple[str, ...]
    layer: str
    kind: str
    option: str
    rows: Callable[[Any, int], _Rows]


def _q_k_v(query: int, key: int, head: int, periods: int = 1) -> _Rows:
    sections = [Section("q", query), Section("k", key), Section("v", key)]
    return _Rows(sections, periods, dict.fromkeys("qkv", head))


def _halves(module: Any, rows: int) -> _Rows:
    return _Rows([Section("gate", rows // 2), Section("up", rows // 2)])


def _thirds(module: Any, rows: int) -> _Rows:
    heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None) or 1
    return _q_k_v(rows // 3, rows // 3, rows // 3 // heads)


def _grouped(module: Any, rows: int) -> _Rows:
    config, head = module.config, module.head_dim
    return _q_k_v(config.num_attention_heads * head, config.num_key_value_heads * head, head)


def _each_head(module: Any, rows: int) -> _Rows:
    heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
    heads = heads or module.config.num_attention_heads
    head = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or rows // 3 // heads
    return _q_k_v(head, head, head, heads)


def _falcon(module: Any, rows: int) -> _Rows:
    head = module.head_dim
    if module.multi_query and not module.new_decoder_architecture:
        return _q_k_v(module.num_heads * head, head, head)
    groups = module.num_kv_heads if module.new_decoder_architecture else module.num_heads
    return _q_k_v(module.num_heads // groups * head, head, head, groups)


def _gpt2(module: Any, rows: int) -> _Rows:
    if getattr(module, "is_cross_attention", False):
        head = module.head_dim
        return _Rows([Section("k", rows // 2), Section("v", rows // 2)], heads={"k": head, "v": head})
    return _thirds(module, rows)


def _bigcode(module: Any, rows: int) -> _Rows:
    head = module.head_dim
    if module.is_cross_attention:
        return _Rows([Section("k", head), Section("v", head)], rows // (2 * head), {"k": head, "v": head})
    return _q_k_v(module.embed_dim, module.kv_dim, head) if module.multi_query else _each_head(module, rows)


def _codegen(module: Any, rows: int) -> _Rows:
    """For each of four shards that it was trained with: q, v, k."""
    part, head = rows // 12, module.head_dim
    return _Rows([Section(name, part) for name in "qvk"], 4, dict.fromkeys("qvk", head) if part % head == 0 else None)


def _parts(*parts: tuple[str, str]) -> Callable[[Any, int], _Rows]:
    """Named sections, of as many rows as an attribute of the module says; none where that is 0."""

    def rows(module: Any, _: int) -> _Rows:
        return _Rows([Section(name, size) for name, attribute in parts if (size := getattr(module, attribute))])

    return rows


def _each_latent_head(*parts: tuple[str, str]) -> Callable[[Any, int], _Rows]:
    def rows(module: Any, total: int) -> _Rows:
        sections, _, _ = _parts(*parts)(module, total)
        heads = getattr(module, "num_heads", None) or module.config.num_attention_heads
        return _Rows(sections, heads, {section.name: section.rows for section in sections})

    return rows


def _delta_net(module: Any, rows: int) -> _Rows:
    key, value = module.head_k_dim, module.head_v_dim
    values = module.num_v_heads // module.num_k_heads * value
    sections = [Section("q", key), Section("k", key), Section("v", values), Section("z", values)]
    return _Rows(sections, module.num_k_heads, {"q": key, "k": key, "v": value, "z": value})


def _mamba2(module: Any, rows: int) -> _Rows:
    inner, state = module.intermediate_size, module.n_groups * module.ssm_state_size
    sections = [Section("z", inner), Section("x", inner), Section("B", state), Section("C", state)]
    return _Rows([*sections, Section("dt", module.num_heads, SCALAR)])


def _mamba_x(module: Any, rows: int) -> _Rows:
    state = module.ssm_state_size
    return _Rows([Section("dt", module.time_step_rank), Section("B", state), Section("C", state)])


def _named(*names: str) -> Callable[[Any, int], _Rows]:
    return lambda module, rows: _Rows([Section(name, rows // len(names)) for name in names])


def _in_turns(*names: str) -> Callable[[Any, int], _Rows]:
    return lambda module, rows: _Rows([Section(name, 1) for name in names], rows // len(names))


def _dbrx(module: Any, rows: int) -> _Rows:
    head = module.head_dim
    return _q_k_v(module.hidden_size, module.num_key_value_heads * head, head)


def _gate_up(module: Any, rows: int) -> _Rows:
    if getattr(module, "is_concatenated", class_name(module) not in _IN_TURNS):
        return _halves(module, rows)
    return _in_turns("gate", "up")(module, rows)


_SPLIT_QUERY = ("Phi3Attention", "Phi4MultimodalAttention")
_BY_HEAD = ("GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention")
_GPT2 = ("GPT2Attention", "ImageGPTAttention", "DecisionTransformerGPT2Attention")
_MAMBA2 = (
    "Mamba2Mixer",
    "BambaMixer",
    "FalconH1Mixer",
    "GraniteMoeHybridMambaLayer",
    "NemotronHMamba2Mixer",
    "Zamba2MambaMixer",
)
_LATENT = (
    "DeepseekV2Attention",
    "DeepseekV3Attention",
    "DeepseekV32Attention",
    "Glm4MoeLiteAttention",
    "GlmMoeDsaAttention",
    "LongcatFlashMLA",
    "Mistral4Attention",
    "YoutuAttention",
)
_DELTA_NET = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
_QUERY_PARTS = (("q_nope", "qk_nope_head_dim"), ("q_rope", "qk_rope_head_dim"))

_TABLE = (
    _Fused(_SPLIT_QUERY, "qkv_proj", "qkv", "qkv", _grouped),
    _Fused(_BY_HEAD, "query_key_value", "qkv", "qkv", _each_head),
    _Fused(("FalconAttention", "FalconFlashAttention2"), "query_key_value", "qkv", "qkv", _falcon),
    _Fused(_GPT2, "c_attn", "qkv", "qkv", _gpt2),
    _Fused(("Attention",), "c_attn", "qkv", "qkv", _gpt2),  # openai-gpt's
    _Fused(("GPTBigCodeAttention",), "c_attn", "qkv", "qkv", _bigcode),
    _Fused(("CodeGenAttention",), "qkv_proj", "qkv", "qkv", _codegen),
    _Fused(("MiniMaxLightningAttention",), "qkv_proj", "qkv", "qkv", _each_head),
    _Fused(("MptAttention", "ModernBertAttention"), "Wqkv", "qkv", "qkv", _thirds),
    _Fused(("DbrxAttention",), "Wqkv", "qkv", "qkv", _dbrx),
    _Fused(("BarkSelf*Attention*",), "att_proj", "qkv", "qkv", _thirds),
    _Fused(("JetMoeAttention",), "kv_proj", "kv", "", _named("k", "v")),
    _Fused(("GraniteSpeech*Attention", "EvollaSequenceCompressorAttention"), "to_kv", "kv", "", _named("k", "v")),
    _Fused(("Exaone4_5*Attention",), "qkv", "qkv", "qkv", _parts(("q", "q_dim"), ("k", "kv_dim"), ("v", "kv_dim"))),
    _Fused(("*",), "qkv", "qkv", "qkv", _thirds),  # vision towers
    _Fused(("ModernBert*MLP",), "Wi", "glu", "glu", _halves),
    _Fused(("GraniteMoe*", "JetMoeMoE"), "input_linear", "glu", "glu", _halves),
    _Fused(("AriaExperts", "Moonshine*DecoderMLP"), "fc1", "glu", "glu", _halves),
    _Fused(("*SwiGLUFFN", "VideomtGatedMLP"), "weights_in", "glu", "glu", _halves),
    _Fused(("ClvpGatedLinearUnit",), "proj", "glu", "glu", _halves),
    _Fused(("xLSTMFeedForward",), "proj_up_gate", "glu", "", _named("gate")),
    _Fused(("*",), "gate_up_proj", "glu", "glu", _gate_up),
    _Fused(_LATENT, "q_proj", "mla_q", "mla_up", _each_latent_head(*_QUERY_PARTS)),
    _Fused(_LATENT, "q_b_proj", "mla_q_up", "mla_up", _each_latent_head(*_QUERY_PARTS)),
    _Fused(
        _LATENT,
        "kv_b_proj",
        "mla_kv_up",
        "mla_up",
        _each_latent_head(("k_nope", "qk_nope_head_dim"), ("v", "v_head_dim")),
    ),
    _Fused(
        _LATENT,
        "kv_a_proj_with_mqa",
        "mla_kv_down",
        "mla_down",
        _parts(("kv_latent", "kv_lora_rank"), ("k_rope", "qk_rope_head_dim")),
    ),
    _Fused(_DELTA_NET, "in_proj_qkvz", "gdn_in_proj", "", _delta_net),
    _Fused(
        _DELTA_NET, "in_proj_qkv", "gdn_in_proj", "", _parts(("q", "key_dim"), ("k", "key_dim"), ("v", "value_dim"))
    ),
    _Fused(_DELTA_NET, "in_proj_z", "gdn_in_proj", "", _named("z")),
    _Fused(_MAMBA2, "in_proj", "mamba_in_proj", "", _mamba2),
    _Fused(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), "in_proj", "mamba_in_proj", "", _named("x", "z")),
    _Fused(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), "x_proj", "mamba_x_proj", "", _mamba_x),
    _Fused(("ZambaMambaMixer",), "in_proj", "mamba_in_proj", "", _in_turns("x", "z")),
    _Fused(("ZambaMambaMixer",), "x_proj_weight", "mamba_x_proj", "", _mamba_x),
    _Fused(("Lfm2*ShortConv",), "in_proj", "conv_in_proj", "", _named("B", "C", "x")),
)

_ADAM = (
    (_DELTA_NET, ("in_proj_ba", "in_proj_b", "in_proj_a"), "write strengths and decays of heads"),
    (("OlmoHybridGatedDeltaNet",), ("b_proj", "a_proj"), "write strengths and decays of heads"),
    (("DeepseekV32Indexer", "GlmMoeDsaIndexer"), ("weights_proj",), "gates of the DSA indexer"),
    (("ZambaMambaMixer",), ("D",), "no projection"),
    (("*",), ("A_log", "*_bias", "*bias_table"), "no projection"),
)
"""Classes, layers or bare parameters, and why they are the scalar optimizer's."""

_TOKENS = re.compile(r"pos_embed|position|token|query|queries|latents?\b|probe|class_embedding|rel_pos|level_embed")
"""In names of bare parameters, which a model adds to features, or starts from: tables."""

_ON_THEIR_SIDES = ("Llama4TextExperts", "GptOssExperts", "AriaGroupedExpertsGemm")
"""Experts of (experts, inputs, outputs), if the module does not tell."""

_IN_TURNS = ("GptOssExperts",)
"""Experts whose gate and up rows take turns, if the module does not tell."""


def class_name(module: Any) -> str:
    """The name of the class of transformers that ``module`` is of, or derives from; empty if there is none.

    FSDP2 and peft make classes of their own of them.
    """
    classes = (cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith(_PACKAGES))
    return next(classes, "")


def is_transposed(module: Any) -> bool:
    """Whether the weights of ``module`` are (inputs, outputs), or stacks of such: GPT-2's ``Conv1D``, some experts."""
    name = class_name(module)
    return name == "Conv1D" or bool(getattr(module, "is_transposed", name in _ON_THEIR_SIDES))


def hugging_face(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """All that is known of the weights of one of transformers' modules."""
    name = class_name(module)
    for row in _TABLE:
        layer = getattr(module, row.layer, None)
        if layer is not None and any(fnmatchcase(name, each) for each in row.classes):
            yield from _fused(module, layer, row, options)
    for classes, layers, reason in _ADAM:
        if any(fnmatchcase(name, each) for each in classes):
            for child, weight in _own_weights(module):
                if any(fnmatchcase(child, each) for each in layers):
                    yield weight, Treatment("gates", ADAM, reason=reason)
    yield from _whole(module, options)


def _own_weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Bare parameters, and the weights of layers, by their attribute."""
    yield from module.named_parameters(recurse=False)
    for name, layer in module.named_children():
        weight = weight_of(layer) if is_linear(layer) else None
        if weight is not None:
            yield name, weight


def _fused(module: Any, layer: Any, row: _Fused, options: MuonConfig) -> Iterator[WeightTreatment]:
    weight = layer if isinstance(layer, torch.nn.Parameter) else weight_of(layer)
    if weight is None or weight.dim() not in (2, 3) or is_convolution(layer):
        return
    transposed = is_transposed(module if weight is layer else layer)
    rows = weight.size(-1 if transposed else -2)
    sections, periods, heads = row.rows(module, rows)
    choice = {"": SPLIT, "qkv": options.qkv_choice}.get(row.option) or getattr(options, row.option)
    if choice == PER_HEAD and not heads:
        choice = SPLIT
    yield (
        weight,
        fused(
            row.kind,
            weight,
            choice,
            sections,
            rows=periods * sum(section.rows for section in sections),
            source=f"its {class_name(module)} ({periods} times {', '.join(f'{x.name} {x.rows}' for x in sections)})",
            heads=heads,
            option=row.option,
            transposed=transposed,
        ),
    )


def _has_experts(module: Any) -> bool:
    """Whether bare weights of three dimensions are a matrix for each expert, or head: transformers marks most such
    classes."""
    name = class_name(module)
    return hasattr(module, "is_concatenated") or name.endswith(("Experts", "ExpertsGemm")) or name == "ZambaMambaMixer"


def _whole(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """Weights that are one matrix, or one an expert, though no linear layer of torch; routers and tables."""
    name, transposed = class_name(module), is_transposed(module)
    if is_convolution(module):
        return
    for child, weight in module.named_parameters(recurse=False):
        if _TOKENS.search(child) or (weight.dim() == 3 and "Embed" in name):
            yield weight, Treatment(TABLE, ADAM, reason="embedding table")
        elif child == "weight" and weight.dim() == 2 and name.endswith(("Router", "Gate")):
            choice = WHOLE_MATRIX if options.router == "muon" else options.router
            yield weight, Treatment("router", choice, reason=f"--muon-router {options.router}", option="router")
        elif weight.dim() == 3 and _has_experts(module):
            layout = MatrixLayout("whole", stacked=True, transposed=transposed)
            yield weight, Treatment("experts", WHOLE_MATRIX, {WHOLE_MATRIX: layout})
        elif weight.dim() == 2 and (name == "Conv1D" or child == "mm_input_projection_weight"):  # Gemma 3's
            yield weight, Treatment("linear", WHOLE_MATRIX, {WHOLE_MATRIX: MatrixLayout("whole", transposed=True)})

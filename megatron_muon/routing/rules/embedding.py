"""Tables whose rows are looked up, and output layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.routing.layout import TABLE
from megatron_muon.routing.rules.linear import matrices_in
from megatron_muon.routing.treatment import ADAM, Treatment, WeightTreatment, rule

_TABLE = Treatment(TABLE, ADAM, reason="embedding table")
_OUTPUT = Treatment("output", ADAM, reason="embedding or output layer")
_END = {"is_embedding_or_output_parameter": True}
"""Megatron-Core's tag, which a copied weight has lost."""


@rule("VocabParallelEmbedding")
def embedding(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """Learned tables (word, position, token-type, relative bias): a row is looked up, never multiplied."""
    yield module.weight, _TABLE


@rule("LanguageModule")
def language_model(model: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """Word embeddings and output layer, also in wrappers and as copies: what they are, tagged or not."""
    words = getattr(getattr(model, "embedding", None), "word_embeddings", None)
    for layer, treatment in ((words, _TABLE), (getattr(model, "output_layer", None), _OUTPUT)):
        for param in matrices_in(layer):
            yield param, dataclasses.replace(treatment, tags=_END)


@rule("RADIOViTModel", "CLIPViTModel")
def vision_tower(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """Tokens and positions that a vision tower keeps as bare parameters."""
    for name in ("class_token", "mask_token", "position_embeddings"):
        param = getattr(module, name, None)
        if isinstance(param, torch.nn.Parameter):
            yield param, _TABLE


@rule("BertModel")
def bert(module: Any, options: MuonConfig) -> Iterator[WeightTreatment]:
    """``binary_head``: two classes (is the second sentence the next one?), an output layer."""
    head = getattr(module, "binary_head", None)
    if head is not None:
        yield head.weight, Treatment("output", ADAM, reason="output layer")


def output_embeddings(model: Any) -> Iterator[WeightTreatment]:
    """The output layer of a model that can tell it (``get_output_embeddings`` of Hugging Face's transformers)."""
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if callable(getter) else None
    weight = getattr(layer, "weight", None)
    if weight is not None:
        yield weight, Treatment("output", ADAM, reason="output layer")

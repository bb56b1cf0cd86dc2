"""``param_groups`` on plain PyTorch models: every trainable weight in one group, and training works."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import megatron_muon
from megatron_muon import ConfigError, Muon, MuonConfig, ParamGroups, check_partition, param_groups
from megatron_muon.routing.partition import refuse_uneven

VOCABULARY, WIDTH, LENGTH = 24, 16, 12


class MLP(torch.nn.Sequential):
    """Two hidden layers with norms."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Embedding(VOCABULARY, WIDTH),
            torch.nn.Linear(WIDTH, 48),
            torch.nn.LayerNorm(48),
            torch.nn.GELU(),
            torch.nn.Linear(48, WIDTH),
            torch.nn.Linear(WIDTH, VOCABULARY),
        )


class Transformer(torch.nn.Module):
    """One layer with ``torch.nn.MultiheadAttention``; the output layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.position = torch.nn.Embedding(LENGTH, WIDTH)
        self.block = torch.nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.output = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.size(1)
        hidden = self.embedding(tokens) + self.position(torch.arange(length))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length)
        return self.output(self.block(hidden, src_mask=mask, is_causal=True))


class HuggingFaceLike(torch.nn.Module):
    """A model that can tell its output layer, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.up_proj = torch.nn.Linear(WIDTH, 48, bias=False)
        self.down_proj = torch.nn.Linear(48, WIDTH, bias=False)
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(tokens)
        return self.lm_head(hidden + self.down_proj(torch.nn.functional.silu(self.up_proj(hidden))))


class Convolutions(torch.nn.Module):
    """A convolution over the tokens, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.conv = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding="same")
        self.linear = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(self.embedding(tokens).transpose(1, 2)).relu().transpose(1, 2))


OUTPUT_OF_MLP = MuonConfig(param_rule=("5.weight=adam",))
MODELS: list[tuple[type[torch.nn.Module], MuonConfig, set[str]]] = [
    (MLP, MuonConfig(), {"1.weight", "4.weight", "5.weight"}),
    (MLP, OUTPUT_OF_MLP, {"1.weight", "4.weight"}),
    (
        Transformer,
        MuonConfig(),
        {
            "block.self_attn.in_proj_weight",
            "block.self_attn.out_proj.weight",
            "block.linear1.weight",
            "block.linear2.weight",
        },
    ),
    (HuggingFaceLike, MuonConfig(), {"up_proj.weight", "down_proj.weight"}),
    (Convolutions, MuonConfig(), {"linear.weight"}),
]


def names(groups: list[dict[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["param_names"]]


@pytest.mark.parametrize("build,options,expected", MODELS)
def test_every_weight_is_in_one_group(build: type[torch.nn.Module], options: MuonConfig, expected: set[str]) -> None:
    model = build()
    groups = param_groups(model, options, weight_decay=0.2)
    assert set(names(groups.muon)) == expected
    by_name = dict(model.named_parameters())
    assert Counter(names(groups.muon) + names(groups.scalar)) == Counter(list(by_name))
    for group in [*groups.muon, *groups.scalar]:
        assert [id(param) for param in group["params"]] == [id(by_name[name]) for name in group["param_names"]]
        vectors = {by_name[name].dim() < 2 for name in group["param_names"]}
        assert len(vectors) == 1 and group["weight_decay"] == (0.0 if vectors == {True} else 0.2)


@pytest.mark.parametrize("scalar_optimizer", ["adam", "lion"])
@pytest.mark.parametrize("build,options,expected", MODELS)
def test_training_lowers_the_loss(
    build: type[torch.nn.Module], options: MuonConfig, expected: set[str], scalar_optimizer: str
) -> None:
    """Sixty steps on a map of tokens to tokens, with both optimizers at one learning rate."""
    torch.manual_seed(0)
    model = build()
    groups = param_groups(model, options)
    muon = Muon(groups.muon, lr=0.01, extra_scale_factor=0.2, fp32_matmul_prec="highest")
    if scalar_optimizer == "adam":
        scalar: torch.optim.Optimizer = torch.optim.AdamW(groups.scalar, lr=0.01)
    else:
        from emerging_optimizers.scalar_optimizers import Lion

        scalar = Lion(groups.scalar, lr=0.005)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    losses = []
    for step in range(60):
        tokens = torch.randint(VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(step))
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), (tokens * 5 + 1).flatten() % VOCABULARY)
        muon.zero_grad()
        scalar.zero_grad()
        loss.backward()
        muon.step()
        scalar.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, param in model.named_parameters():
        assert not torch.equal(param, before[name]), f"{name} has not moved"


def test_tied_output_layer_goes_with_its_embedding() -> None:
    groups = param_groups(Transformer())
    assert names(groups.scalar).count("embedding.weight") == 1
    assert "output.weight" not in names(groups.muon) + names(groups.scalar)


def test_tied_output_layer_that_stands_first_is_a_table_too() -> None:
    model = torch.nn.Module()
    model.output = torch.nn.Linear(8, 32, bias=False)
    model.embedding = torch.nn.Embedding(32, 8)
    model.embedding.weight = model.output.weight
    assert names(param_groups(model).scalar) == ["output.weight"]


def test_in_proj_of_attention_is_split() -> None:
    model = Transformer()
    groups = param_groups(model)
    assert "q 16 x 16, k 16 x 16, v 16 x 16" in groups.table
    param_groups(model, MuonConfig(qkv="whole"))
    assert model.block.self_attn.in_proj_weight.matrix_layout.kind == "whole"


def test_frozen_weights_are_left_out() -> None:
    model = HuggingFaceLike()
    model.up_proj.weight.requires_grad_(False)
    model.embed_tokens.weight.requires_grad_(False)
    groups = param_groups(model)
    assert set(names(groups.muon) + names(groups.scalar)) == {"down_proj.weight", "lm_head.weight"}
    assert "up_proj" not in groups.table


def test_model_without_matrices() -> None:
    groups = param_groups(torch.nn.LayerNorm(8))
    assert groups.muon == [] and names(groups.scalar) == ["weight", "bias"]


def test_rule_that_matches_nothing() -> None:
    with pytest.raises(ConfigError, match=r"param_rule=\('lm_haed\.weight=adam',\): no trainable weight has such a"):
        param_groups(HuggingFaceLike(), MuonConfig(param_rule=("up_proj.weight=adam", "lm_haed.weight=adam")))


def test_rule_about_a_frozen_weight() -> None:
    model = HuggingFaceLike()
    model.up_proj.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable weight"):
        param_groups(model, MuonConfig(param_rule=("up_proj.weight=adam",)))


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match=r"^router sgd: choose one of muon, adam"):
        param_groups(MLP(), MuonConfig(router="sgd"))


def test_unknown_weight_stops() -> None:
    with pytest.raises(ConfigError, match=r"weight_ih_l0 \(64 x 16\)"):
        param_groups(torch.nn.LSTM(16, 16))


def test_table_counts_all_parameters() -> None:
    model = MLP()
    groups = param_groups(model, OUTPUT_OF_MLP)
    assert isinstance(groups, ParamGroups)
    muon = 2 * 48 * 16
    rest = sum(param.numel() for param in model.parameters()) - muon
    assert f"muon: {muon:,} parameters in 2 weights" in groups.table
    assert f"adam: {rest:,} parameters in 7 weights" in groups.table
    assert "\nparam_rule 5.weight=adam: 1 weights" in groups.table


def test_public_names() -> None:
    assert megatron_muon.param_groups is param_groups and megatron_muon.check_partition is check_partition


class TestCheckPartition:
    def test_accepts_a_partition(self) -> None:
        model = MLP()
        named = dict(model.named_parameters())
        params = list(named.values())
        check_partition(named, [{"params": params[:2]}, {"params": params[2:]}, {"params": []}])

    def test_missing(self) -> None:
        model = MLP()
        named = dict(model.named_parameters())
        with pytest.raises(RuntimeError, match=r"exactly one optimizer .*: 0\.weight \(0\)\.$"):
            check_partition(named, [{"params": list(named.values())[1:]}])

    def test_twice(self) -> None:
        named = dict(MLP().named_parameters())
        groups = [{"params": list(named.values())}, {"params": [named["1.weight"], named["2.bias"]]}]
        with pytest.raises(RuntimeError, match=r": 1\.weight \(2\), 2\.bias \(2\)\.$"):
            check_partition(named, groups)

    def test_foreign(self) -> None:
        named = dict(MLP().named_parameters())
        foreign = torch.nn.Parameter(torch.zeros(3, 5))
        with pytest.raises(RuntimeError, match=r"^1 parameters in optimizers are not the model's .*: 3 x 5$"):
            check_partition(named, [{"params": [*named.values(), foreign]}])

    def test_frozen_weight_in_a_group_is_foreign(self) -> None:
        model = MLP()
        model[1].weight.requires_grad_(False)
        trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
        with pytest.raises(RuntimeError, match=r"not the model's trainable ones: 48 x 16"):
            check_partition(trainable, [{"params": list(model.parameters())}])

    def test_hint_ends_the_message(self) -> None:
        with pytest.raises(RuntimeError, match=r"a \(0\)\. Do this\.$"):
            refuse_uneven({"a": 0, "b": 1}, "Do this.")

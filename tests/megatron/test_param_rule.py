"""``--muon-param-rule`` and the routing flags: command line, pipeline stages, and the ownership of DDP's buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_arguments import parse
from tests.megatron.test_routing import GDN
from tests.pool import RankPool

WRONG_RULES = ("*.weight", "*.weight=sgd", "=adam", "*.weight=")
WRONG_VALUES = {
    "--muon-qkv heads": "--muon-qkv heads: choose one of split, per_head, whole (did you mean per_head?).",
    "--muon-mla-up no": "--muon-mla-up no: choose one of per_head, split, whole.",
    "--muon-mla-down per_head": "--muon-mla-down per_head: choose one of split, whole.",
    "--muon-glu per_head": "--muon-glu per_head: choose one of split, whole.",
    "--muon-gdn-in-proj muon": "--muon-gdn-in-proj muon: choose one of adam, split, per_head, whole.",
    "--muon-mamba-in-proj per_head": "--muon-mamba-in-proj per_head: choose one of adam, split, whole.",
    "--muon-router whole": "--muon-router whole: choose one of muon, adam.",
    "--muon-lora-a whole": "--muon-lora-a whole: choose one of muon, adam.",
    "--muon-unknown-2d lion": "--muon-unknown-2d lion: choose one of error, adam, muon.",
    "--muon-scalar-lr -1": "--muon-scalar-lr -1.0: give a number of at least 0.",
    "--muon-qkv per_head --muon-no-split-qkv": "--muon-qkv per_head with --muon-no-split-qkv: these contradi",
}


def wrong_rule(rule: str) -> str:
    return f"--muon-param-rule *.bias=adam --muon-param-rule {rule}"


def parse_each(lines: list[str]) -> dict[str, Any]:
    return {line: parse(f"--optimizer muon {line}") for line in lines}


@pytest.fixture(scope="module")
def answers(pool: RankPool) -> dict[str, Any]:
    """To all wrong flags, of one call."""
    return pool.run(parse_each, 1, [*map(wrong_rule, WRONG_RULES), *WRONG_VALUES])[0]


class TestCommandLine:
    def test_the_flag_is_repeatable_and_keeps_its_order(self, pool: RankPool) -> None:
        flags = "--optimizer muon --muon-param-rule *.linear_qkv.weight=per_head --muon-param-rule *.0.*=adam"
        read = pool.run(parse, 1, flags)[0]
        assert read["param_rule"] == ("*.linear_qkv.weight=per_head", "*.0.*=adam")

    def test_none_given(self, pool: RankPool) -> None:
        assert pool.run(parse, 1, "--optimizer muon")[0]["param_rule"] == ()

    def test_an_equals_sign_in_the_name(self, pool: RankPool) -> None:
        read = pool.run(parse, 1, "--optimizer muon --muon-param-rule=a=b.weight=adam")[0]
        assert read["param_rule"] == ("a=b.weight=adam",)

    @pytest.mark.parametrize("rule", WRONG_RULES)
    def test_wrong_rules(self, answers: dict[str, Any], rule: str) -> None:
        answer = answers[wrong_rule(rule)]
        assert isinstance(answer, str) and answer.startswith("--muon-param-rule ")
        assert f"{rule!r} is not GLOB=CHOICE with a choice of adam, muon, split, whole, per_head, " in answer

    @pytest.mark.parametrize("flags", WRONG_VALUES)
    def test_wrong_values(self, answers: dict[str, Any], flags: str) -> None:
        answer = answers[flags]
        assert isinstance(answer, str) and answer.startswith(WRONG_VALUES[flags])


def routes(layout: Layout, optimizer: dict[str, Any], model: dict[str, Any]) -> dict[str, str] | str:
    """Name in the whole model -> ``muon`` or the other optimizer's class, from the built optimizers; or the error."""
    import megatron_muon
    from megatron_muon.routing import global_names

    try:
        run = harness.start(layout, optimizer=optimizer, **model)
    except megatron_muon.ConfigError as error:
        return str(error)
    names = {param: name for chunk in run.chunks for name, param in global_names(chunk)}
    found: dict[str, str] = {}
    for part in run.optimizer.chained_optimizers:
        kind = "muon" if isinstance(part.optimizer, megatron_muon.Muon) else "adam"
        found.update({names[param]: kind for group in part.optimizer.param_groups for param in group["params"]})
    run.losses(2)
    return found


def by_layer(results: list[dict[str, str]], suffix: str) -> dict[int, str]:
    """Layer -> optimizer of its weight of that name, over all ranks."""
    found = {}
    for result in results:
        assert isinstance(result, dict), result
        for name, kind in result.items():
            if name.endswith(suffix):
                found[int(name.split(".")[2])] = kind
    return found


LAYOUTS = [
    pytest.param(Layout(), 1, marks=pytest.mark.slow),
    (Layout(tp=2), 2),
    pytest.param(Layout(pp=2), 2, marks=pytest.mark.slow),
    (Layout(pp=2, vpp=2), 2),
]


@pytest.mark.parametrize("layout,ranks", LAYOUTS)
def test_layers_are_numbered_over_the_whole_model(pool: RankPool, layout: Layout, ranks: int) -> None:
    """The last layer is on the second stage, where it is layer 1 (PP 2) or layer 0 of the second chunk (VPP 2)."""
    optimizer = {"muon_param_rule": ("decoder.layers.3.*.weight=adam", "decoder.layers.1.mlp.linear_fc2.weight=adam")}
    results = pool.run(routes, ranks, layout, optimizer, {})
    assert by_layer(results, "self_attention.linear_qkv.weight") == {0: "muon", 1: "muon", 2: "muon", 3: "adam"}
    assert by_layer(results, "mlp.linear_fc2.weight") == {0: "muon", 1: "adam", 2: "muon", 3: "adam"}


@pytest.mark.parametrize("layout,ranks", LAYOUTS)
def test_a_rule_that_matches_nowhere_stops_every_rank(pool: RankPool, layout: Layout, ranks: int) -> None:
    optimizer = {"muon_param_rule": ("decoder.layers.3.mlp.linear_fc1.weight=adam", "decoder.layers.4.*=adam")}
    for answer in pool.run(routes, ranks, layout, optimizer, {}):
        assert isinstance(answer, str)
        assert answer.startswith("--muon-param-rule 'decoder.layers.4.*=adam': no trainable weight has such a name.")


def test_a_problem_on_one_stage_stops_every_rank(pool: RankPool) -> None:
    """The first stage has no layer 3: it would wait for the second in the next collective."""
    optimizer = {"muon_param_rule": ("decoder.layers.3.mlp.linear_fc2.weight=per_head",)}
    for answer in pool.run(routes, 2, Layout(pp=2), optimizer, {}):
        assert isinstance(answer, str)
        assert answer.startswith("decoder.layers.3.mlp.linear_fc2.weight (linear) cannot be split that way")


def test_muon_for_the_embedding(pool: RankPool) -> None:
    """Megatron tags it is_embedding_or_output_parameter; the rule outweighs the tag."""
    optimizer = {"muon_param_rule": ("embedding.word_embeddings.weight=muon",)}
    (result,) = pool.run(routes, 1, Layout(), optimizer, {})
    assert (result["embedding.word_embeddings.weight"], result["output_layer.weight"]) == ("muon", "adam")


def train_tied(layout: Layout, weights: str, rules: tuple[str, ...]) -> tuple[list[float], list[Any]] | str:
    """Losses of three steps, and this rank's copies of the table that is the output layer, too; or the error."""
    import megatron_muon

    optimizer = {"muon_param_rule": rules, "muon_ball_radius": 3.0}
    try:
        run = harness.start(layout, weights=weights, optimizer=optimizer, early=True, tied=True)
    except megatron_muon.ConfigError as error:
        return str(error)
    losses = run.losses(3)
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    copies = [(name, param) for name, param in harness.unwrap(run.chunks[0]).named_parameters() if name in names]
    return losses, [(name, param.detach().clone()) for name, param in copies]


@pytest.fixture(scope="module")
def tied_weights(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tied") / "initial")
    pool.run(harness.save_initial_weights, 1, folder, tied=True)
    return folder


def test_copies_of_a_tied_table_go_by_one_rule(pool: RankPool, tied_weights: str) -> None:
    """The last stage has its copy under the name of the output layer."""
    rules = ("*word_embeddings*=row_norm", "*layers.1*=adam")
    expected = pool.run(train_tied, 1, Layout(), tied_weights, rules)[0]
    first, last = pool.run(train_tied, 2, Layout(pp=2), tied_weights, rules)
    assert first[0] == pytest.approx(expected[0], abs=1e-4) and last[0] == first[0]
    ((name, table),), ((other_name, other),) = first[1], last[1]
    assert (name, other_name) == ("embedding.word_embeddings.weight", "output_layer.weight")
    assert torch.equal(table, other)
    torch.testing.assert_close(table, expected[1][0][1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout,ranks", [(Layout(), 1), (Layout(pp=2), 2)])
def test_a_rule_for_a_tied_output_layer_matches_nothing(
    pool: RankPool, tied_weights: str, layout: Layout, ranks: int
) -> None:
    """With one stage there is no such weight; so there is none with two."""
    rules = ("*word_embeddings*=row_norm", "output_layer*=sign")
    for answer in pool.run(train_tied, ranks, layout, tied_weights, rules):
        assert isinstance(answer, str)
        assert answer.startswith("--muon-param-rule 'output_layer*=sign': no trainable weight has such a name.")
        assert answer.endswith("tied to the embedding goes by embedding.word_embeddings.weight.")


def build_on_buffers(
    installed: dict[str, Any] | None, optimizer: dict[str, Any], model: dict[str, Any], bf16: bool
) -> tuple[str, list[float]]:
    """A layer-wise run on reduce-scatter buffers; the options at the time of the wrap are those given to install()."""
    import megatron_muon

    megatron_muon.install(None if installed is None else megatron_muon.MuonConfig(**installed))
    layout = Layout(ddp_buffers=True, layer_wise=True)
    try:
        run = harness.start(layout, optimizer=optimizer, bf16=bf16, **model)
    except megatron_muon.ConfigError as error:
        return str(error), []
    owners = {
        getattr(param, "is_managed_by_layer_wise_optimizer", None)
        for name, param in run.chunks[0].named_parameters()
        if name.endswith("in_proj.weight")
    }
    return f"in_proj layer-wise: {owners}", run.losses(3)


class TestOwnershipOfBuffers:
    """DDP assigns weights to buffers before Megatron shows anybody the OptimizerConfig."""

    @pytest.mark.parametrize("bf16", [False, True])
    def test_options_that_differ_are_refused(self, pool: RankPool, bf16: bool) -> None:
        for answer, _ in pool.run(build_on_buffers, 2, None, {"muon_gdn_in_proj": "split"}, GDN, bf16):
            assert "self_attention.in_proj.weight: DistributedDataParallel was built before the weight's tags" in answer
            assert "Wrap the model after megatron_muon.install(), given the same options" in answer

    @pytest.mark.parametrize(
        ("choice", "bf16"),
        [
            ("split", True),
            ("whole", False),
            *(
                pytest.param(*case, marks=pytest.mark.slow)
                for case in [("split", False), ("whole", True), ("per_head", False), ("per_head", True)]
            ),
        ],
    )
    def test_options_given_to_install(self, pool: RankPool, choice: str, bf16: bool) -> None:
        options = {"gdn_in_proj": choice}
        results = pool.run(build_on_buffers, 2, options, {"muon_gdn_in_proj": choice}, GDN, bf16)
        for answer, losses in results:
            assert answer == "in_proj layer-wise: {True}"
            assert losses == results[0][1] and losses[-1] < losses[0]

    def test_rules_given_to_install(self, pool: RankPool) -> None:
        rules = ("*.in_proj.weight=split", "*.linear_fc2.weight=adam")
        results = pool.run(build_on_buffers, 2, {"param_rule": rules}, {"muon_param_rule": rules}, GDN, False)
        for answer, losses in results:
            assert answer == "in_proj layer-wise: {True}" and losses[-1] < losses[0]

    def test_rule_only_in_the_optimizer_config(self, pool: RankPool) -> None:
        optimizer = {"muon_param_rule": ("*.linear_fc2.weight=adam",)}
        for answer, _ in pool.run(build_on_buffers, 2, None, optimizer, {}, False):
            assert (
                "mlp.linear_fc2.weight: DistributedDataParallel was built before the weight's tags were set" in answer
            )

    def test_options_that_do_not_move_weights_may_differ(self, pool: RankPool) -> None:
        """How a weight is split is read from the OptimizerConfig; only who owns it is settled by the buffers."""
        for answer, losses in pool.run(build_on_buffers, 2, None, {"muon_qkv": "per_head"}, GDN, False):
            assert answer == "in_proj layer-wise: {False}" and losses[-1] < losses[0]

    def test_same_losses_as_without_buffers(self, pool: RankPool) -> None:
        options = {"gdn_in_proj": "split"}
        results = pool.run(build_on_buffers, 2, options, {"muon_gdn_in_proj": "split"}, GDN, False)
        plain = pool.run(plain_losses, 2, {"muon_gdn_in_proj": "split"})
        assert results[0][1] == pytest.approx(plain[0], abs=1e-5)


def plain_losses(optimizer: dict[str, Any]) -> list[float]:
    return harness.start(Layout(), optimizer=optimizer, **GDN).losses(3)


def build_with_unknown_weight(layout: Layout, optimizer: dict[str, Any]) -> str | list[float]:
    """A model whose last layer has a bare weight that no rule knows; the error, or losses."""
    from megatron.core import parallel_state

    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import get_megatron_optimizer

    layout.initialize()
    chunks = harness.build_model(layout)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        chunks[-1].decoder.layers[-1].register_parameter("table", torch.nn.Parameter(torch.ones(4, 8)))
    try:
        wrapped = harness.wrap(chunks, layout)
        config = harness.optimizer_config(layout, **optimizer)
        return harness.Run(layout, wrapped, get_megatron_optimizer(config, wrapped)).losses(2)
    except megatron_muon.ConfigError as error:
        return str(error)


# No forward pass uses that weight, and overlap asks each weight for a gradient in the first step.
PLAIN = Layout(overlap=False)
BUFFERS = Layout(ddp_buffers=True, layer_wise=True, overlap=False)


class TestUnknownWeights:
    @pytest.mark.parametrize("layout", [BUFFERS, Layout(pp=2), Layout(pp=2, ddp_buffers=True, layer_wise=True)])
    def test_stop_every_rank(self, pool: RankPool, layout: Layout) -> None:
        """Also the ranks that have none, and not before: when DDP is built they would wait for the others."""
        for answer in pool.run(build_with_unknown_weight, 2, layout, {}):
            assert answer.startswith("No rule knows these 2-D weights: decoder.layers.3.table (4 x 8).")

    @pytest.mark.parametrize("layout", [PLAIN, BUFFERS])
    def test_are_no_business_of_other_optimizers(self, pool: RankPool, layout: Layout) -> None:
        for answer in pool.run(build_with_unknown_weight, 2, layout, {"name": "soap"}):
            assert isinstance(answer, list), answer

    def test_muon_takes_them_when_asked(self, pool: RankPool) -> None:
        for answer in pool.run(build_with_unknown_weight, 2, BUFFERS, {"muon_unknown_2d": "muon"}):
            assert isinstance(answer, list), answer

    def test_adam_must_be_known_to_the_buffers(self, pool: RankPool) -> None:
        for answer in pool.run(build_with_unknown_weight, 2, BUFFERS, {"muon_unknown_2d": "adam"}):
            assert "decoder.layers.3.table: DistributedDataParallel was built before the weight's tags" in answer

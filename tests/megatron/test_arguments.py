"""The command line of megatron.training with the hooks in place."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
from typing import Any

import pytest

from megatron_muon import MuonConfig
from megatron_muon.config import UNREAD
from megatron_muon.refusals import MUON, QK_CLIP
from megatron_muon.refusals.plan import PLAN, READ
from tests.pool import RankPool

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --lr 1e-3 --train-iters 1 --transformer-impl local --tokenizer-type NullTokenizer "
    "--vocab-size 32 --mock-data"
)


def parsed(flags: str) -> tuple[Any, Any] | str:
    """Parse and validate; arguments and the OptimizerConfig that Megatron makes of them, or the error."""
    import megatron_muon

    megatron_muon.install()
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.training import get_megatron_optimizer_config

    sys.argv = ["pretrain.py", *MODEL.split(), *flags.split()]
    try:
        args = parse_args()
        validate_args(args)
        return args, get_megatron_optimizer_config(args)[0]
    except megatron_muon.ConfigError as error:
        return str(error)


def parse(flags: str) -> dict[str, Any] | str:
    """The Muon options that flags come to, or the error."""
    found = parsed(flags)
    if isinstance(found, str):
        return found
    _, config = found
    read = dataclasses.asdict(MuonConfig.from_optimizer_config(config))
    return {**read, "layer_wise": config.use_layer_wise_distributed_optimizer, "optimizer": config.optimizer}


def test_defaults_are_those_of_muon_config(pool: RankPool) -> None:
    read = pool.run(parse, 1, "--optimizer muon")[0]
    assert read == {**dataclasses.asdict(MuonConfig()), "layer_wise": False, "optimizer": "muon"}


def test_every_flag_arrives(pool: RankPool) -> None:
    flags = (
        "--optimizer muon --muon-momentum 0.8 --muon-nesterov --muon-no-split-qkv --muon-scale-mode aspect_ratio "
        "--muon-extra-scale-factor 0.2 --muon-coefficient-type custom --muon-custom-coefficients 2,-1.5,0.5 "
        "--muon-num-ns-steps 8 --muon-eps 1e-9 "
        "--muon-fp32-matmul-prec highest --muon-tp-mode distributed --muon-scalar-optimizer lion "
        "--muon-log-interval 10 --muon-log-per-layer --muon-log-console --muon-alarm stop "
        "--muon-check-replicas-interval 100 --muon-log-jsonl losses.jsonl "
        "--muon-qkv whole --muon-mla-up split --muon-mla-down whole --muon-glu whole "
        "--muon-gdn-in-proj split --muon-mamba-in-proj split --muon-router adam --muon-unknown-2d adam "
        "--muon-lora-a adam "
        "--muon-param-rule *.weight=whole --muon-param-rule *.linear_qkv.weight=adam --muon-scalar-lr 1e-4 "
        "--muon-ns-dtype fp16 "
        "--muon-ns-backend torch --muon-tp-wire-dtype bf16 --muon-chunk-mb 64 --muon-ckpt-changes accept "
        "--muon-qk-clip-rule exact --muon-qk-clip-norm gains --muon-qk-logits lse --muon-qk-logits-interval 10 "
        "--muon-qk-log-layers 100 --muon-variant polargrad --muon-weight-decay-method cautious "
        "--muon-ball-radius 2 --muon-param-rule output_layer*=sign "
        "--muon-scalar-weight-decay-method independent_scheduled "
        "--muon-nonfinite stop --bf16 --muon-master remainder --muon-momentum-dtype int8 --muon-offload all "
        "--muon-dry-run --log-max-attention-logit --qk-clip"
    )
    read = pool.run(parse, 1, flags)[0]
    expected = MuonConfig(
        momentum=0.8,
        nesterov=True,
        split_qkv=False,
        scale_mode="aspect_ratio",
        extra_scale_factor=0.2,
        coefficient_type="custom",
        custom_coefficients=("2,-1.5,0.5",),
        num_ns_steps=8,
        eps=1e-9,
        fp32_matmul_prec="highest",
        tp_mode="distributed",
        scalar_optimizer="lion",
        log_jsonl="losses.jsonl",
        log_interval=10,
        log_per_layer=True,
        log_console=True,
        alarm="stop",
        check_replicas_interval=100,
        nonfinite="stop",
        master="remainder",
        momentum_dtype="int8",
        offload="all",
        qkv="whole",
        mla_up="split",
        mla_down="whole",
        glu="whole",
        gdn_in_proj="split",
        mamba_in_proj="split",
        router="adam",
        lora_a="adam",
        unknown_2d="adam",
        param_rule=("*.weight=whole", "*.linear_qkv.weight=adam", "output_layer*=sign"),
        scalar_lr=1e-4,
        ns_dtype="fp16",
        ns_backend="torch",
        tp_wire_dtype="bf16",
        chunk_mb=64.0,
        ckpt_changes="accept",
        qk_clip_rule="exact",
        qk_clip_norm="gains",
        qk_logits="lse",
        qk_logits_interval=10,
        qk_log_layers=100,
        variant="polargrad",
        weight_decay_method="cautious",
        ball_radius=2.0,
        scalar_weight_decay_method="independent_scheduled",
        dry_run=True,
    )
    assert read == {**dataclasses.asdict(expected), "layer_wise": False, "optimizer": "muon"}
    for field in dataclasses.fields(MuonConfig):
        exercised = getattr(expected, field.name) != field.default
        # Those of other optimizers, and those that go with few others, are exercised below.
        below = ("transfer", "sphere", "stiefel", "blockwise", "layer_wise")
        assert exercised or field.name.startswith(below), f"{field.name} is not exercised"


def test_flags_of_other_optimizers_arrive(pool: RankPool) -> None:
    read = pool.run(parse, 1, "--optimizer spectral_sphere --muon-sphere-radius 1.5 --muon-sphere-tolerance 0.2")[0]
    assert (read["sphere_radius"], read["sphere_tolerance"]) == (1.5, 0.2)
    flags = "--muon-stiefel-solver fixed_point --muon-stiefel-iterations 12 --muon-stiefel-radius 1.5"
    read = pool.run(parse, 1, f"--optimizer stiefel_muon --muon-param-rule *.linear_qkv.weight=stiefel {flags}")[0]
    assert [read[f"stiefel_{name}"] for name in ("solver", "iterations", "radius")] == ["fixed_point", 12, 1.5]
    read = pool.run(parse, 1, "--optimizer muon --muon-blockwise-period 5 --muon-blockwise-lr-mult 0.5")[0]
    assert (read["blockwise_period"], read["blockwise_lr_mult"]) == (5, 0.5)
    flags = "--optimizer muon --use-distributed-optimizer --layer-wise-param-layout decoupled"
    assert pool.run(parse, 1, flags)[0]["layer_wise_param_layout"] == "decoupled"


TRANSFER = (
    "--optimizer muon --muon-transfer 128x2 --muon-scale-mode unit_rms_norm "
    "--muon-weight-decay-method independent_scheduled "
)


def test_transfer_arrives(pool: RankPool) -> None:
    read = pool.run(parse, 1, TRANSFER + "--untie-embeddings-and-output-weights")[0]
    assert read["transfer"] == "128x2"


def parse_adaptive(flags: str) -> tuple[Any, ...] | str:
    """The second moment's part of the OptimizerConfig that Megatron makes of flags, or the error."""
    import megatron_muon

    megatron_muon.install()
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.training import get_megatron_optimizer_config

    sys.argv = ["pretrain.py", *MODEL.split(), "--optimizer", "adaptive_muon", *flags.split()]
    try:
        args = parse_args()
        validate_args(args)
        config, _ = get_megatron_optimizer_config(args)
    except megatron_muon.ConfigError as error:
        return str(error)
    return (config.adaptive_muon_moment2_method, config.adaptive_muon_beta2, config.adaptive_muon_eps)


def test_flags_of_second_moments_arrive(pool: RankPool) -> None:
    """Megatron-Core has the fields, and no flags for them."""
    assert pool.run(parse_adaptive, 1, "")[0] == ("adamuon", 0.95, 1e-8)
    flags = "--adaptive-muon-moment2-method normuon --adaptive-muon-beta2 0.9 --adaptive-muon-eps 1e-6"
    assert pool.run(parse_adaptive, 1, flags)[0] == ("normuon", 0.9, 1e-6)


def namo_in_code() -> str:
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer import OptimizerConfig

    try:
        OptimizerConfig(optimizer="adaptive_muon", adaptive_muon_moment2_method="namo", muon_scale_mode="spectral_norm")
    except megatron_muon.ConfigError as error:
        return str(error)
    return ""


def test_namo_in_an_optimizer_config(pool: RankPool) -> None:
    assert "namo with --muon-scale-mode spectral_norm" in pool.run(namo_in_code, 1)[0]


@pytest.mark.parametrize("optimizer", ["adaptive_muon", "spectral_sphere", "stiefel_muon"])
def test_names_of_variants(pool: RankPool, optimizer: str) -> None:
    """Layer-wise too, as for muon."""
    assert pool.run(parse, 1, f"--optimizer {optimizer}")[0]["optimizer"] == optimizer
    assert pool.run(parse, 1, f"--optimizer {optimizer} --use-distributed-optimizer")[0]["layer_wise"] is True


def test_a_later_flag_turns_an_earlier_one_off(pool: RankPool) -> None:
    read = pool.run(
        parse, 1, "--optimizer muon --muon-nesterov --no-muon-nesterov --no-muon-split-qkv --muon-split-qkv"
    )
    assert (read[0]["nesterov"], read[0]["split_qkv"]) == (False, True)


@pytest.mark.parametrize("flags", ["--optimizer dist_muon", "--optimizer muon --use-distributed-optimizer"])
def test_layer_wise_form(pool: RankPool, flags: str) -> None:
    read = pool.run(parse, 1, flags)[0]
    assert (read["layer_wise"], read["optimizer"]) == (True, "muon")


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (
            "muon --fp16 --use-distributed-optimizer --num-distributed-optimizer-instances 2 --muon-sphere-radius 4",
            [
                "--muon-sphere-radius 4.0 with --optimizer muon, which does not read it: ",
                "--fp16 with --optimizer muon: Muon needs no loss scale; use --bf16 or float32.",
                "--num-distributed-optimizer-instances 2 with layer-wise --optimizer muon: ",
            ],
        ),
        (
            "muon --muon-num-ns-steps five --muon-eps 0",
            [
                "--muon-num-ns-steps five: give a whole number of at least 1 (5 is usual).",
                "--muon-eps 0.0: give a positive number.",
            ],
        ),
        (
            "muon --muon-transfer 128x2 --muon-scale-mode unit_rms_norm",
            [
                "--muon-transfer 128x2 with --muon-weight-decay-method decoupled: ",
                "--muon-transfer 128x2 without --untie-embeddings-and-output-weights: ",
            ],
        ),
        ("adaptive_muon --adaptive-muon-beta2 much", ["--adaptive-muon-beta2 much: give a number from 0 to below 1 "]),
        (
            "adam --muon-router adam",
            ["--muon-router adam with --optimizer adam, which does not read it: leave it out"],
        ),
        ("muon --muon-dry-rum", ["--muon-dry-rum: there is no such flag; did you mean --muon-dry-run?"]),
        ("muon --muon_momentum=0.9", ["--muon_momentum: there is no such flag; did you mean --muon-momentum?"]),
        ("muon --mun-nesterov", ["--mun-nesterov: there is no such flag; did you mean --muon-nesterov?"]),
        ("muon --muon-xyz 3", ["--muon-xyz: there is no such flag; SCRIPT --help lists all."]),
        ("muon --muon-scale-mode spektral", ["--muon-scale-mode spektral: choose one of spectral, "]),
        (
            "muon --use-layer-wise-distributed-optimizer --muon-matched-adamw-rms 0.2",
            [
                "--use-layer-wise-distributed-optimizer: there is no such flag here; use --use-distributed-optimizer, ",
                "--muon-matched-adamw-rms: there is no such flag here; use --muon-scale-mode spectral --muon-extra-",
            ],
        ),
        (
            "adam --muon-qk-clip-rule group --muon-qk-logits exact --log-max-attention-logit",
            ["--muon-qk-clip-rule group without --qk-clip: nothing is clipped; add --qk-clip, or leave it out."],
        ),
        (
            "muon --muon-qk-logits exact --muon-qk-log-layers 5",
            [
                "--muon-qk-logits exact without --qk-clip or --log-max-attention-logit: nothing is measured; add one ",
                "--muon-qk-log-layers 5 without --qk-clip or --log-max-attention-logit: nothing is measured; add one ",
            ],
        ),
        ("soap --muon-param-rule *=adam", ["--muon-param-rule *=adam with --optimizer soap, which does not read it: "]),
        ("adam --qk-clip --qk-clip-alpha 2", ["--qk-clip-alpha 2.0: give a number between 0 and 1 "]),
    ],
)
def test_the_command_line_walks_the_table(pool: RankPool, flags: str, messages: list[str]) -> None:
    """Before the model is built, with all that is wrong at once; each row: tests/unit/test_refusals.py."""
    answer = pool.run(parse, 1, f"--optimizer {flags}")[0]
    assert isinstance(answer, str)
    lines = answer.split("\n")
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(message)


def parse_and_listen(flags: str, ignore: bool) -> tuple[Any, str]:
    """The options of a run, or the error, and what is said; with a parser that skips what it does not know."""
    import megatron_muon

    megatron_muon.install()
    from megatron.training.arguments import parse_args, validate_args

    sys.argv = ["pretrain.py", *MODEL.split(), *flags.split()]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            args = parse_args(ignore_unknown_args=ignore)
            validate_args(args)
        except megatron_muon.ConfigError as error:
            return str(error), said.getvalue()
    return args.muon_nesterov, said.getvalue()


def test_names_of_earlier_versions(pool: RankPool) -> None:
    nesterov, said = pool.run(parse_and_listen, 1, "--optimizer muon --muon-use-nesterov", False)[0]
    assert nesterov is True
    assert said.startswith("megatron_muon: --muon-use-nesterov is taken as --muon-nesterov.\n")


def test_a_parser_that_skips_unknown_flags_loses_none_of_ours(pool: RankPool) -> None:
    """An Adam run trains as without this package, which says it."""
    refusal, _ = pool.run(parse_and_listen, 1, "--optimizer muon --muon-nestrov --else 3", True)[0]
    assert refusal == "--muon-nestrov: there is no such flag; did you mean --muon-nesterov?"
    trains, said = pool.run(parse_and_listen, 1, "--optimizer adam --muon-nestrov --else 3", True)[0]
    assert trains is False and said.startswith(f"megatron_muon: {refusal}\n")


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_flags_that_megatron_has_too_stop_no_run_of_its_optimizers(pool: RankPool, optimizer: str) -> None:
    """Launch scripts give them for any optimizer."""
    _, said = pool.run(parse_and_listen, 1, f"--optimizer {optimizer} --muon-nesterov --muon-num-ns-steps 6", False)[0]
    lines = [line for line in said.splitlines() if line.startswith("megatron_muon: ")]
    assert [line.split(":")[2] for line in lines] == [
        f" --muon-num-ns-steps 6 with --optimizer {optimizer}, which does not read it",
        f" --muon-nesterov with --optimizer {optimizer}, which does not read it",
    ]


def parse_with_installed_options(flags: str) -> dict[str, Any] | str:
    """As :func:`parse`, where a script has given options to ``install()``, which are the defaults of flags then."""
    import megatron_muon

    megatron_muon.uninstall()
    try:
        megatron_muon.install(MuonConfig(router="adam", sphere_radius=4.0))
        return parse(flags)
    finally:
        megatron_muon.uninstall()
        megatron_muon.install()


def test_options_given_to_install_stop_no_run_of_adam(pool: RankPool) -> None:
    """Nobody gave it these flags. With an optimizer of this package they are options of the run."""
    assert isinstance(pool.run(parse_with_installed_options, 1, "--optimizer adam")[0], dict)
    for optimizer, flag in (("adam", "--muon-lora-a"), ("muon", "--muon-sphere-radius")):
        message = pool.run(parse_with_installed_options, 1, f"--optimizer {optimizer} --muon-lora-a adam")[0]
        assert isinstance(message, str) and "\n" not in message
        assert message.startswith(flag) and f"with --optimizer {optimizer}, which does not read it" in message


def unknown_settings() -> list[str]:
    """Names in the table that neither arguments nor configs have."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.training.arguments import parse_args

    sys.argv = ["pretrain.py", *MODEL.split(), "--optimizer", "muon"]
    known = set(vars(parse_args()))
    for cls in (DistributedDataParallelConfig, OptimizerConfig, TransformerConfig):
        known |= {f"{cls.__name__}.{field.name}" for field in dataclasses.fields(cls)}
    rows = (*UNREAD, *MUON, *QK_CLIP, *PLAN, *READ)
    names = {condition.name for row in rows for condition in row.when}
    return sorted(names - known)


def test_the_table_speaks_of_settings_that_there_are(pool: RankPool) -> None:
    """A name that is misspelt would be unknown everywhere, and its row would never hold."""
    assert pool.run(unknown_settings, 1) == [[]]


def adam_with_muon_flags() -> str:
    import megatron_muon

    megatron_muon.install()
    from megatron.training.arguments import parse_args, validate_args

    sys.argv = ["pretrain.py", *MODEL.split(), "--optimizer", "adam", "--fp16"]
    args = parse_args()
    validate_args(args)
    return args.optimizer


def test_other_optimizers_are_not_our_business(pool: RankPool) -> None:
    assert pool.run(adam_with_muon_flags, 1) == ["adam"]


def help_text() -> str:
    import megatron_muon

    megatron_muon.install()
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser()).format_help()


def test_help_can_be_printed(pool: RankPool) -> None:
    """Megatron-Core 0.19.2 alone fails: a help text of its own holds a bare per cent sign."""
    text = " ".join(pool.run(help_text, 1)[0].split())
    for field in dataclasses.fields(MuonConfig):
        assert " ".join(field.metadata["help"].split()[:4]) in text, field.name

"""The command line of megatron.training with the hooks in place."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from typing import Any

import pytest

from megatron_muon import MuonConfig
from megatron_muon.errors import ConfigError
from megatron_muon.plugin.optimizer_config import check_adaptive
from tests.pool import RankPool

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --lr 1e-3 --train-iters 1 --transformer-impl local --tokenizer-type NullTokenizer "
    "--vocab-size 32 --mock-data"
)


def parse(flags: str) -> dict[str, Any] | str:
    """Parse and validate; the Muon options of the OptimizerConfig that Megatron makes of them, or the error."""
    import megatron_muon

    megatron_muon.install()
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.training import get_megatron_optimizer_config

    sys.argv = ["pretrain.py", *MODEL.split(), *flags.split()]
    try:
        args = parse_args()
        validate_args(args)
        config, _ = get_megatron_optimizer_config(args)
    except megatron_muon.ConfigError as error:
        return str(error)
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
        "--muon-log-jsonl losses.jsonl --muon-qkv whole --muon-mla-up split --muon-mla-down whole --muon-glu whole "
        "--muon-gdn-in-proj split --muon-mamba-in-proj split --muon-router adam --muon-unknown-2d adam "
        "--muon-lora-a adam "
        "--muon-param-rule *.weight=whole --muon-param-rule *.linear_qkv.weight=adam --muon-scalar-lr 1e-4 "
        "--muon-ns-dtype fp16 "
        "--muon-ns-backend torch --muon-tp-wire-dtype bf16 --muon-chunk-mb 64 --muon-ckpt-changes accept "
        "--muon-qk-clip-rule exact --muon-qk-clip-norm gains --muon-qk-logits lse --muon-qk-logits-interval 10 "
        "--muon-qk-log-layers 100 --muon-variant polargrad --muon-weight-decay-method cautious "
        "--muon-ball-radius 2 --muon-param-rule output_layer*=sign "
        "--muon-scalar-weight-decay-method independent_scheduled "
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
    )
    assert read == {**dataclasses.asdict(expected), "layer_wise": False, "optimizer": "muon"}
    for field in dataclasses.fields(MuonConfig):
        exercised = getattr(expected, field.name) != field.default
        # Those of other optimizers, and of transfer, which goes with few others, are exercised below.
        assert exercised or field.name.startswith(("transfer", "sphere", "stiefel")), f"{field.name} is not exercised"


def test_flags_of_other_optimizers_arrive(pool: RankPool) -> None:
    read = pool.run(parse, 1, "--optimizer spectral_sphere --muon-sphere-radius 1.5 --muon-sphere-tolerance 0.2")[0]
    assert (read["sphere_radius"], read["sphere_tolerance"]) == (1.5, 0.2)
    flags = "--muon-stiefel-solver fixed_point --muon-stiefel-iterations 12 --muon-stiefel-radius 1.5"
    read = pool.run(parse, 1, f"--optimizer stiefel_muon --muon-param-rule *.linear_qkv.weight=stiefel {flags}")[0]
    assert [read[f"stiefel_{name}"] for name in ("solver", "iterations", "radius")] == ["fixed_point", 12, 1.5]


TRANSFER = (
    "--optimizer muon --muon-transfer 128x2 --muon-scale-mode unit_rms_norm "
    "--muon-weight-decay-method independent_scheduled "
)


def test_transfer_arrives(pool: RankPool) -> None:
    read = pool.run(parse, 1, TRANSFER + "--untie-embeddings-and-output-weights")[0]
    assert read["transfer"] == "128x2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "with an output layer that is the embedding, too"),
        ("--use-mup", "--muon-transfer 128x2 with --use-mup"),
        ("--init-method-xavier-uniform", "--muon-transfer 128x2 with --init-method-xavier-uniform"),
        (
            "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.2",
            "--muon-transfer 128x2 with --weight-decay-incr-style linear",
        ),
        ("--optimizer spectral_sphere", "--muon-transfer 128x2 with --optimizer spectral_sphere"),
        (
            "--untie-embeddings-and-output-weights --decoupled-lr 1e-4",
            "--muon-transfer 128x2 with --decoupled-lr 0.0001",
        ),
    ],
)
def test_what_transfer_does_not_go_with(pool: RankPool, flags: str, message: str) -> None:
    assert message in pool.run(parse, 1, TRANSFER + flags)[0]


TRANSFERRED = {"transfer": "128x2", "weight_decay_method": "independent_scheduled"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale_mode": "update_norm"}, "--adaptive-muon-moment2-method namo with --muon-scale-mode update_norm: the"),
        *(
            ({**TRANSFERRED, "scale_mode": mode}, "--muon-transfer 128x2 with --adaptive-muon-moment2-method namo: the")
            for mode in ("spectral_norm", "unit_rms_norm")
        ),
    ],
)
def test_namo_without_a_scale_by_shape_is_refused(given: dict[str, Any], message: str) -> None:
    """The way out of either is no way into the other."""
    settings = types.SimpleNamespace(
        optimizer="dist_adaptive_muon",
        adaptive_muon_moment2_method="namo",
        adaptive_muon_beta2=0.95,
        adaptive_muon_eps=1e-8,
    )
    with pytest.raises(ConfigError) as error:
        check_adaptive(settings, MuonConfig(**given).validate())
    assert str(error.value).startswith(message) and "normuon or adamuon" in str(error.value)
    check_adaptive(settings, MuonConfig(scale_mode="moonlight"))
    settings.adaptive_muon_moment2_method = "normuon"
    check_adaptive(settings, MuonConfig(**given))


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


@pytest.mark.parametrize(
    "flags",
    [
        "--adaptive-muon-moment2-method adam",
        "--adaptive-muon-beta2 1.0",
        "--adaptive-muon-beta2 much",
        "--adaptive-muon-eps 0.0",
        "--adaptive-muon-eps inf",
    ],
)
def test_wrong_flags_of_second_moments(pool: RankPool, flags: str) -> None:
    assert str(pool.run(parse_adaptive, 1, flags)[0]).startswith(f"{flags}: ")


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
    "flags,message",
    [
        ("--fp16", "--fp16 with --optimizer muon: Muon needs no loss scale; use --bf16 or float32."),
        ("--muon-num-ns-steps 0", "--muon-num-ns-steps 0: give a whole number of at least 1 (5 is usual)."),
        ("--muon-num-ns-steps five", "--muon-num-ns-steps five: give a whole number of at least 1 (5 is usual)."),
        ("--muon-momentum 1.5", "--muon-momentum 1.5: give a number from 0 to below 1 (0.95 is usual)."),
        ("--muon-scale-mode wide", "--muon-scale-mode wide: choose one of spectral, moonlight, moonlight_hidden"),
        (
            "--muon-tp-mode gather",
            "--muon-tp-mode gather: choose one of auto, owner, gram, duplicated, distributed, blockwise.",
        ),
        ("--muon-coefficient-type jordan", "--muon-coefficient-type jordan: choose one of simple, quintic"),
        ("--muon-fp32-matmul-prec low", "--muon-fp32-matmul-prec low: torch has no such precision; use medium"),
        ("--muon-extra-scale-factor -1", "--muon-extra-scale-factor -1.0: give a positive number."),
        ("--muon-eps 0", "--muon-eps 0.0: give a positive number."),
        ("--muon-scalar-optimizer sgd", "--muon-scalar-optimizer sgd: choose one of adam, lion."),
        ("--use-torch-fsdp2", "--use-torch-fsdp2 with --optimizer muon: FSDP shards cannot be orthogonalized"),
        ("--use-megatron-fsdp", "--use-megatron-fsdp with --optimizer muon: FSDP shards cannot be orthogonalized"),
        (
            "--use-precision-aware-optimizer",
            "--use-precision-aware-optimizer with --optimizer muon: it exists for Adam",
        ),
        ("--optimizer-cpu-offload", "--optimizer-cpu-offload with --optimizer muon: Muon's state cannot be offloaded"),
        ("--optimizer-cuda-graph", "--optimizer-cuda-graph with --optimizer muon: the step of Muon is not captured"),
        ("--fp8-param-gather", "--fp8-param-gather with --optimizer muon: Muon updates bfloat16 or float32 weights"),
        ("--ckpt-format fsdp_dtensor", "--ckpt-format fsdp_dtensor with --optimizer muon: use torch_dist (or torch)."),
        (
            "--use-distributed-optimizer --num-distributed-optimizer-instances 2",
            "--num-distributed-optimizer-instances 2 with layer-wise --optimizer muon",
        ),
        (
            "--use-distributed-optimizer --overlap-param-gather-with-optimizer-step",
            "--overlap-param-gather-with-optimizer-step with layer-wise --optimizer muon",
        ),
        (
            "--use-distributed-optimizer --ckpt-format torch --save checkpoints",
            "--ckpt-format torch with layer-wise --optimizer muon: Megatron-Core cannot save it",
        ),
    ],
)
def test_refusals(pool: RankPool, flags: str, message: str) -> None:
    answer = pool.run(parse, 1, f"--optimizer muon {flags}")[0]
    assert isinstance(answer, str) and answer.startswith(message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("muon --muon-sphere-radius 4", "--muon-sphere-radius 4.0 with --optimizer muon, which does not read it"),
        ("muon --muon-stiefel-solver dual_ascent", "--muon-stiefel-solver dual_ascent with --optimizer muon, which"),
        (
            "spectral_sphere --muon-stiefel-radius 3",
            "--muon-stiefel-radius 3.0 with --optimizer spectral_sphere, which",
        ),
        ("muon --muon-ball-radius 9", "--muon-ball-radius 9.0 without a weight that reads it: give some to"),
        (
            "muon --adaptive-muon-moment2-method namo",
            "--adaptive-muon-moment2-method namo with --optimizer muon, which has no second moments",
        ),
        ("muon --adaptive-muon-beta2 0.7", "--adaptive-muon-beta2 0.7 with --optimizer muon, which has no second"),
        ("adaptive_muon --muon-variant hyperball --muon-scale-mode none", "--muon-variant hyperball with --optimizer"),
        ("stiefel_muon --muon-scalar-optimizer lion", "--muon-scalar-optimizer lion with --optimizer stiefel_muon"),
        ("spectral_sphere --muon-scalar-optimizer lion", "--muon-scalar-optimizer lion with --optimizer spectral"),
        ("spectral_sphere --muon-scale-mode moonlight", "--muon-scale-mode moonlight with --optimizer spectral_sphere"),
        ("spectral_sphere --muon-extra-scale-factor 7", "--muon-extra-scale-factor 7.0 with --optimizer spectral"),
        ("spectral_sphere --muon-weight-decay-method l2", "--muon-weight-decay-method l2 with --optimizer spectral"),
        (
            "muon --muon-variant hyperball --muon-scale-mode none --muon-extra-scale-factor 0.2",
            "--muon-variant hyperball with --muon-extra-scale-factor 0.2: weights keep their norm",
        ),
        (
            "muon --muon-variant hyperball --muon-scale-mode none --muon-weight-decay-method l2",
            "--muon-variant hyperball with --muon-weight-decay-method l2: weights keep their norm",
        ),
        ("muon --muon-param-rule *.linear_qkv.weight=stiefel", "--muon-param-rule '*.linear_qkv.weight=stiefel' with"),
        (
            "spectral_sphere --muon-param-rule output_layer*=sign",
            "--muon-param-rule 'output_layer*=sign' with spectral_sphere, which has no weight decay",
        ),
        (
            "adam --muon-transfer 128x2",
            "--muon-transfer 128x2 with --optimizer adam: it acts on what is updated beside",
        ),
        ("adam --muon-scalar-lr 1e-4", "--muon-scalar-lr 0.0001 with --optimizer adam: it acts on what is updated"),
    ],
)
def test_what_an_optimizer_does_not_read_is_refused(pool: RankPool, flags: str, message: str) -> None:
    """Before the model is built: a flag that is ignored is one that somebody relies on."""
    answer = pool.run(parse, 1, f"--optimizer {flags}")[0]
    assert isinstance(answer, str) and answer.startswith(message)


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

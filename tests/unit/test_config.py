"""Every refusal of a value names flag, value and way out."""

import dataclasses
import types

import pytest

from megatron_muon import ConfigError, MuonConfig


def test_defaults_are_valid() -> None:
    MuonConfig().validate()


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("momentum", 1.0, r"--muon-momentum 1\.0: give a number from 0 to below 1"),
        ("momentum", "fast", r"--muon-momentum fast: give a number"),
        ("nesterov", "yes", r"--muon-nesterov yes: give True or False"),
        ("split_qkv", None, r"--muon-split-qkv None: give True or False"),
        ("scale_mode", "spectrl", r"--muon-scale-mode spectrl: choose one of spectral, "),
        ("extra_scale_factor", 0.0, r"--muon-extra-scale-factor 0\.0: give a positive number"),
        ("extra_scale_factor", float("nan"), r"--muon-extra-scale-factor nan: give a positive number"),
        ("coefficient_type", "jordan", r"--muon-coefficient-type jordan: choose one of simple, quintic"),
        ("custom_coefficients", ("1,2",), r"--muon-custom-coefficients .*: give three numbers a,b,c"),
        ("ns_dtype", "fp8", r"--muon-ns-dtype fp8: choose one of auto, fp32, bf16, fp16"),
        ("ns_backend", "cutlass", r"--muon-ns-backend cutlass: choose one of auto, torch, triton"),
        ("tp_wire_dtype", "fp16", r"--muon-tp-wire-dtype fp16: choose one of auto, fp32, bf16"),
        ("chunk_mb", -1, r"--muon-chunk-mb -1: give a number of at least 0"),
        ("num_ns_steps", 0, r"--muon-num-ns-steps 0: give a whole number of at least 1"),
        ("num_ns_steps", 2.5, r"--muon-num-ns-steps 2\.5: give a whole number"),
        ("eps", -1e-7, r"--muon-eps -1e-07: give a positive number"),
        ("fp32_matmul_prec", "low", r"--muon-fp32-matmul-prec low: torch has no such precision; use medium"),
        (
            "tp_mode",
            "gather",
            r"--muon-tp-mode gather: choose one of auto, owner, gram, duplicated, distributed, blockwise",
        ),
        ("scalar_optimizer", "sgd", r"--muon-scalar-optimizer sgd: choose one of adam, lion"),
    ],
)
def test_wrong_values_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MuonConfig(), **{field: value}).validate()


def test_options_that_contradict_each_other_are_refused() -> None:
    """Each pair: tests/unit/test_refusals.py."""
    muon = MuonConfig(variant="polargrad", scale_mode="update_norm", custom_coefficients=("2,-1.5,0.5",))
    with pytest.raises(ConfigError, match=r"--muon-custom-coefficients .*\n--muon-variant polargrad with"):
        muon.validate()
    muon.validate(pairs=False)


def test_all_wrong_values_are_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--muon-eps 0: .*\n--muon-momentum 2: "):
        MuonConfig(momentum=2, eps=0).validate()


def test_every_field_has_a_check_and_a_help_text() -> None:
    for field in dataclasses.fields(MuonConfig):
        assert callable(field.metadata["check"]) and field.metadata["help"].endswith(".")


def test_round_trip_through_an_optimizer_config() -> None:
    config = types.SimpleNamespace()
    muon = MuonConfig(momentum=0.9, eps=1e-9, tp_mode="distributed")
    assert MuonConfig.from_optimizer_config(muon.apply_to(config)) == muon


def test_misspelt_attribute_is_refused() -> None:
    config = types.SimpleNamespace(muon_momentun=0.9)
    with pytest.raises(ConfigError, match=r"OptimizerConfig\.muon_momentun 0\.9: no such Muon option"):
        MuonConfig.from_optimizer_config(config)


def test_options_that_are_nowhere_are_not_made_up() -> None:
    config = types.SimpleNamespace(muon_momentum=0.9)
    with pytest.raises(ConfigError, match=r"SimpleNamespace has no muon_alarm and others: nobody knows what was"):
        MuonConfig.from_optimizer_config(config)

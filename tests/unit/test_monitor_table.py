"""Names of rows, layers and classes of what a measured step says."""

from __future__ import annotations

import pytest

from megatron_muon.monitor.table import class_of, layer_of


@pytest.mark.parametrize(
    ("name", "layer", "its_class"),
    [
        (
            "decoder.layers.13.mlp.experts.linear_fc1.weight7[gate]",
            "decoder.layers.13.mlp.experts.linear_fc1.weight*[gate]",
            "decoder.layers.*.mlp.experts.linear_fc1.weight*[gate]",
        ),
        (
            "layers.3.mlp.experts.local_experts.4.linear_fc2.weight",
            "layers.3.mlp.experts.local_experts.*.linear_fc2.weight",
            "layers.*.mlp.experts.local_experts.*.linear_fc2.weight",
        ),
        (
            "mtp.layers.0.transformer_layer.layers.2.linear_fc1.weight",
            "mtp.layers.0.transformer_layer.layers.2.linear_fc1.weight",
            "mtp.layers.*.transformer_layer.layers.*.linear_fc1.weight",
        ),
        ("output_layer.weight", "output_layer.weight", "output_layer.weight"),
    ],
)
def test_numbers_give_way(name: str, layer: str, its_class: str) -> None:
    assert (layer_of(name), class_of(name)) == (layer, its_class)

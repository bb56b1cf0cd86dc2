"""The fused in_proj of GatedDeltaNet is no matrix that Muon may orthogonalize."""

from types import SimpleNamespace

import pytest
import torch

from megatron.core.ssm.gated_delta_net import common
from megatron.core.transformer.transformer_config import TransformerConfig


class _BuiltError(Exception):
    """Raised by what comes after in_proj: the rest of the layer needs a GPU."""


def test_in_proj_is_tagged(monkeypatch):
    class Layer(common._GDNBase):
        def _setup_variant_attrs(self):
            self.dt_bias_dim = self.a_log_dim = self.in_proj_extra_dim = 4
            self.in_proj_split_names = self.in_proj_split_sections = self.feat_dim_split = ()
            self.gated_delta_rule = lambda: None

    built = []

    def build_module(spec, rows, columns, **kwargs):
        built.append(torch.nn.Linear(rows, columns, bias=False))
        return built[-1]

    def conv(*args, **kwargs):
        raise _BuiltError

    monkeypatch.setattr(common, "HAVE_FLA", True)
    monkeypatch.setattr(common, "build_module", build_module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(common.nn, "Conv1d", conv)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    config.linear_conv_kernel_dim = 4
    config.linear_key_head_dim = config.linear_value_head_dim = 4
    config.linear_num_key_heads = config.linear_num_value_heads = 2
    with pytest.raises(_BuiltError):
        Layer(
            config,
            SimpleNamespace(in_proj=None, out_norm=None, out_proj=None),
            layer_number=1,
            pg_collection=SimpleNamespace(tp=group, cp=group),
        )
    assert built[0].weight.skip_orthogonalization is True

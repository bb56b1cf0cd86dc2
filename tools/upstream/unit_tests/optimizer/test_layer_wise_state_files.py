"""--ckpt-format torch: each rank that owns weights has a file of its own."""

import pytest
import torch

from megatron.core.optimizer import layer_wise_optimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer


@pytest.fixture
def optimizer(monkeypatch):
    base = LayerWiseDistributedOptimizer.__base__
    monkeypatch.setattr(base, "state_dict", lambda self: {"rank": self.dp_cp})
    monkeypatch.setattr(base, "load_state_dict", lambda self, state: setattr(self, "loaded", state))
    monkeypatch.setattr(layer_wise_optimizer, "get_pg_rank", lambda group: group)
    return LayerWiseDistributedOptimizer.__new__(LayerWiseDistributedOptimizer)


def test_context_parallel_ranks_do_not_share_a_file(optimizer, tmp_path):
    """The caller tells both one name, by their data-parallel rank without context parallelism."""
    told = str(tmp_path / "layer_wise_optimizer_0.pt")
    for rank in (0, 1):
        optimizer.dp_cp = rank  # get_pg_rank() gives it back
        optimizer.save_state_dict_to_file(told)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["layer_wise_optimizer_0.pt", "layer_wise_optimizer_1.pt"]
    for rank in (0, 1):
        optimizer.dp_cp = rank
        optimizer.load_state_dict_from_file(told)
        assert optimizer.loaded == {"rank": rank}


def test_names_without_context_parallelism_are_as_they_were(optimizer, tmp_path):
    optimizer.dp_cp = 12
    optimizer.save_state_dict_to_file(str(tmp_path / "layer_wise_optimizer_12.pt"))
    assert torch.load(tmp_path / "layer_wise_optimizer_12.pt") == {"rank": 12}

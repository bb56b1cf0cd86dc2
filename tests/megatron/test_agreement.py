"""What one rank alone meets ends all ranks of its model, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron_muon.errors import ConfigError
from tests.megatron.harness import Layout
from tests.pool import RankPool


def ranks_of_layout(layout: Layout) -> list[int]:
    from megatron_muon.plugin.groups import ranks_of

    layout.initialize()
    return ranks_of(None).gather(dist.get_rank)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2, cp=2), Layout(tp=2, pp=2, ep=2)], ids=repr)
def test_the_ranks_of_parallel_state(pool: RankPool, layout: Layout) -> None:
    for found in pool.run(ranks_of_layout, 4, layout):
        assert sorted(found) == [0, 1, 2, 3]


def ranks_of_collections() -> dict[str, Any]:
    """Ranks 0 and 2 have a model, and ranks 1 and 3, each in groups of its own."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_muon.plugin.groups import ranks_of

    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    alone = [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]
    pair = pairs[dist.get_rank() % 2]
    collections = {
        "replicas": {"tp": alone, "pp": alone, "mp": alone, "dp_cp": pair},
        "no mp": {"tp": alone, "pp": pair, "dp": alone},
        "not divided": {"mp": None, "dp": pair},
        "context": {"mp": alone, "dp": alone, "cp": pair},
        "nothing": {"tp": alone, "dp_cp": pair},
    }
    answer: dict[str, Any] = {}
    for name, groups in collections.items():
        try:
            answer[name] = ranks_of(ProcessGroupCollection(**groups)).gather(dist.get_rank)
        except ConfigError as error:
            answer[name] = str(error)
    return answer


def test_the_ranks_of_a_model_with_groups_of_its_own(pool: RankPool) -> None:
    for rank, answer in enumerate(pool.run(ranks_of_collections, 4)):
        mine = [rank % 2, rank % 2 + 2]
        assert answer["replicas"] == answer["no mp"] == answer["not divided"] == mine
        assert "pg_collection without dp_cp" in answer["context"]
        assert "pg_collection without mp" in answer["nothing"]

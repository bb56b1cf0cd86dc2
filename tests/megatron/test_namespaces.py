"""Arguments made by hand: hooks ask a namespace for nothing that Megatron-Core does not ask for at the same place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool


def arguments(folder: str) -> SimpleNamespace:
    """All that Megatron-Core reads when it saves and loads a checkpoint, and nothing else."""
    return SimpleNamespace(
        async_save=False,
        async_strategy="mcore",
        auto_detect_ckpt_format=False,
        ckpt_assume_constant_structure=False,
        ckpt_format="torch_dist",
        ckpt_fully_parallel_load=False,
        ckpt_fully_parallel_save=False,
        ckpt_load_validate_sharding_integrity=True,
        ckpt_step=None,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        data_parallel_random_init=False,
        dist_ckpt_strictness="assume_ok_unexpected",
        enable_ft_package=False,
        exit_on_missing_checkpoint=False,
        finetune=False,
        fp16=False,
        bf16=False,
        global_batch_size=4,
        load_main_params_from_ckpt=False,
        iteration=0,
        load=folder,
        log_progress=False,
        add_position_embedding=True,
        hidden_size=1,
        num_attention_heads=1,
        num_layers=1,
        vocab_file=None,
        no_load_optim=False,
        no_load_rng=False,
        no_save_optim=False,
        no_save_rng=False,
        non_persistent_ckpt_type=None,
        non_persistent_global_ckpt_dir=None,
        pretrained_checkpoint=None,
        override_ckpt_iteration=None,
        retro_add_retriever=False,
        save=folder,
        skipped_train_samples=0,
        stream_ckpt_dequant=False,
        tensor_model_parallel_size=1,
        phase_transition_iterations=None,
        pipeline_model_parallel_size=1,
        use_dist_ckpt=True,
        use_distributed_optimizer=False,
        verify_integrity=False,
    )


def save_and_load(folder: str, name: str) -> tuple[list[float], list[float], int]:
    """Losses after a checkpoint was saved and after it was loaded, by ``megatron.training`` with such arguments."""
    from megatron.core import num_microbatches_calculator
    from megatron.training import checkpointing
    from megatron.training.global_vars import set_args, unset_global_variables

    set_args(arguments(folder))
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 4, 2, 1)
    try:
        run = harness.start(Layout(), optimizer={"name": name})
        run.losses(1)
        checkpointing.save_checkpoint(1, run.chunks, run.optimizer, None, 0)
        goes_on = run.losses(1)
        again = harness.start(Layout(), optimizer={"name": name}, seed=2)
        iteration, _ = checkpointing.load_checkpoint(again.chunks, again.optimizer, None)
        again.step = 1
        return goes_on, again.losses(1), iteration
    finally:
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        unset_global_variables()


def test_saving_and_loading(pool: RankPool, tmp_path: Path) -> None:
    """With Megatron's Adam and with Muon, in a namespace that does not say which optimizer there is."""
    for name in ("adam", "muon"):
        folder = str(tmp_path / name)
        for goes_on, resumed, iteration in pool.run(save_and_load, 1, folder, name):
            assert iteration == 1 and resumed == goes_on


def small_namespaces(folder: str) -> list[Any]:
    """What hooked functions make of namespaces that have less."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.training import checkpointing
    from megatron.training.global_vars import set_args, unset_global_variables

    import megatron_muon

    megatron_muon.install()
    Layout().initialize()
    metadata = checkpointing._build_sharded_state_dict_metadata(SimpleNamespace(use_distributed_optimizer=False))
    found = [metadata["singleton_local_shards"], checkpointing._get_checkpoint_format(folder, SimpleNamespace())]
    set_args(SimpleNamespace(data_parallel_random_init=False))
    try:
        run = harness.start(Layout(layer_wise=True), param_layout=False)
    finally:
        unset_global_variables()
    config = SimpleNamespace(bf16=True, overlap_param_gather=False)
    LayerWiseDistributedOptimizer([], config, None)
    return [*found, len(run.losses(1))]


def test_namespaces_without_an_optimizer_or_a_format(pool: RankPool, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "mp_rank_00_model.pt")
    (tmp_path / "mp_rank_00").mkdir()
    assert pool.run(small_namespaces, 2, str(tmp_path))[0] == [False, "torch", 1]

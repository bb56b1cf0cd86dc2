"""Tiny real Megatron-Core models, trained on gloo ranks: what the tests of layouts, routing and checkpoints share.

Everything here runs on a rank of the pool. Weights come from one checkpoint and data from the step's number, so that
every parallel layout sees the same model and the same batches. By default runs are as people launch them: weights in
TransformerEngine's order, several buckets, their exchange under way during the passes. What is to be the same on
several ranks is compared bit for bit in every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.checkpoint.folders import path_of
from tests.megatron.layers import layer_spec as layer_spec
from tests.megatron.layers import model_class
from tests.megatron.layers import transformer_config as transformer_config
from tests.megatron.replicas import check_replicas

CHECKPOINT_METADATA = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
"""The default of ``megatron.training``."""


@dataclass(frozen=True)
class Data:
    """Noisy counting, which a small model can learn: every batch follows from the step's number.

    Attributes:
        vocabulary: number of tokens there are.
        sequence: length of a sample in tokens.
        global_batch: samples of a step on all ranks.
    """

    vocabulary: int = 64
    sequence: int = 16
    global_batch: int = 4

    def tokens(self, step: int, sample: int) -> torch.Tensor:
        """``sequence + 1`` tokens of one sample of one step."""
        generator = torch.Generator().manual_seed(1000 * step + sample)
        start = torch.randint(self.vocabulary, (1,), generator=generator)
        tokens = (start + torch.arange(self.sequence + 1) * 3) % self.vocabulary
        noise = torch.randint(self.vocabulary, tokens.shape, generator=generator)
        return torch.where(torch.rand(tokens.shape, generator=generator) < 0.1, noise, tokens)

    def micro_batches(self, step: int, first: int, count: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """``count`` micro-batches of ``size`` samples, from sample ``first`` of the step on."""
        for start in range(first, first + count * size, size):
            tokens = torch.stack([self.tokens(step, start + i) for i in range(size)])
            yield {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


COUNTING = Data()


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; data parallelism takes the rest of the ranks."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    sp: bool = False
    ddp_buffers: bool = False
    """DDP with the distributed optimizer's buffers (reduce-scatter)."""
    layer_wise: bool = False
    overlap: bool = True
    """Gradients are reduced during the backward pass, and weights that ranks own gathered during the forward pass."""
    bucket_size: int | None = 6000
    """Elements of a bucket of DDP, under ``overlap``: a bucket is closed when it has as many."""
    local: bool = False
    """Weights of Megatron-Core's own modules, with names and order of their own, not as TransformerEngine has them."""

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered during the forward pass."""
        return self.overlap and (self.layer_wise or self.ddp_buffers)

    def initialize(self, seed: int = 1) -> None:
        """Make Megatron's process groups, or keep those of this layout, and seed its random states."""
        from megatron.core import parallel_state
        from megatron.core.distributed import param_and_grad_buffer
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        sizes = {
            "tensor_model_parallel": self.tp,
            "pipeline_model_parallel": self.pp,
            "virtual_pipeline_model_parallel": self.vpp,
            "context_parallel": self.cp,
            "expert_model_parallel": self.ep,
            "expert_tensor_parallel": self.tp if self.etp is None else self.etp,
        }
        if parallel_state.model_parallel_is_initialized():
            found = {name: getattr(parallel_state, f"get_{name}_world_size")() for name in sizes}
            assert found == sizes, "one call of the pool has one layout"
        else:
            parallel_state.initialize_model_parallel(**{f"{name}_size": size for name, size in sizes.items()})
            # A DDP that accumulates in float32 sets this for its process, and ranks of the pool outlive a test.
            param_and_grad_buffer.dist_reduce_scatter_func = torch.distributed.reduce_scatter_tensor
        model_parallel_cuda_manual_seed(seed)


def build_model(
    layout: Layout,
    *,
    data: Data = COUNTING,
    bf16: bool = False,
    position: str = "rope",
    tied: bool = False,
    pattern: str | None = None,
    transfer: str = "",
    **changes: Any,
) -> list:
    """The model chunks of this rank, without DDP: a GPT, or with a layer pattern a ``HybridModel``.

    ``transfer``: the base of ``--muon-transfer``, for which initial weights are scaled.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.module import Float16Module

    config = transformer_config(layout, bf16=bf16, **changes)
    if transfer:
        from megatron_muon.transfer import scale_initialization

        scale_initialization(config, transfer)
    chunks = []
    for vp_stage in range(layout.vpp) if layout.vpp else [None]:
        chunk = model_class(config, pattern, vp_stage, layout.local)(
            config=config,
            vocab_size=data.vocabulary,
            max_sequence_length=data.sequence,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=tied,
            position_embedding_type=position,
            vp_stage=vp_stage,
        )
        chunk.model_type = "encoder_or_decoder"
        chunks.append(Float16Module(config, chunk) if bf16 else chunk)
    return chunks


def wrap(
    chunks: list, layout: Layout, *, param_layout: bool = True, groups: Any = None, ddp: dict[str, Any] | None = None
) -> list:
    """DDP around the chunks, as ``megatron.training`` does it.

    Args:
        chunks: of :func:`build_model`.
        layout: the parallel layout.
        param_layout: see :func:`start`.
        groups: the model's, if not those of parallel_state.
        ddp: changes to ``DistributedDataParallelConfig``.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.training.training import wrap_model_chunks_with_ddp

    values: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": layout.overlap,
        "overlap_param_gather": layout.gathers,
        "use_distributed_optimizer": layout.ddp_buffers,
        "bucket_size": layout.bucket_size if layout.overlap else None,
    }
    config, ddp_config = unwrap(chunks[0]).config, DistributedDataParallelConfig(**(values | (ddp or {})))
    later_stage = (groups.pp.rank() if groups else parallel_state.get_pipeline_model_parallel_rank()) > 0
    wrapped = wrap_model_chunks_with_ddp(
        chunks,
        config,
        ddp_config,
        use_layer_wise_distributed_optimizer=layout.layer_wise,
        use_layer_wise_param_layout=param_layout,
        pg_collection=groups,
        bucket_sizes=[None if number or later_stage else ddp_config.bucket_size for number in range(len(chunks))],
        disable_bucketing_per_chunk=[number > 0 for number in range(len(chunks))],
    )
    overlap(wrapped, config)
    return wrapped


def overlap(chunks: list, config: Any) -> None:
    """What the training loop gives Megatron's schedules, so that they let exchanges run."""

    def one_or_all(functions: list) -> Any:
        return functions if len(functions) > 1 else functions[0]

    if chunks[0].ddp_config.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])
        config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in chunks])
    if chunks[0].ddp_config.overlap_param_gather:
        config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in chunks])


def unwrap(chunk: Any) -> Any:
    """The bare GPTModel."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


@dataclass
class Run:
    """A model in training."""

    layout: Layout
    chunks: list
    optimizer: Any
    data: Data = COUNTING
    step: int = 0
    gradient_norms: list[float] = field(default_factory=list)
    """Of every step, before clipping."""
    replicas: bool = True
    """Whether the replicas of weights are compared in each step."""

    def losses(self, steps: int) -> list[float]:
        """Train ``steps`` steps; the mean loss of each, on every rank. All ranks have all their weights then."""
        losses = [self._one_step() for _ in range(steps)]
        self.gather()
        self._compare()
        return losses

    def gather(self) -> None:
        """Bring in the weights that other ranks have updated, as before evaluation."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook()
                chunk.enable_forward_pre_hook()

    def _compare(self) -> None:
        if self.replicas:
            check_replicas(self.chunks)

    def _one_step(self) -> float:
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        data, samples = self.data, self.data.global_batch // parallel_state.get_data_parallel_world_size()
        # Two micro-batches of what a replica has: gradients are accumulated, and both of two stages are busy.
        size = max(1, samples // 2)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
            unwrap(chunk).config.finalize_model_grads_func = finalize_model_grads
        self.optimizer.zero_grad()
        rank = parallel_state.get_data_parallel_rank()
        iterators = [data.micro_batches(self.step, rank * samples, samples // size, size) for _ in self.chunks]
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if self.layout.vpp else iterators[0],
            model=self.chunks if self.layout.vpp else self.chunks[0],
            num_microbatches=samples // size,
            seq_length=data.sequence,
            micro_batch_size=size,
            forward_only=False,
        )
        self._compare()  # the forward pass has gathered what the last step left
        success, norm, _ = self.optimizer.step()
        assert success
        self.gradient_norms.append(norm)
        self.step += 1
        return mean_over_ranks(reports)


def mean_over_ranks(reports: list[dict[str, torch.Tensor]]) -> float:
    """The global mean of the losses that the last pipeline stages report."""
    from megatron.core import parallel_state

    total = torch.zeros(2, dtype=torch.float64)
    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    if last_stage and parallel_state.get_tensor_model_parallel_rank() == 0:
        for report in reports:
            total += torch.tensor([float(report["loss"]), 1.0], dtype=torch.float64)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def forward_step(iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Callable]:
    """One forward pass in the form that Megatron's schedules call."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = next(iterator)
    batch_size, sequence = batch["tokens"].shape
    batch["position_ids"] = torch.arange(sequence).expand(batch_size, -1)
    batch["attention_mask"] = torch.ones(1, 1, sequence, sequence).tril() < 0.5
    context = parallel_state.get_context_parallel_group()
    mine = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=context)
    output = model(mine["tokens"], mine["position_ids"], mine["attention_mask"], labels=mine["labels"])

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = output.float().mean()
        # The schedules multiply by the ranks of the context, as for a loss that is summed over them.
        return mean / context.size(), {"loss": mean.detach()}

    return output, loss


def optimizer_config(layout: Layout, *, name: str = "muon", bf16: bool = False, **changes: Any) -> Any:
    """Megatron's OptimizerConfig, with exact products in Newton-Schulz."""
    from megatron.core.optimizer import OptimizerConfig

    values: dict[str, Any] = {
        "optimizer": name,
        "lr": 0.01,
        "min_lr": 0.01,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "clip_grad": 1.0,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "muon_extra_scale_factor": 0.2,
        "muon_fp32_matmul_prec": "highest",
        "use_distributed_optimizer": layout.ddp_buffers and name == "adam",
        "use_layer_wise_distributed_optimizer": layout.layer_wise,
        "overlap_param_gather": layout.gathers,
    }
    if name == "spectral_sphere" or changes.get("muon_variant") == "hyperball":
        del values["muon_extra_scale_factor"]  # refused: weights decide about the size of their updates
    values.update(changes)
    own = {key: values.pop(key) for key in list(values) if key not in _upstream_fields(OptimizerConfig)}
    config = OptimizerConfig(**values)
    for key, value in own.items():
        setattr(config, key, value)
    return config


def _upstream_fields(cls: type) -> set[str]:
    return {each.name for each in dataclasses.fields(cls)}


def start(
    layout: Layout,
    *,
    bf16: bool = False,
    optimizer: dict[str, Any] | None = None,
    weights: str | None = None,
    param_layout: bool = True,
    data: Data = COUNTING,
    seed: int = 1,
    install: bool = True,
    early: bool = False,
    overrides: dict[Any, Any] | None = None,
    ddp: dict[str, Any] | None = None,
    replicas: bool = True,
    **model: Any,
) -> Run:
    """A run ready to train.

    Args:
        layout: the parallel layout; process groups are made here.
        bf16: bfloat16 weights with fp32 main copies.
        optimizer: changes to :func:`optimizer_config`.
        weights: folder of a checkpoint of the bare model to start from.
        param_layout: whether a layer-wise run uses Megatron's parameter layout (the default path) or the older one.
        data: what to train on.
        seed: of the initial weights.
        install: whether this package's hooks are there; False for Megatron-Core as it is.
        early: whether the options of ``optimizer`` hold before DDP lays out its buffers, as from the command line.
        overrides: Megatron's ``config_overrides`` of param groups.
        ddp: changes to DDP's config.
        replicas: whether those of weights are compared in each step.
        model: changes to :func:`build_model`.
    """
    import megatron_muon

    if install:
        megatron_muon.install(routing_options(optimizer or {}) if early else None)
    layout.initialize(seed)
    if transfer := (optimizer or {}).get("muon_transfer"):
        model["transfer"] = transfer
    chunks = wrap(build_model(layout, data=data, bf16=bf16, **model), layout, param_layout=param_layout, ddp=ddp)
    if weights is not None:
        load_weights(chunks, weights)
    from megatron.core.optimizer import get_megatron_optimizer

    config = optimizer_config(layout, bf16=bf16, **(optimizer or {}))
    return Run(layout, chunks, get_megatron_optimizer(config, chunks, overrides), data, replicas=replicas)


def routing_options(optimizer: dict[str, Any]) -> Any:
    """The options that DDP's buffers depend on, from changes to the optimizer's config."""
    from megatron_muon.config import PREFIX, MuonConfig

    names = [each.name for each in dataclasses.fields(MuonConfig) if PREFIX + each.name in optimizer]
    return MuonConfig(**{name: optimizer[PREFIX + name] for name in names})


def model_state(chunks: list) -> dict[str, Any]:
    """The sharded state of all chunks."""
    if len(chunks) == 1:
        return {"model": unwrap(chunks[0]).sharded_state_dict()}
    return {f"model{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(chunks)}


def save_weights(chunks: list, folder: str) -> None:
    """Save the bare model."""
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(model_state(chunks), folder)


def load_weights(chunks: list, folder: str) -> None:
    """Load what :func:`save_weights` saved, at any layout."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(model_state(chunks), folder)
    for i, chunk in enumerate(chunks):
        load_model(chunk, loaded["model" if len(chunks) == 1 else f"model{i}"])


def load_model(chunk: Any, state: dict[str, Any]) -> None:
    """As ``megatron.training``, which lets extra states of fused layers go without a place."""
    missing, unexpected = unwrap(chunk).load_state_dict(state, strict=False)
    assert all(key.endswith("_extra_state") for key in (*missing, *unexpected)), (missing, unexpected)


def save_run(run: Run, folder: str, metadata: dict[str, Any] = CHECKPOINT_METADATA) -> None:
    """Save model and optimizer as ``megatron.training`` does with ``--ckpt-format torch_dist``."""
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        path_of(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = model_state(run.chunks)
    optimizer = run.optimizer.sharded_state_dict(state, metadata=metadata)
    dist_checkpointing.save({**state, "optimizer": optimizer, "step": run.step}, folder)


def load_run(run: Run, folder: str, metadata: dict[str, Any] = CHECKPOINT_METADATA) -> None:
    """Load what :func:`save_run` saved into a new run."""
    from megatron.core import dist_checkpointing

    state = model_state(run.chunks)
    template = run.optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load({**state, "optimizer": template}, folder)
    for i, chunk in enumerate(run.chunks):
        load_model(chunk, loaded["model" if len(run.chunks) == 1 else f"model{i}"])
    run.optimizer.load_state_dict(loaded["optimizer"])
    run.step = loaded["step"]


def save_initial_weights(folder: str, local: bool = False, **model: Any) -> None:
    """Make a model on one rank and save it: the start of runs at every layout (``local``: as the layout's)."""
    layout = Layout(local=local)
    layout.initialize()
    save_weights(build_model(layout, **model), folder)

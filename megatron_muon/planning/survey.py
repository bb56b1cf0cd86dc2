"""The plan of a training run: what its flags build, how it is routed, and what its optimizer costs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine.modes import BLOCKWISE
from megatron_muon.engine.planner import check_weight
from megatron_muon.engine.prediction import Choice
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.sphere import evaluations
from megatron_muon.planning.accounts import FLOAT32_BYTES
from megatron_muon.planning.cost import (
    RankLoad,
    active_parameters,
    attention_flops,
    choices_of_stage,
    loads_of_stage,
    refusals_of_stage,
)
from megatron_muon.planning.flags import Layout, as_config_error, parse, quiet
from megatron_muon.planning.holding import Weight
from megatron_muon.planning.model import Stage, build_stages
from megatron_muon.planning.ownership import Owners, shares_of_stage
from megatron_muon.planning.state import StateCounter
from megatron_muon.planning.steps import StepPlanner
from megatron_muon.refusals import refuse
from megatron_muon.refusals.plan import PLAN
from megatron_muon.routing import annotate, global_names
from megatron_muon.routing.layout import layout_of
from megatron_muon.routing.partition import refuse_unmatched
from megatron_muon.routing.predicate import exclusion_reason, is_expert_parallel
from megatron_muon.routing.report import Route, collect
from megatron_muon.routing.wrappers import pattern
from megatron_muon.transfer import roles


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage."""

    number: int  # of the stage, from 0
    weights: list[Weight]  # of a rank
    loads: list[RankLoad]  # of its ranks
    choices: Counter[Choice]  # how many of its matrices mode ``auto`` treats in which way
    padding: int  # elements between owners in a rank's buffers of weights, and as many in those of gradients

    @property
    def parameters(self) -> int:
        """On one rank."""
        return sum(weight.local_numel for weight in self.weights)

    @property
    def muon_parameters(self) -> int:
        """On one rank, of weights that Muon updates; their rows under the scalar rule among them."""
        return sum(weight.local_numel for weight in self.weights if weight.layout is not None)

    @property
    def fullest(self) -> RankLoad:
        """The rank with most bytes on its device."""
        return max(self.loads, key=lambda load: load.account.peak())


@dataclass(frozen=True)
class StepEstimate:
    """Operations of one training step."""

    tokens: int  # in the global batch
    active_parameters: float  # that one token meets
    model_flops: float  # forward and backward passes, of all ranks together


@dataclass(frozen=True)
class Plan:
    """Everything that the report and the JSON file show.

    Attributes:
        layout: ranks and how they divide the work.
        optimizer: its name.
        options: of Muon.
        layer_wise: whether each weight has one owner in its data-parallel group.
        routes: of every weight of the whole model, experts of all ranks included, replicas left out.
        mtp_routes: likewise of the layers for multi-token prediction, which count apart.
        stages: the pipeline stages.
        planner: has planned the steps of all ranks.
        refusals: modes of tensor parallelism in which the model cannot be updated, with the reasons.
        step: the estimate of a training step.
        left_out: settings of the command line that do not enter the plan.
        notes: what the reader should know about the numbers.
    """

    layout: Layout
    optimizer: str
    options: MuonConfig
    layer_wise: bool
    routes: list[Route]
    mtp_routes: list[Route]
    stages: list[StagePlan]
    planner: StepPlanner
    refusals: dict[str, str]
    step: StepEstimate
    left_out: list[str]
    notes: list[str]

    @property
    def total_parameters(self) -> int:
        """Trainable parameters of the whole model, without multi-token prediction."""
        return sum(route.numel for route in self.routes)

    @property
    def loads(self) -> list[RankLoad]:
        """The loads of all ranks of all stages."""
        return [load for stage in self.stages for load in stage.loads]

    @property
    def fullest(self) -> StagePlan:
        """The stage of the rank with most bytes on its device."""
        return max(self.stages, key=lambda stage: stage.fullest.account.peak())

    @property
    def choices(self) -> Counter[Choice]:
        """How many matrices of the whole model mode ``auto`` treats in which way."""
        total: Counter[Choice] = Counter()
        for stage in self.stages:
            total.update(stage.choices)
        return total


def make_plan(flags: Sequence[str], world: int | None = None, tokens: int | None = None) -> Plan:
    """Plan a training run. Nothing is allocated and no GPU is used.

    The CPU runtime (:mod:`megatron_muon.cpu`) and the plug-in must be installed.

    Args:
        flags: of the training run.
        world: number of ranks; the smallest that holds the model once by default.
        tokens: in a global batch; that of the flags by default.

    Raises:
        ConfigError: for flags that cannot be trained with.
    """
    from megatron_muon.plugin.arguments import from_arguments

    args, layout, left_out = parse(flags, world)
    refuse(PLAN, args)
    options = from_arguments(args)
    with quiet(), as_config_error():
        return _Survey(args, layout, options, left_out).plan(tokens)


class _Survey:
    """Goes through the stages and keeps the shapes of their weights."""

    def __init__(self, args: argparse.Namespace, layout: Layout, options: MuonConfig, left_out: list[str]) -> None:
        from megatron.training.training import get_megatron_ddp_config

        self.args, self.layout, self.options, self.left_out = args, layout, options, left_out
        self.routes: list[Route] = []
        self.weights: list[Weight] = []
        self.stages: list[StagePlan] = []
        optimizer = args.optimizer.removeprefix("dist_")
        passes = evaluations(options.sphere_tolerance) if optimizer == "spectral_sphere" else 1
        self.reduces_float32 = get_megatron_ddp_config(args).grad_reduce_in_fp32
        narrow = args.bf16 and not self.reduces_float32
        self.planner = StepPlanner(options, passes, torch.bfloat16 if narrow else None)
        self.state = StateCounter(optimizer, options, args.adaptive_muon_moment2_method)
        self.refusals: dict[str, str] = {}
        self.mtp_routes: list[Route] = []
        self.attention_flops = 0
        self.has_shared_embedding = False

    def plan(self, tokens: int | None) -> Plan:
        from megatron_muon.plugin.stiefel import check_stiefel, has_stiefel
        from megatron_muon.plugin.variants import check_adapters

        matched: set[str] = set()
        found_stiefel = False
        for stage in build_stages(self.args):
            for chunk in stage.chunks:
                matched |= annotate(chunk, self.options)
                found_stiefel |= has_stiefel(chunk)
                check_adapters(global_names(chunk), self.args, self.options)
                if self.options.transfer:
                    roles(chunk, global_names(chunk))
            self._add(stage)
        refuse_unmatched(self.options, matched)
        check_stiefel(self.args.optimizer, found_stiefel)
        if self.options.tp_mode in self.refusals:
            raise ConfigError(self.refusals[self.options.tp_mode])
        args = self.args
        return Plan(
            self.layout,
            args.optimizer,
            self.options,
            bool(args.use_layer_wise_distributed_optimizer),
            self.routes,
            self.mtp_routes,
            self.stages,
            self.planner,
            self.refusals,
            self._step(args.global_batch_size * args.seq_length if tokens is None else tokens),
            self.left_out,
            self._notes(),
        )

    def _add(self, stage: Stage) -> None:
        shares = shares_of_stage(stage, self.args, self.layout)
        weights = []
        for chunk in stage.chunks:
            self.attention_flops += _attention_flops(chunk, self.args.seq_length)
            for name, param in global_names(chunk):
                if param.requires_grad:
                    weight, route = self._weight(name, param, shares.owners), self._route(name, param)
                    if (each := weight.engine_weight) is not None and self.options.blockwise_period > 1:
                        check_weight(each, BLOCKWISE, self.options.blockwise_period)
                    weights.append(weight)
                    self._count(weight, route)
        self.weights += weights
        self.refusals = {**refusals_of_stage(weights, self.planner), **self.refusals}
        loads = loads_of_stage(weights, self.layout, self.options.scalar_optimizer, self.planner, shares.padding)
        choices = choices_of_stage(weights, self.layout, self.planner)
        self.stages.append(StagePlan(stage.number, weights, loads, choices, shares.between_owners))

    def _count(self, weight: Weight, route: Route) -> None:
        if not weight.replica:
            routes = self.mtp_routes if route.name.startswith("mtp.") else self.routes
            routes += [route] * weight.copies

    def _route(self, name: str, param: torch.nn.Parameter) -> Route:
        layout = self.layout
        return collect(
            [(name, param)],
            self.options,
            tp_size=layout.tensor,
            expert_tp_size=layout.expert_tensor,
            hidden_size=self.args.hidden_size,
        )[0]

    def _weight(self, name: str, param: torch.nn.Parameter, owners: dict[torch.Tensor, Owners]) -> Weight:
        routed = bool(getattr(param, "expert_tp", False))
        ranks = self.layout.expert_tensor if routed else self.layout.tensor
        dim = getattr(param, "partition_dim", -1)
        divided = bool(getattr(param, "tensor_model_parallel", False)) and ranks > 1 and dim >= 0
        muon = exclusion_reason(param) is None
        shard_dim = dim - 2 if muon else dim - param.dim()
        shape = list(param.shape)
        if divided:
            shape[shard_dim] *= ranks
        division = (ranks, shard_dim) if divided else (1, -1)
        layout = layout_of(param) if muon else None
        return Weight(
            name=pattern(name),
            shape=tuple(shape),
            layout=layout,
            shards=division[0],
            shard_dim=division[1],
            routed=routed,
            copies=self.layout.expert if routed else 1,
            by_expert_data=is_expert_parallel(param),
            element_bytes=param.element_size(),
            gradient_bytes=FLOAT32_BYTES if self.reduces_float32 else param.element_size(),
            replica=self._is_replica(param),
            owners=owners.get(param),
            state=()
            if layout is None
            else self.state.bytes(tuple(shape), layout, *division, element_bytes=param.element_size()),
        )

    def _is_replica(self, param: torch.nn.Parameter) -> bool:
        """A shared embedding is on the first stage and again where the output or multi-token prediction needs it."""
        if not getattr(param, "shared_embedding", False):
            return False
        seen, self.has_shared_embedding = self.has_shared_embedding, True
        return seen

    def _step(self, tokens: int) -> StepEstimate:
        args = self.args
        share = args.moe_router_topk / args.num_experts if args.num_experts else 1.0
        originals = [weight for weight in self.weights if not weight.replica]
        active = active_parameters(originals, share, 1 + (args.mtp_num_layers or 0))
        return StepEstimate(tokens, active, tokens * (6.0 * active + self.attention_flops))

    def _notes(self) -> list[str]:
        from megatron_muon.plugin.variants import describe

        notes = describe(self.args, self.options)
        rate = "" if self.args.lr is None else f"learning rate {self.args.lr:g}, "
        notes.insert(2, f"{rate}weight decay {self.args.weight_decay:g}")
        if self.args.use_layer_wise_distributed_optimizer and not self.args.use_layer_wise_param_layout:
            notes.append("Lists (--no-use-layer-wise-param-layout): weights under Adam are whole on one rank each.")
        if self.args.multi_latent_attention and self.layout.tensor > 1:
            notes.append(
                "Down projections of latent attention are counted as divided by tensor parallelism, as Megatron's own "
                "layers do it; TransformerEngine's hold them whole."
            )
        if self.state.optimizer == "spectral_sphere":
            notes.append(
                f"Matrices on the spectral sphere are orthogonalized {self.planner.passes} times in a step. The sums "
                "that find singular vectors and the multiplier are not counted."
            )
        elif self.state.sums and self.layout.tensor > 1:
            notes.append("Sums over whole matrices (norms, means of rows) that this variant needs are not counted.")
        return notes


def _attention_flops(chunk: torch.nn.Module, sequence: int) -> int:
    """For one token, of all softmax-attention layers of a chunk."""
    total = 0
    for module in chunk.modules():
        if hasattr(module, "core_attention"):
            config: Any = module.config
            total += attention_flops(config.num_attention_heads, *_head_dims(config), sequence)
    return total


def _head_dims(config: Any) -> tuple[int, int]:
    if getattr(config, "multi_latent_attention", False):
        return config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
    return config.kv_channels, config.kv_channels

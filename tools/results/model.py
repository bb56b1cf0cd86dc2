"""The small GPT of the experiments: Megatron-Core's own modules, in one process on the CPU."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from tools.results.corpus import VOCABULARY

HEAD = 16
"""Width of an attention head: wider models have more heads."""

EMBEDDING_STD = 1.0
"""Large against what layers add at first, so that the residual stream has the same size at every depth."""


@dataclass(frozen=True)
class Setting:
    """All that a run depends on.

    Attributes:
        width: of the residual stream, a multiple of :data:`HEAD`.
        layers: number of them.
        optimizer: Megatron's name.
        rate: peak learning rate.
        options: of Megatron's ``OptimizerConfig``, this package's knobs (``muon_...``) included.
        weight_decay: of all weights with two dimensions.
        base: the base ``WIDTHxDEPTH`` of a model whose initialization and multipliers follow the transfer rule.
        steps: number of iterations.
        warmup: share of them in which the rate rises.
        constant: whether the rate then stays, instead of falling to 0 on a line.
        seed: of the weights and the order of the data.
        batch: sequences a step.
        length: characters of a sequence.
        valid_batches: number of them in a validation.
        alarm_interval: Muon's work is measured in every so many-th step, and alarms are kept; 0: never.
    """

    width: int
    layers: int
    optimizer: str
    rate: float
    options: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.1
    base: str | None = None
    steps: int = 150
    warmup: float = 0.2
    constant: bool = False
    seed: int = 1234
    batch: int = 8
    length: int = 128
    valid_batches: int = 8
    alarm_interval: int = 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the routing table and the warnings that Megatron-Core gives of each optional package."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def start_process() -> None:
    """Make this process the only rank of a Megatron run on the CPU. Does nothing the second time."""
    if dist.is_initialized():
        return
    with quiet():
        import megatron_muon
        from megatron_muon import cpu

        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        cpu.install()
        megatron_muon.install()
        from megatron.core import parallel_state

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()


def transformer_config(setting: Setting) -> Any:
    """Megatron's config of the model: RMSNorm, rotary embeddings, SwiGLU, weights of variance 1 / fan-in.

    Under the transfer rule the base model has that initialization, and the rule makes that of the others from it.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    start = setting.width if setting.base is None else int(setting.base.partition("x")[0])
    config = TransformerConfig(
        num_layers=setting.layers,
        hidden_size=setting.width,
        num_attention_heads=setting.width // HEAD,
        kv_channels=HEAD,
        ffn_hidden_size=2 * setting.width,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=start**-0.5,
        embedding_init_method_std=EMBEDDING_STD,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        transformer_impl="local",
        gradient_accumulation_fusion=False,
    )
    if setting.base is not None:
        from megatron_muon.transfer import scale_initialization

        scale_initialization(config, setting.base)
    return config


def build_model(setting: Setting) -> Any:
    """The model of a setting within Megatron's DDP; its weights follow from the seed."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(setting.seed)
    model_parallel_cuda_manual_seed(setting.seed)
    config = transformer_config(setting)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=setting.length,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)


def build_optimizer(setting: Setting, model: Any) -> tuple[Any, Any]:
    """The optimizer from Megatron's factory, and Megatron's schedule of its learning rate."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    values: dict[str, Any] = {
        "optimizer": setting.optimizer,
        "lr": setting.rate,
        "min_lr": setting.rate if setting.constant else 0.0,
        "weight_decay": setting.weight_decay,
        "adam_beta2": 0.95,
        "clip_grad": 1.0,
        "params_dtype": torch.float32,
        "muon_momentum": 0.95,
        "muon_nesterov": True,
        "muon_fp32_matmul_prec": "highest",
        **({} if setting.base is None else {"muon_transfer": setting.base}),
        **setting.options,
        **({"muon_log_interval": setting.alarm_interval, "muon_alarm": "warn"} if setting.alarm_interval else {}),
    }
    # Knobs that Megatron's class does not have are attributes of the object.
    known = {each.name for each in fields(OptimizerConfig)}
    config = OptimizerConfig(**{name: value for name, value in values.items() if name in known})
    for name in values.keys() - known:
        setattr(config, name, values[name])
    optimizer = get_megatron_optimizer(config, [model])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=setting.rate,
        min_lr=config.min_lr,
        lr_warmup_steps=0 if setting.constant else max(1, round(setting.warmup * setting.steps)),
        lr_decay_steps=setting.steps + 1,  # the last update is not one of rate 0
        lr_decay_style="constant" if setting.constant else "linear",
        start_wd=setting.weight_decay,
        end_wd=setting.weight_decay,
        wd_incr_steps=setting.steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def forward(model: Any, batch: dict[str, torch.Tensor], *, labels: bool = True) -> torch.Tensor:
    """Losses of every character, or without ``labels`` the logits, (sequences, length, vocabulary)."""
    size, length = batch["tokens"].shape
    positions = torch.arange(length).expand(size, -1)
    mask = torch.ones(1, 1, length, length).tril() < 0.5
    return model(batch["tokens"], positions, mask, labels=batch["labels"] if labels else None)


def forward_step(iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One forward pass in the form that Megatron's schedules call."""

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = output.float().mean()
        return mean, {"loss": mean.detach()}

    return forward(model, next(iterator)), loss


class Training:
    """A model with its optimizer, step by step.

    Attributes:
        model: within DDP.
        optimizer: Megatron's.
        step: number of steps made.
        optimizer_seconds: of the optimizer's part of the last step.
        alarms: the lines of all so far.
    """

    def __init__(self, setting: Setting, data: Any) -> None:
        start_process()
        self.setting, self.data, self.step, self.optimizer_seconds = setting, data, 0, 0.0
        self.alarms: list[str] = []
        with quiet():
            self.model = build_model(setting)
            self.optimizer, self.scheduler = build_optimizer(setting, self.model)

    def advance(self) -> float:
        """One step; its loss before the step."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        setting = self.setting
        batch = self.data.batch(self.step, setting.seed, setting.batch, setting.length)
        # Before the update: the rate of step 0 would be 0.
        self.scheduler.step(increment=1)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([batch]),
            model=self.model,
            num_microbatches=1,
            seq_length=setting.length,
            micro_batch_size=setting.batch,
            forward_only=False,
        )
        begin = perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as told:
            self.optimizer.step()
        self.optimizer_seconds = perf_counter() - begin
        self.alarms += [line for line in told.getvalue().splitlines() if " ALARM " in line]
        self.step += 1
        return float(reports[0]["loss"])

    def validate(self) -> float:
        """Mean loss over the validation batches, the same for all runs of these sizes."""
        setting = self.setting
        losses = []
        self.model.eval()
        with torch.no_grad():
            for number in range(setting.valid_batches):
                batch = self.data.valid_batch(number, setting.valid_batches, setting.batch, setting.length)
                losses.append(float(forward(self.model, batch).float().mean()))
        self.model.train()
        return sum(losses) / len(losses)

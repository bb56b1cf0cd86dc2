"""The git patches for Megatron-LM, in their order: what stands alone (``fixes``), then extension points by subject."""

from __future__ import annotations

from pathlib import Path

from tools.upstream.edits import Change, Edit
from tools.upstream.fixes import ALONE, ALONE_0_18, PREDICATE

__all__ = ["RELEASES"]

_OPTIMIZER = "megatron.core.optimizer"
_LAYER_WISE = f"{_OPTIMIZER}.layer_wise_optimizer:LayerWiseDistributedOptimizer"
_TRAINING = "megatron.training.training"
_CHECKPOINTING = "megatron.training.checkpointing"
_SERIALIZATION = "megatron.core.dist_checkpointing.serialization"
_ASYNC = "megatron.core.dist_checkpointing.strategies.async_utils"

POINTS = Change(
    "Add extension points for plug-ins",
    """\
Optimizers that are developed outside of Megatron-LM replace its functions at
run time today, and break when these move. An extension point names a function
that may be replaced. Plug-ins are found by Python's entry points; only those
that the environment names are loaded:

    @extension_point
    def get_megatron_optimizer(...):

Nothing is loaded by merely being installed: without MEGATRON_CORE_PLUGINS each
function is called as ever.

See NVIDIA/Megatron-LM#2936 and NVIDIA/Megatron-LM#3174 for what optimizers ask
for.""",
    files={
        "megatron/core/extension_points.py": (Path(__file__).parent / "extension_points.py").read_text(),
    },
)

FLAGS = Change(
    "Extension points: flags and OptimizerConfig",
    """\
An optimizer from outside can add its flags, refuse what it does not go with
before anything is built, and carry its options in the OptimizerConfig, whose
fields are all that get_megatron_optimizer_config() copies.

See NVIDIA/Megatron-LM#2936.""",
    needs=(POINTS,),
    points=(
        f"{_OPTIMIZER}.optimizer_config:OptimizerConfig.__init__",
        f"{_OPTIMIZER}.optimizer_config:OptimizerConfig.__post_init__",
        "megatron.training.arguments:add_megatron_arguments",
        "megatron.training.arguments:validate_args",
        f"{_TRAINING}:get_megatron_optimizer_config",
    ),
)

OWNERSHIP = Change(
    "Extension points: which optimizer owns a weight",
    """\
Who updates a weight is asked when DDP lays out its buffers and again when
param groups are made. Fused weights (gates of SwiGLU, latent attention,
GatedDeltaNet, Mamba) need more than a tag: an optimizer that knows their parts
decides here, and its metadata must reach the fp32 copies of weights.

See NVIDIA/Megatron-LM#2885, #4091, #5400, #6326 and #6688.""",
    needs=(PREDICATE, POINTS),
    points=(
        f"{_OPTIMIZER}.emerging_optimizers:_is_nonlinear_or_embedding",
        f"{_OPTIMIZER}.layer_wise_optimizer:is_managed_by_layer_wise_optimizer",
        f"{_OPTIMIZER}.layer_wise_optimizer:tag_params_for_buffer_routing",
        f"{_OPTIMIZER}.optimizer:copy_optimizer_param_metadata",
        "megatron.core.ssm.gated_delta_net.common:_GDNBase.__init__",
    ),
)

FACTORY = Change(
    "Extension points: registry and factory of emerging optimizers",
    """\
get_emerging_optimizers() is the registry with what plug-ins add to it; the
factory can be wrapped for checks before the optimizer is built and a report
after it, muP's rates are those of the optimizer that there is, and one that
reads on the host in its step is not captured whole in a CUDA graph. One that
needs no float32 copies of 16-bit weights and gradients is wrapped otherwise,
and its gradients count in norms, clipping and zeros beside those of others.

See NVIDIA/Megatron-LM#1822 and NVIDIA/Megatron-LM#3174.""",
    needs=(OWNERSHIP,),
    points=(
        f"{_OPTIMIZER}.emerging_optimizers:get_emerging_optimizers",
        f"{_OPTIMIZER}:_get_megatron_emerging_optimizer",
        f"{_OPTIMIZER}:_get_param_groups",
        f"{_OPTIMIZER}:get_mup_config_overrides",
        f"{_OPTIMIZER}.optimizer_cuda_graph:OptimizerCudaGraphWrapper.__call__",
        f"{_OPTIMIZER}.optimizer:Float16OptimizerWithFloat16Params.__init__",
        f"{_OPTIMIZER}.optimizer:MegatronOptimizer._filter_grads_for_norm",
        f"{_OPTIMIZER}.clip_grads:clip_grad_by_total_norm_fp32",
        f"{_OPTIMIZER}.clip_grads:count_zeros_fp32",
    ),
    edits=(
        Edit(
            "megatron/core/optimizer/emerging_optimizers.py",
            """\
_EMERGING_OPTIMIZERS: Dict[str, EmergingOptimizerEntry] = {}

""",
            """\
_EMERGING_OPTIMIZERS: Dict[str, EmergingOptimizerEntry] = {}


def get_emerging_optimizers() -> Dict[str, EmergingOptimizerEntry]:
    \"\"\"The registry, with what plug-ins add to it.\"\"\"
    return _EMERGING_OPTIMIZERS

""",
        ),
        Edit(
            "megatron/core/optimizer/emerging_optimizers.py",
            "    entry = _EMERGING_OPTIMIZERS[eopt_name]\n",
            "    entry = get_emerging_optimizers()[eopt_name]\n",
        ),
        Edit(
            "megatron/core/optimizer/__init__.py",
            "    _EMERGING_OPTIMIZERS,\n    HAVE_EMERGING_OPTIMIZERS,\n",
            "    HAVE_EMERGING_OPTIMIZERS,\n    get_emerging_optimizers,\n",
        ),
        Edit(
            "megatron/core/optimizer/__init__.py",
            "    if eopt_name not in _EMERGING_OPTIMIZERS:\n",
            "    optimizers = get_emerging_optimizers()\n    if eopt_name not in optimizers:\n",
        ),
        Edit(
            "megatron/core/optimizer/__init__.py",
            "copy.deepcopy(_EMERGING_OPTIMIZERS[eopt_name].default_param_overrides)",
            "copy.deepcopy(optimizers[eopt_name].default_param_overrides)",
        ),
        Edit(
            "megatron/core/optimizer/__init__.py",
            "opt_name == eopt_name and opt_name in _EMERGING_OPTIMIZERS",
            "opt_name == eopt_name and opt_name in optimizers",
            count=2,
        ),
        Edit(
            "megatron/core/optimizer/__init__.py",
            "        # in ``_EMERGING_OPTIMIZERS`` (e.g., Lion) fall",
            "        # in the registry (e.g., Lion) fall",
        ),
    ),
)

LAYER_WISE = Change(
    "Extension points: how the layer-wise optimizer shares weights out",
    """\
The step waits for the rank with most work, which for matrix optimizers is not
the one with most elements. An optimizer that knows what a weight costs chooses
owners here, for all chunks of a virtual pipeline together; experts with other
numbers of copies than dense weights, experts with biases, and float32 models,
need it too. Models from builders are given the layout where they are wrapped.
A layer waits for all weights in it, those of modules that it reads without
calling them too. Buckets without padding are cut where owners change: they are
reduced and gathered in parts of unequal length.

See NVIDIA/Megatron-LM#2162, #5388, #5479, #6099, #6379, #6754 and #7452.""",
    needs=(FLAGS, OWNERSHIP),
    points=(
        f"{_LAYER_WISE}.__init__",
        f"{_LAYER_WISE}.compute_full_param_layout",
        f"{_LAYER_WISE}.shard_params",
        f"{_LAYER_WISE}.allgather_params",
        f"{_OPTIMIZER}.distrib_optimizer:DistributedOptimizer.compute_full_param_layout",
        f"{_TRAINING}:wrap_model_chunks_with_ddp",
        "megatron.training.models.dist_utils:_ddp_wrap",
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_param_sync",
        "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.__init__",
        "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel._make_forward_pre_hook",
    ),
)

STATE = Change(
    "Extension points: optimizer state in checkpoints",
    """\
The wrappers save optimizer state each in a form of its own, which other
layouts and other optimizers cannot read. A plug-in that has one form for all
attaches it where the optimizer is built, resolves it where a checkpoint is
loaded, and marks it in the metadata. Readers of files have each stored part
whole in memory, of which a rank may need a few rows.

See NVIDIA/Megatron-LM#2617, #2625, #3939 and #6270.""",
    needs=(FACTORY,),
    points=(
        f"{_OPTIMIZER}:get_megatron_optimizer",
        "megatron.core.models.mimo.optimizer:_iter_optimizer_sub_dicts",
        "megatron.core.models.mimo.optimizer:MimoOptimizer.sharded_state_dict",
        f"{_SERIALIZATION}:load",
        f"{_SERIALIZATION}:save",
        "megatron.core.dist_checkpointing.tensor_aware_state_dict:MCoreTensorAwareStateDict.to_state_dict",
        "megatron.core.dist_checkpointing.strategies.torch:_get_filesystem_reader",
    ),
)

FILES = Change(
    "Extension points: interrupted and damaged checkpoints",
    """\
A checkpoint that is written over keeps the index of the old one until the end;
the tracker is emptied before it is written; damage is reported without the
name of a file; a writer that is killed is waited for without end; each reader
of a load unpickles the whole index. What checks marks, finds the newest whole
checkpoint, looks after writers and reads the index once needs to stand
here.""",
    needs=(STATE,),
    points=(
        f"{_SERIALIZATION}:load_common_state_dict",
        f"{_ASYNC}:PersistentAsyncCaller.schedule_async_call",
        f"{_ASYNC}:PersistentAsyncCaller.is_current_async_call_done",
        "megatron.core.dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks",
        "megatron.core.dist_checkpointing.core:save_config",
        f"{_CHECKPOINTING}:_get_checkpoint_format",
        f"{_CHECKPOINTING}:read_metadata",
        f"{_CHECKPOINTING}:_load_non_persistent_base_checkpoint",
    ),
)

QK_CLIP = Change(
    "Extension points: QK-clip",
    """\
clip_qk() fails under tensor parallelism, with output gates, biases, MTP and
hybrid layers, makes NaN of negative maxima, and comes after parameters were
gathered. A replacement clips inside the step; TransformerEngine is asked for
maxima only where they are taken from it.

See NVIDIA/Megatron-LM#4109, #7382 and #7517.""",
    needs=(FLAGS,),
    points=(
        f"{_OPTIMIZER}.qk_clip:clip_qk",
        "megatron.core.extensions.transformer_engine:TEDotProductAttention.__init__",
    ),
)

RECORD = Change(
    "Extension points: losses and times of a run",
    """\
What records a run (losses of iterations and evaluations, the time of the
optimizer step, what an optimizer says of it) can stand around the functions
that have them.""",
    needs=(FLAGS,),
    points=(
        f"{_TRAINING}:train",
        f"{_TRAINING}:training_log",
        "megatron.training.utils.common_utils:_get_param_data",
        f"{_TRAINING}:evaluate",
        f"{_TRAINING}:evaluate_and_print_results",
        "megatron.core.timers:Timers.__call__",
    ),
)

INITIAL_WEIGHTS = Change(
    "Extension points: initial weights",
    """\
Hyperparameter transfer scales the standard deviation of initial weights to
width and depth. The config has one for hidden layers and one for the ends of
branches; the output layer shares the first, and needs one of its own.""",
    needs=(FLAGS,),
    points=(
        "megatron.training.argument_utils:core_transformer_config_from_args",
        "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
    ),
)

RELEASES = {
    "0.19.2": (
        *ALONE,
        POINTS,
        FLAGS,
        OWNERSHIP,
        FACTORY,
        LAYER_WISE,
        STATE,
        FILES,
        QK_CLIP,
        RECORD,
        INITIAL_WEIGHTS,
    ),
    # This package does not run on 0.18, so that there is nothing to extend: what stands alone.
    "0.18.2": ALONE_0_18,
}
"""The changes for each released version, in the order to apply."""

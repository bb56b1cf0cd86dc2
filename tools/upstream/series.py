"""The git patches for Megatron-LM, in their order: first what stands alone, then extension points by subject."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tools.upstream.edits import Change, Edit

__all__ = ["RELEASES"]

_OPTIMIZER = "megatron.core.optimizer"
_LAYER_WISE = f"{_OPTIMIZER}.layer_wise_optimizer:LayerWiseDistributedOptimizer"
_TRAINING = "megatron.training.training"
_CHECKPOINTING = "megatron.training.checkpointing"
_SERIALIZATION = "megatron.core.dist_checkpointing.serialization"

PREDICATE = Change(
    "Muon: one predicate for param groups and buffer ownership",
    """\
A weight that Muon should leave to the scalar optimizer can now be tagged:
param.skip_orthogonalization = True, or param.use_muon = False as in
NVIDIA/Megatron-LM#6642.

Param groups and the buffers of the layer-wise optimizer used to be decided by
two functions. Any rule that is added to one of them only puts a weight into a
buffer that its optimizer does not own. is_managed_by_layer_wise_optimizer()
now asks the predicate of the param groups.

Without tags nothing changes.""",
    edits=(
        Edit(
            "megatron/core/optimizer/emerging_optimizers.py",
            '''\
    """True for parameters that should NOT use the emerging optimizer."""
    return getattr(param, 'is_embedding_or_output_parameter', False) or len(param.shape) != 2
''',
            '''\
    """True for parameters that should NOT use the emerging optimizer.

    Besides embeddings, output layers and what is not 2D, these are the weights that a module tags
    ``skip_orthogonalization = True`` (or ``use_muon = False``), e.g. a fused projection whose rows
    make no matrix.
    """
    return (
        getattr(param, 'skip_orthogonalization', False)
        or getattr(param, 'use_muon', True) is False
        or getattr(param, 'is_embedding_or_output_parameter', False)
        or len(param.shape) != 2
    )
''',
        ),
        Edit(
            "megatron/core/optimizer/layer_wise_optimizer.py",
            """\
    Mirrors the routing rule applied by ``_get_param_groups`` /
    ``default_param_overrides`` for Muon.
    \"\"\"
    if not param.dim() == 2:
        return False
    if getattr(param, 'is_embedding_or_output_parameter', False):
        return False
    return True
""",
            """\
    Asks the predicate of ``default_param_overrides``, by which ``_get_param_groups`` routes
    parameters: the buffers and the optimizers cannot disagree.
    \"\"\"
    return not _is_nonlinear_or_embedding(param)
""",
        ),
        Edit(
            "megatron/core/optimizer/layer_wise_optimizer.py",
            "from .clip_grads import count_zeros_fp32, get_grad_norm_fp32\n",
            "from .clip_grads import count_zeros_fp32, get_grad_norm_fp32\n"
            "from .emerging_optimizers import _is_nonlinear_or_embedding\n",
        ),
    ),
)

IN_PROJ = Change(
    "GatedDeltaNet: leave in_proj to the scalar optimizer of Muon",
    """\
in_proj holds the projections q, k, v and z and the gates beta and alpha, one
row a head, in a single weight. Muon orthogonalizes it as one matrix, which
mixes them: it is no update of any of these matrices, and it differs with the
tensor-parallel size. Tag it, so that Adam updates it.

The tag takes effect with a predicate that reads skip_orthogonalization.

See NVIDIA/Megatron-LM#2885 and NVIDIA/Megatron-LM#5400.""",
    edits=(
        Edit(
            "megatron/core/ssm/gated_delta_net/common.py",
            """\
            name=(name + ".in_proj") if name is not None else None,
        )
""",
            """\
            name=(name + ".in_proj") if name is not None else None,
        )
        # Rows of several projections and of the gates: Muon must not take them for one matrix.
        setattr(self.in_proj.weight, "skip_orthogonalization", True)
""",
        ),
    ),
)

HELPERS = Change(
    "Datasets: do not compile helpers that the wheel ships",
    """\
The wheel has the compiled helpers_cpp and no Makefile, so that make fails and
compile_helpers() ends the process of rank 0: no installed wheel could train on
data sets. In a checkout everything stays as it was.""",
    fixes=("megatron.core.datasets.utils:compile_helpers",),
    edits=(
        Edit(
            "megatron/core/datasets/utils.py",
            """\
    import os
    import subprocess

    command = ["make", "-C", os.path.abspath(os.path.dirname(__file__))]
""",
            """\
    import os
    import subprocess
    from importlib.util import find_spec

    folder = os.path.abspath(os.path.dirname(__file__))
    from_wheel = not os.path.exists(os.path.join(folder, "Makefile"))
    if from_wheel and find_spec("megatron.core.datasets.helpers_cpp") is not None:
        return

    command = ["make", "-C", folder]
""",
        ),
    ),
)

HELP = Change(
    "Arguments: print help texts with per cent signs",
    """\
Help texts of generated arguments are the docstrings of config fields. argparse
takes a per cent sign in them for a format: since the "10%" of
moe_paged_stash_buffer_size_factor_cuda, --help ends in a ValueError.""",
    edits=(
        Edit(
            "megatron/training/argument_utils.py",
            """\
        argparse_kwargs["help"] = self.field_docstrings[attribute.name] \
if attribute.name in self.field_docstrings else ""
""",
            """\
        # argparse takes a per cent sign for a format.
        argparse_kwargs["help"] = self.field_docstrings.get(attribute.name, "").replace("%", "%%")
""",
        ),
    ),
)

RANK_FILES = Change(
    "Layer-wise optimizer: one state file for each rank that owns weights",
    """\
With --ckpt-format torch the caller numbers files by data-parallel rank without
context-parallel ranks, but weights are sharded over both: with context
parallelism several ranks write different state to one file, and the last one
wins. Number files by the rank in the group that weights are sharded over; the
names are the same where there is no context parallelism.

See also NVIDIA-NeMo/Megatron-Bridge#2307.""",
    fixes=(f"{_LAYER_WISE}.save_state_dict_to_file", f"{_LAYER_WISE}.load_state_dict_from_file"),
    edits=(
        Edit(
            "megatron/core/optimizer/layer_wise_optimizer.py",
            """\
    def save_state_dict_to_file(self, filename: str) -> None:
""",
            """\
    def _file_of_this_rank(self, filename: str) -> str:
        \"\"\"``filename`` with the rank in the group over which weights are sharded.\"\"\"
        root, extension = os.path.splitext(filename)
        return re.sub(r'\\d+$', str(get_pg_rank(self.dp_cp)), root) + extension

    def save_state_dict_to_file(self, filename: str) -> None:
""",
        ),
        Edit(
            "megatron/core/optimizer/layer_wise_optimizer.py",
            "        torch.save(super().state_dict(), filename)\n",
            "        torch.save(super().state_dict(), self._file_of_this_rank(filename))\n",
        ),
        Edit(
            "megatron/core/optimizer/layer_wise_optimizer.py",
            "        super().load_state_dict(torch.load(filename))\n",
            "        super().load_state_dict(torch.load(self._file_of_this_rank(filename)))\n",
        ),
        Edit(
            "megatron/core/optimizer/layer_wise_optimizer.py",
            "import math\nimport re\n",
            "import math\nimport os\nimport re\n",
        ),
    ),
)

POINTS = Change(
    "Add extension points for plug-ins",
    """\
Optimizers that are developed outside of Megatron-LM replace its functions at
run time today, and break when these move. An extension point names a function
that may be replaced, and finds plug-ins by Python's entry points:

    @extension_point
    def get_megatron_optimizer(...):

Nothing is imported for it before the first such function is called, and
without plug-ins each is called as ever.

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
after it.

See NVIDIA/Megatron-LM#1822 and NVIDIA/Megatron-LM#3174.""",
    needs=(OWNERSHIP,),
    points=(
        f"{_OPTIMIZER}.emerging_optimizers:get_emerging_optimizers",
        f"{_OPTIMIZER}:_get_megatron_emerging_optimizer",
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
numbers of copies than dense weights, and float32 models, need it too.

See NVIDIA/Megatron-LM#2162, #6099, #6379 and #7452.""",
    needs=(FLAGS, OWNERSHIP),
    points=(
        f"{_LAYER_WISE}.__init__",
        f"{_LAYER_WISE}.compute_full_param_layout",
        f"{_LAYER_WISE}._shard_params_ping_pong",
        f"{_LAYER_WISE}.shard_params",
        f"{_TRAINING}:wrap_model_chunks_with_ddp",
    ),
)

STATE = Change(
    "Extension points: optimizer state in checkpoints",
    """\
The wrappers save optimizer state each in a form of its own, which other
layouts and other optimizers cannot read. A plug-in that has one form for all
attaches it where the optimizer is built, resolves it where a checkpoint is
loaded, and marks it in the metadata.

See NVIDIA/Megatron-LM#2617, #2625, #3939 and #6270.""",
    needs=(FACTORY,),
    points=(
        f"{_OPTIMIZER}:get_megatron_optimizer",
        f"{_SERIALIZATION}:load",
        f"{_CHECKPOINTING}:_build_sharded_state_dict_metadata",
    ),
)

FILES = Change(
    "Extension points: interrupted and damaged checkpoints",
    """\
A checkpoint that is written over keeps the index of the old one until the end;
the tracker is emptied before it is written; damage is reported without the
name of a file. What checks marks and finds the newest whole checkpoint needs
to stand here.""",
    needs=(STATE,),
    points=(
        f"{_SERIALIZATION}:load_common_state_dict",
        f"{_SERIALIZATION}:save",
        f"{_CHECKPOINTING}:_get_checkpoint_format",
        f"{_CHECKPOINTING}:read_metadata",
    ),
)

QK_CLIP = Change(
    "Extension points: QK-clip",
    """\
clip_qk() fails under tensor parallelism, with output gates, biases, MTP and
hybrid layers, makes NaN of negative maxima, and comes after parameters were
gathered. A replacement clips inside the step; TransformerEngine is asked for
maxima only where they are taken from it, and the log shows them.

See NVIDIA/Megatron-LM#4109, #7382 and #7517.""",
    needs=(FLAGS,),
    points=(
        f"{_OPTIMIZER}.qk_clip:clip_qk",
        "megatron.core.extensions.transformer_engine:TEDotProductAttention.__init__",
        f"{_TRAINING}:training_log",
    ),
)

RECORD = Change(
    "Extension points: losses and times of a run",
    """\
What records a run (losses of iterations and evaluations, the time of the
optimizer step) can stand around the functions that have them.""",
    needs=(FLAGS,),
    points=(
        f"{_TRAINING}:train",
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

IN_PROJ_0_18 = dataclasses.replace(
    IN_PROJ,
    edits=tuple(dataclasses.replace(edit, path="megatron/core/ssm/gated_delta_net.py") for edit in IN_PROJ.edits),
)

RANK_FILES_0_18 = dataclasses.replace(
    RANK_FILES,
    edits=(
        *RANK_FILES.edits[:-1],
        Edit(RANK_FILES.edits[-1].path, "import math\n", "import math\nimport os\nimport re\n"),
    ),
)

RELEASES = {
    "0.19.2": (
        PREDICATE,
        IN_PROJ,
        HELPERS,
        HELP,
        RANK_FILES,
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
    "0.18.2": (PREDICATE, IN_PROJ_0_18, HELPERS, HELP, RANK_FILES_0_18),
}
"""The changes for each released version, in the order to apply."""

"""Changes to Megatron-LM that stand alone: small fixes, which need no plug-in."""

from __future__ import annotations

import dataclasses

from tools.upstream.edits import Change, Edit, unit_test
from tools.upstream.fixes_layer_wise import BUCKETS, NORM, RANK_FILES, RANK_FILES_0_18, ZEROS

__all__ = ["ALONE", "ALONE_0_18", "PREDICATE"]

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
    files=unit_test("optimizer/test_scalar_optimizer_tags.py"),
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
    files=unit_test("ssm/test_gated_delta_net_tags.py"),
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
    files=unit_test("data/test_compile_helpers.py"),
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
moe_paged_stash_buffer_size_factor_cuda, --help ends in a ValueError.

NVIDIA/Megatron-LM#6211 mends that one text; this mends all that will come.""",
    files=unit_test("training/test_argument_help.py"),
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

IN_PROJ_0_18 = dataclasses.replace(
    IN_PROJ,
    files={},  # the test is of a base class that this version does not have
    edits=tuple(dataclasses.replace(edit, path="megatron/core/ssm/gated_delta_net.py") for edit in IN_PROJ.edits),
)

STRIDES = Change(
    "Checkpoints: read tensors' metadata of torch 2.15",
    """\
torch 2.15 stores strides among the properties of a tensor, which torch.empty()
does not take. load_tensors_metadata() gave it all of them, so that every
--dist-ckpt-strictness but the default ended in a TypeError, as did
load_plain_tensors(). The type is what is needed.

The field came with pytorch/pytorch#192248.""",
    files=unit_test("dist_checkpointing/test_tensors_metadata.py"),
    edits=(
        Edit(
            "megatron/core/dist_checkpointing/strategies/torch.py",
            "torch.empty(tp.size, **tp.properties.__dict__, device='meta')",
            "torch.empty(tp.size, dtype=tp.properties.dtype, device='meta')",
        ),
    ),
)

LAYERNORM = Change(
    "Recompute layernorm without TransformerEngine",
    """\
CheckpointWithoutOutput handles FP8 unless it is told fp8=None, and its default
is False. Without TransformerEngine there is no FP8 and nothing to handle it:
--recompute-modules layernorm ended in a NameError in the first forward pass.
With TransformerEngine everything stays as it was.""",
    files=unit_test("tensor_parallel/test_checkpoint_without_output.py"),
    edits=(
        Edit(
            "megatron/core/tensor_parallel/random.py",
            "        self.fp8 = fp8 is not None\n",
            "        self.fp8 = HAVE_TE and fp8 is not None\n",
        ),
    ),
)

ALONE = (PREDICATE, IN_PROJ, HELPERS, HELP, RANK_FILES, BUCKETS, ZEROS, NORM, STRIDES, LAYERNORM)
"""For 0.19.2, in the order to apply; each applies by itself, too."""

ALONE_0_18 = (PREDICATE, IN_PROJ_0_18, HELPERS, HELP, RANK_FILES_0_18)

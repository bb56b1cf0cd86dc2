"""Three proposals to upstream, in place of hooks on private functions. Each is a patch by itself, for the release."""

from __future__ import annotations

from megatron_muon.plugin import config_fields
from tools.upstream.edits import Change, Edit, after, before, new_file, unit_test
from tools.upstream.proposed_state import STATE

__all__ = ["PROPOSALS"]

_FACTORY = "megatron/core/optimizer/__init__.py"
_EMERGING = "megatron/core/optimizer/emerging_optimizers.py"
_LAYER_WISE = "megatron/core/optimizer/layer_wise_optimizer.py"
_OPTIMIZER = "megatron/core/optimizer/optimizer.py"


REGISTER = Change(
    "Proposal: register an emerging optimizer from another package",
    """\
register_emerging_optimizer() is a public way into the registry. An entry also
says which flags and options the optimizer has (OptimizerConfig carries them in
one field), what is to be done before param groups are made, and what becomes of
the optimizer when it is built. Nothing changes for those that are there.

See NVIDIA/Megatron-LM#2936 and NVIDIA/Megatron-LM#3174.""",
    fixes=(
        *(patch.target for patch in config_fields.PATCHES),
        "megatron.training.arguments:add_megatron_arguments",
        "megatron.training.training:get_megatron_optimizer_config",
        "megatron.core.optimizer.emerging_optimizers:_EMERGING_OPTIMIZERS",
        "megatron.core.optimizer:_get_megatron_emerging_optimizer",
    ),
    files=unit_test("optimizer/test_register_emerging_optimizer.py"),
    edits=(
        Edit(
            _EMERGING,
            """\
            (e.g. route non-linear params to Adam).
    \"\"\"

    optimizer_cls: type
""",
            """\
            (e.g. route non-linear params to Adam).
        add_arguments: ``(parser) -> None`` adds its flags to the command line.
        options_from_args: ``(args) -> dict`` makes ``OptimizerConfig.optimizer_options`` of them.
        prepare: ``(config, model_chunks, pg_collection) -> None``, called before param groups are
            made: to check, and to tag parameters.
        finish: ``(optimizer, config, model_chunks, pg_collection) -> MegatronOptimizer``, called
            with what was built; what it returns takes its place.
    \"\"\"

    optimizer_cls: type
""",
        ),
        Edit(
            _EMERGING,
            """\
        default_factory=_default_param_overrides_factory
    )


def _create_emerging_optimizer(""",
            """\
        default_factory=_default_param_overrides_factory
    )
    add_arguments: Callable | None = None
    options_from_args: Callable | None = None
    prepare: Callable | None = None
    finish: Callable | None = None


def register_emerging_optimizer(
    name: str, entry: EmergingOptimizerEntry, *, replace: bool = False
) -> None:
    \"\"\"Make ``--optimizer name`` build the optimizer of ``entry``.

    Call it before arguments are parsed and configs are made.

    Args:
        name: as in ``OptimizerConfig.optimizer``.
        entry: everything about it.
        replace: whether it may take the place of an entry of the same name.

    Raises:
        ValueError: if the name is taken, or cannot be one of an emerging optimizer.
    \"\"\"
    if name in ('adam', 'sgd') or name.startswith('dist_'):
        raise ValueError(f"'{name}' cannot be the name of an emerging optimizer.")
    if name in _EMERGING_OPTIMIZERS and not replace:
        raise ValueError(f"The emerging optimizer '{name}' is registered already.")
    _EMERGING_OPTIMIZERS[name] = entry


def get_emerging_optimizers() -> Dict[str, EmergingOptimizerEntry]:
    \"\"\"The entries of all emerging optimizers, by name.\"\"\"
    return dict(_EMERGING_OPTIMIZERS)


def _create_emerging_optimizer(""",
        ),
        Edit(
            _EMERGING,
            """\
  3. Add an ``EmergingOptimizerEntry`` to ``_EMERGING_OPTIMIZERS`` at the bottom.
""",
            """\
  3. Add an ``EmergingOptimizerEntry`` to ``_EMERGING_OPTIMIZERS`` at the bottom; from another
     package, call ``register_emerging_optimizer()``.
""",
        ),
        after(
            "megatron/core/optimizer/optimizer_config.py",
            '    """If true, enables CUDA graph for optimizer step."""\n',
            "\n"
            "    optimizer_options: dict = field(default_factory=dict)\n"
            '    """Options of a registered emerging optimizer, by names of its own."""\n',
        ),
        Edit(
            _FACTORY,
            "    _EMERGING_OPTIMIZERS,\n    HAVE_EMERGING_OPTIMIZERS,\n    _create_emerging_optimizer,\n"
            "    _get_qkv_split_shapes,\n",
            "    HAVE_EMERGING_OPTIMIZERS,\n    EmergingOptimizerEntry,\n    _create_emerging_optimizer,\n"
            "    _get_qkv_split_shapes,\n    get_emerging_optimizers,\n    register_emerging_optimizer,\n",
        ),
        Edit(
            _FACTORY,
            "    if not HAVE_EMERGING_OPTIMIZERS:\n        raise ImportError(\n",
            "    registered = get_emerging_optimizers()\n"
            "    if eopt_name not in registered and not HAVE_EMERGING_OPTIMIZERS:\n"
            "        raise ImportError(\n",
        ),
        Edit(_FACTORY, "    if eopt_name not in _EMERGING_OPTIMIZERS:\n", "    if eopt_name not in registered:\n"),
        before(
            _FACTORY,
            "    # Tag parameters with optimizer-specific attributes (expert_tp, is_qkv).\n",
            """\
    entry = registered[eopt_name]
    if entry.prepare is not None:
        entry.prepare(config, model_chunks, pg_collection)

""",
        ),
        Edit(
            _FACTORY,
            "copy.deepcopy(_EMERGING_OPTIMIZERS[eopt_name].default_param_overrides)",
            "copy.deepcopy(entry.default_param_overrides)",
        ),
        Edit(
            _FACTORY,
            "opt_name == eopt_name and opt_name in _EMERGING_OPTIMIZERS",
            "opt_name == eopt_name and opt_name in registered",
            count=2,
        ),
        Edit(
            _FACTORY,
            "        # in ``_EMERGING_OPTIMIZERS`` (e.g., Lion) fall",
            "        # among the registered (e.g., Lion) fall",
        ),
        Edit(
            _FACTORY,
            """\
        if results:
            return ChainedOptimizer([layer_wise_optimizer] + results)
        return layer_wise_optimizer

    return ChainedOptimizer(results)
""",
            """\
        made = layer_wise_optimizer
        if results:
            made = ChainedOptimizer([layer_wise_optimizer] + results)
    else:
        made = ChainedOptimizer(results)
    if entry.finish is not None:
        made = entry.finish(made, config, model_chunks, pg_collection)
    return made
""",
        ),
        Edit(
            "megatron/training/arguments.py",
            "choices=['adam', 'sgd', 'muon', 'dist_muon', 'lion', 'soap', 'adaptive_muon'],",
            "choices=_optimizer_names(),",
        ),
        Edit(
            "megatron/training/arguments.py",
            "    parser = _add_fault_injector_args(parser)\n\n    return parser\n",
            """\
    parser = _add_fault_injector_args(parser)

    for entry in get_emerging_optimizers().values():
        if entry.add_arguments is not None:
            entry.add_arguments(parser)

    return parser


def _optimizer_names():
    \"\"\"What --optimizer takes: also what other packages have registered.\"\"\"
    ours = ['adam', 'sgd', 'muon', 'dist_muon', 'lion', 'soap', 'adaptive_muon']
    others = [name for name, entry in get_emerging_optimizers().items() if entry.add_arguments]
    return list(dict.fromkeys([*ours, *others]))

""",
        ),
        before(
            "megatron/training/arguments.py",
            "def add_megatron_arguments(",
            "from megatron.core.optimizer import get_emerging_optimizers\n\n",
        ),
        before("megatron/training/training.py", "    get_megatron_optimizer,\n", "    get_emerging_optimizers,\n"),
        Edit(
            "megatron/training/training.py",
            "            kwargs[f.name] = getattr(args, f.name)\n    config = OptimizerConfig(**kwargs)\n",
            "            kwargs[f.name] = getattr(args, f.name)\n"
            "    entry = get_emerging_optimizers().get(args.optimizer)\n"
            "    if entry is not None and entry.options_from_args is not None:\n"
            "        kwargs['optimizer_options'] = entry.options_from_args(args)\n"
            "    config = OptimizerConfig(**kwargs)\n",
        ),
    ),
)

ROUTE = Change(
    "Proposal: one route attribute, read by one predicate",
    """\
Which optimizer updates a parameter was decided by two functions with the same
rule, which nobody could change in one place. param.optimizer_route says it,
is_matrix_param() reads it for param groups, buffers and muP alike, and float32
copies keep it. Routers of other packages set routes before DDP lays out its
buffers. Without routes nothing changes.

See NVIDIA/Megatron-LM#2885, #4091, #5400, #6326 and #6688.""",
    fixes=(
        "megatron.core.optimizer.emerging_optimizers:_is_nonlinear_or_embedding",
        "megatron.core.optimizer.layer_wise_optimizer:is_managed_by_layer_wise_optimizer",
        "megatron.core.optimizer.layer_wise_optimizer:tag_params_for_buffer_routing",
        "megatron.core.optimizer.optimizer:copy_optimizer_param_metadata",
        "megatron.core.ssm.gated_delta_net.common:_GDNBase.__init__",
    ),
    files={**new_file("param_route.py"), **unit_test("optimizer/test_param_route.py")},
    edits=(
        Edit(
            _EMERGING,
            "    return getattr(param, 'is_embedding_or_output_parameter', False) or len(param.shape) != 2\n",
            "    return not is_matrix_param(param)\n",
        ),
        after(
            _EMERGING,
            "from .optimizer_config import ParamKey, ParamPredicate\n",
            "from .param_route import is_matrix_param\n",
        ),
        Edit(
            _LAYER_WISE,
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
    Asks the predicate of ``default_param_overrides``, by which ``_get_param_groups`` routes.
    \"\"\"
    return is_matrix_param(param)
""",
        ),
        after(_LAYER_WISE, "    pad_to_divisor,\n)\n", "from .param_route import is_matrix_param, route_params\n"),
        after(
            _LAYER_WISE,
            "    decide which buffer each param lands in (LayerWise shard-aligned buffer vs\n"
            "    DistOpt-style byte-level buffer).\n"
            '    """\n',
            "    route_params(model_chunks)\n",
        ),
        after(
            _OPTIMIZER,
            "        setattr(destination, GRAD_NORM_GROUP_ATTR, getattr(source, GRAD_NORM_GROUP_ATTR))\n",
            "    for attr in (ROUTE_ATTR, METADATA_ATTR):\n        if hasattr(source, attr):\n"
            "            setattr(destination, attr, getattr(source, attr))\n",
        ),
        Edit(
            _OPTIMIZER,
            "from .optimizer_config import OptimizerConfig\n\nlogger",
            "from .optimizer_config import OptimizerConfig\n"
            "from .param_route import METADATA_ATTR, ROUTE_ATTR\n\nlogger",
        ),
        before(
            _FACTORY,
            "    # Tag parameters with optimizer-specific attributes (expert_tp, is_qkv).\n",
            "    route_params(model_chunks)\n\n",
        ),
        after(_FACTORY, "    SGDOptimizerConfig,\n)\n", "from .param_route import route_params\n"),
    ),
)

PROPOSALS = (REGISTER, ROUTE, STATE)

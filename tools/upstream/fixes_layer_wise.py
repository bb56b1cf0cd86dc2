"""Changes to Megatron-LM that stand alone: fixes of layer-wise runs."""

from __future__ import annotations

import dataclasses

from tools.upstream.edits import Change, Edit, unit_test

__all__ = ["BUCKETS", "NORM", "RANK_FILES", "RANK_FILES_0_18", "ZEROS"]

_LAYER_WISE = "megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer"

RANK_FILES = Change(
    "Layer-wise optimizer: one state file for each rank that owns weights",
    """\
With --ckpt-format torch the caller numbers files by data-parallel rank without
context-parallel ranks, but weights are sharded over both: with context
parallelism several ranks write different state to one file, and the last one
wins. Number files by the rank in the group that weights are sharded over; the
names are the same where there is no context parallelism.

NVIDIA-NeMo/Megatron-Bridge#2307 is about the same files, and another fault.""",
    fixes=(f"{_LAYER_WISE}.save_state_dict_to_file", f"{_LAYER_WISE}.load_state_dict_from_file"),
    files=unit_test("optimizer/test_layer_wise_state_files.py"),
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

RANK_FILES_0_18 = dataclasses.replace(
    RANK_FILES,
    files={},  # the test sets attributes that this version does not have
    edits=(
        *(
            dataclasses.replace(each, new=each.new.replace("self.dp_cp", "self.pg_collection.dp_cp"))
            for each in RANK_FILES.edits[:-1]
        ),
        Edit(RANK_FILES.edits[-1].path, "import math\n", "import math\nimport os\nimport re\n"),
    ),
)

BUCKETS = Change(
    "DDP: bucket groups of one optimizer each",
    """\
A bucket group is gathered after the step of the optimizer that has its first
bucket. For later chunks of a virtual pipeline, and with fp8 weights, buckets of
the layer-wise optimizer and of Adam's distributed optimizer came into one
group: with one of Muon's first, Adam's weights were gathered before Adam had
stepped, and replicas kept the old ones.

NVIDIA/Megatron-LM#6754 does so on main.""",
    fixes=("megatron.core.distributed.param_and_grad_buffer:partition_buckets",),
    files=unit_test("distributed/test_bucket_group_owners.py"),
    edits=(
        Edit(
            "megatron/core/distributed/param_and_grad_buffer.py",
            """\
def partition_buckets(
""",
            """\
def _split_by_optimizer(buckets: List[_ParamAndGradBucket]) -> List[List[_ParamAndGradBucket]]:
    \"\"\"The buckets of the layer-wise optimizer and those of others, apart.\"\"\"
    by_optimizer: Dict[bool, List[_ParamAndGradBucket]] = {}
    for bucket in buckets:
        is_layer_wise = any(
            getattr(param, 'is_managed_by_layer_wise_optimizer', False)
            for param in bucket.params_list[:1]
        )
        by_optimizer.setdefault(is_layer_wise, []).append(bucket)
    return list(by_optimizer.values())


def partition_buckets(
""",
        ),
        Edit(
            "megatron/core/distributed/param_and_grad_buffer.py",
            """\
    1. If force_single_bucket_group is True, put all buckets across all buffers into a single
       bucket group.
""",
            """\
    0. No group has buckets of two optimizers: it is gathered after the step of one of them.
    1. If force_single_bucket_group is True, put all buckets across all buffers into a single
       bucket group.
""",
        ),
        Edit(
            "megatron/core/distributed/param_and_grad_buffer.py",
            """\
        bucket_group = _ParamAndGradBucketGroup(
            buckets, ddp_config, data_parallel_group, data_parallel_world_size
        )
        return [bucket_group]
""",
            """\
        return [
            _ParamAndGradBucketGroup(
                group_buckets, ddp_config, data_parallel_group, data_parallel_world_size
            )
            for group_buckets in _split_by_optimizer(buckets)
        ]
""",
        ),
        Edit(
            "megatron/core/distributed/param_and_grad_buffer.py",
            """\
                group_buckets = [bucket]
            bucket_groups.append(
                _ParamAndGradBucketGroup(
                    group_buckets,
                    buffer.ddp_config,
                    buffer.data_parallel_group,
                    buffer.data_parallel_world_size,
                )
            )
        return bucket_groups
""",
            """\
                group_buckets = [bucket]
            for one_optimizers_buckets in _split_by_optimizer(group_buckets):
                bucket_groups.append(
                    _ParamAndGradBucketGroup(
                        one_optimizers_buckets,
                        buffer.ddp_config,
                        buffer.data_parallel_group,
                        buffer.data_parallel_world_size,
                    )
                )
        return bucket_groups
""",
        ),
    ),
)

ZEROS = Change(
    "Layer-wise optimizer: count zeros of experts on all tensor-parallel ranks",
    """\
count_zeros() told count_zeros_fp32() no tensor-parallel groups. With an expert
tensor-parallel size of 1, tensor-parallel ranks have experts of their own, or
own other ones: those that are not on the first rank were taken for copies, and
their zeros did not count. The other optimizers give both groups.""",
    files=unit_test("optimizer/test_layer_wise_count_zeros.py"),
    edits=(
        Edit(
            "megatron/core/optimizer/layer_wise_optimizer.py",
            """\
            grad_stats_parallel_group=None,
            use_decoupled_grad=self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
        )
""",
            """\
            grad_stats_parallel_group=None,
            use_decoupled_grad=self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            tp_group=getattr(self.pg_collection, 'tp', None),
            expert_tp_group=getattr(self.pg_collection, 'expt_tp', None),
        )
""",
        ),
    ),
)

NORM = Change(
    "Layer-wise optimizer: norm of parameters from owners' main weights",
    """\
Only the owner of a 16-bit weight has its main weight. On other ranks the norm
took the 16-bit weight, which with --overlap-param-gather is gathered in the
next forward pass: ranks logged different norms, of old weights in part. Mark
these weights as the distributed optimizer does, so that the norm is a sum over
owners. Those that do not own a weight get no main_param: what clips weights
asks for the attribute.

NVIDIA/Megatron-LM#7132 proposes the same.
Closes NVIDIA/Megatron-LM#7131.""",
    files=unit_test("optimizer/test_layer_wise_params_norm.py"),
    edits=(
        Edit(
            "megatron/core/optimizer/layer_wise_optimizer.py",
            """\
        self.shard_params(optimizers, full_param_layouts)
""",
            """\
        if get_pg_size(self.dp_cp) > 1:
            # Owners alone have a main param: norms of parameters are summed over ranks.
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    for param in group['params']:
                        if param.dtype != torch.float32:
                            param.main_param_sharded = True
        self.shard_params(optimizers, full_param_layouts)
""",
        ),
        Edit(
            "megatron/training/utils/common_utils.py",
            """\
        if not force_create_fp32_copy and hasattr(param, 'main_param'):
            if getattr(param, 'main_param_sharded', False):
                if param.main_param is not None:
                    return param.main_param, True
                return None, True
            return param.main_param, False
""",
            """\
        if not force_create_fp32_copy:
            if getattr(param, 'main_param_sharded', False):
                return getattr(param, 'main_param', None), True
            if hasattr(param, 'main_param'):
                return param.main_param, False
""",
        ),
    ),
)

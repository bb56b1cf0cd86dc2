"""megatron_muon.cpu: install and uninstall in any order of imports, arguments, optimizers and collectives."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import cpu
from megatron_muon.cpu import messages
from megatron_muon.cpu.optimizers import GroupStepAdamW
from megatron_muon.cpu.training import change_arguments
from megatron_muon.errors import ConfigError
from megatron_muon.refusals import refuse
from megatron_muon.refusals.cpu import CPU, IN_CONFIG
from tests.pool import RankPool

SNAPSHOT = """
    import sys, types, warnings
    warnings.simplefilter("ignore")
    import torch
    from torch.utils.data import dataloader
    watched = {"torch", "torch.cuda", "torch.cuda.random", "torch.nn", "torch.distributed", dataloader.__name__}
    def snapshot():
        # identities of everything that a redirect may touch, copies in other modules included
        found = {}
        for name, module in list(sys.modules.items()):
            if name in watched or name.startswith(("megatron", "torch.distributed.")):
                for attribute, value in list(vars(module).items()):
                    found[name, attribute] = value
                    if isinstance(value, type) and value.__module__.startswith(("megatron", "torch")):
                        for member, inner in list(vars(value).items()):
                            if not isinstance(inner, (dict, types.GetSetDescriptorType)):
                                found[name, attribute, member] = inner
        return found
    def differences(before, after):
        return sorted(".".join(key) for key in before if key in after and before[key] is not after[key])
    def import_megatron():
        import megatron.core.models.gpt, megatron.core.optimizer, megatron.core.ssm.gated_delta_net
        import megatron.core.transformer.moe.moe_layer, megatron.training
        from megatron.core.models.gpt import experimental_attention_variant_module_specs
    from megatron_muon import cpu
"""


def run(code: str) -> str:
    """Run ``code`` in a new interpreter; its output."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SNAPSHOT) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_uninstall_restores_everything() -> None:
    """Installed after the imports: every attribute that changed is the original again."""
    run(
        """
        import_megatron()
        before = snapshot()
        cpu.install()
        changed = differences(before, snapshot())
        cpu.install()  # a second call changes nothing
        assert differences(before, snapshot()) == changed
        expected = {
            "torch.empty", "torch.cuda.current_device", "torch.distributed.all_gather", "megatron.core.optimizer.Adam",
            "megatron.training.training.initialize_megatron",  # a copy of megatron.training.initialize's
            "megatron.core.fusions.fused_bias_swiglu.swiglu",  # was compiled when it was imported
            "megatron.core.transformer.dot_product_attention.DotProductAttention.forward",
        }
        assert expected <= set(changed), expected - set(changed)
        cpu.uninstall()
        assert not cpu.is_installed()
        assert differences(before, snapshot()) == []
        with cpu.enabled():
            assert differences(before, snapshot()) == changed
        assert differences(before, snapshot()) == []
        """
    )
    assert all(reason for _, reason in cpu.describe())


def test_order_of_imports_does_not_matter() -> None:
    """Installed before Megatron is imported: the same places hold replacements, and uninstall leaves none of them."""
    run(
        """
        def ours(found):
            def is_ours(value):
                if isinstance(value, types.FunctionType):  # wrappers carry the name and module of what they wrap
                    return "megatron_muon/cpu/" in value.__code__.co_filename
                where = str(getattr(value, "__module__", ""))
                return where.startswith("megatron_muon.cpu")
            return {key: getattr(value, "__qualname__", type(value)) for key, value in found.items()
                    if not key[0].startswith("megatron_muon") and is_ours(value)}
        cpu.install()
        with torch.device("meta"):  # the first one in the process
            assert torch.empty(1).is_meta
        import_megatron()
        early = ours(snapshot())
        cpu.uninstall()
        assert ours(snapshot()) == {}
        cpu.install()
        late = ours(snapshot())
        assert len(late) > 100
        assert late == early, set(late.items()) ^ set(early.items())
        """
    )


def test_refused_while_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        was_installed = cpu.is_installed()
        cpu.uninstall()
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(RuntimeError, match="already initialized"):
            cpu.install()
        assert not cpu.is_installed()
    if was_installed:
        cpu.install()


def test_devices_mean_the_cpu() -> None:
    with cpu.enabled():
        tensors = [
            torch.zeros(2, device="cuda"),
            torch.empty(2, device=torch.device("cuda", 3), pin_memory=True),
            torch.tensor([1.0], device=0),
            torch.ones(1).cuda(),
            torch.ones(1).to("cuda:1", torch.float64),
            torch.ones(1).to(device=torch.device("cuda")),
            torch.ones(1).new_zeros(2, device=torch.cuda.current_device()),
            torch.nn.Linear(2, 2).cuda().weight,
            torch.nn.Linear(2, 2, device="cuda").to("cuda").weight,
            torch.ones(1).pin_memory(),
        ]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert torch.zeros(1, device="meta").device.type == "meta"
        assert torch.ones(1).type() == "torch.FloatTensor", "only Megatron-Core hears of CUDA tensors"
        assert torch.ones(1).type(torch.int32).dtype == torch.int32
        event = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(torch.cuda.Stream()):
            event.record()
        later = torch.cuda.current_stream().record_event()
        assert event.elapsed_time(later) >= 0.0 and later.query()
        assert torch.cuda.device_count() >= 1 and not torch.cuda.is_available()


def megatron_arguments(**changes: Any) -> SimpleNamespace:
    defaults = {
        "rank": 0,
        "distributed_backend": "nccl",
        "transformer_impl": "transformer_engine",
        "gradient_accumulation_fusion": True,
        "masked_softmax_fusion": True,
        "apply_rope_fusion": True,
        "bias_swiglu_fusion": True,
        "bf16": True,
        "cuda_graph_impl": "none",
        "attention_backend": SimpleNamespace(name="auto"),
        "context_parallel_size": 1,
    }
    return SimpleNamespace(**(defaults | changes))


def test_arguments_are_changed_and_reported() -> None:
    args = megatron_arguments()
    lines = change_arguments(args)
    assert args.distributed_backend == "gloo" and args.transformer_impl == "local"
    assert not args.gradient_accumulation_fusion and not args.masked_softmax_fusion and not args.apply_rope_fusion
    assert args.bias_swiglu_fusion and args.bf16, "what works stays as it is"
    assert len(lines) == 5 and lines[0].startswith("distributed_backend: nccl -> gloo")
    assert change_arguments(args) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fp8": "hybrid"}, "--fp8-format hybrid on the CPU: .*--bf16"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        ({"attention_backend": SimpleNamespace(name="flash")}, "--attention-backend"),
        ({"use_megatron_fsdp": True}, "--use-distributed-optimizer"),
        ({"moe_token_dispatcher_type": "flex"}, "alltoall"),
        ({"transformer_impl": "inference_optimized"}, "--transformer-impl"),
    ],
)
def test_arguments_that_cannot_be_honoured(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        change_arguments(megatron_arguments(**change))


def settings_in_yaml() -> list[str]:
    """What is said of them where Megatron-Core checks them, and where it makes the optimizer's config of them."""
    import megatron_muon

    megatron_muon.install()
    from megatron.training import training, yaml_arguments

    args = SimpleNamespace(yaml_cfg="run.yaml", optimizer="muon")
    messages = []
    for function in (yaml_arguments.validate_yaml, training.get_megatron_optimizer_config):
        with pytest.raises(ConfigError) as caught:
            function(args)
        messages.append(str(caught.value))
    return messages


def test_settings_in_yaml(pool: RankPool) -> None:
    on_cpu, with_muon = pool.run(settings_in_yaml, 1)[0]
    assert on_cpu.startswith("--yaml-cfg run.yaml on the CPU: ") and on_cpu.endswith("; give flags.")
    assert with_muon.startswith("--yaml-cfg run.yaml with --optimizer muon: ") and with_muon.endswith("; give flags.")


def test_configs_made_in_code() -> None:
    class TransformerConfig(SimpleNamespace):
        pass

    refuse(
        (*CPU, *IN_CONFIG), TransformerConfig(transformer_impl="transformer_engine", gradient_accumulation_fusion=False)
    )
    with pytest.raises(
        ConfigError, match=r"TransformerConfig\.gradient.* on the CPU: .*gradient_accumulation_fusion=False"
    ):
        refuse((*CPU, *IN_CONFIG), TransformerConfig(gradient_accumulation_fusion=True))
    with pytest.raises(ConfigError, match="--fp8"):
        refuse((*CPU, *IN_CONFIG), TransformerConfig(fp8="e4m3"))


def test_a_config_made_in_code_says_nothing_of_cuda_graphs() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        messages.hide()
        try:
            TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        finally:
            messages.show()


def test_scalar_optimizer_is_torch_where_transformer_engine_is_installed() -> None:
    """Megatron-Core holds fused kernels, as it does where TransformerEngine or Apex can be imported."""
    output = run(
        """
        import megatron.core.optimizer as factory
        from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
        def needs_gpu(*args, **kwargs):
            raise RuntimeError("needs a GPU")
        class FusedAdam(torch.optim.Optimizer):
            __init__ = needs_gpu
        class FusedSGD(FusedAdam):
            pass
        factory.Adam = distrib_optimizer.Adam = FusedAdam
        factory.SGD = FusedSGD
        for module, name in ((optimizer, "multi_tensor_applier"), (optimizer, "multi_tensor_scale_impl"),
                             (clip_grads, "multi_tensor_applier"), (clip_grads, "multi_tensor_scale_impl"),
                             (clip_grads, "l2_norm_impl"), (clip_grads, "multi_tensor_scale_tensor_impl")):
            setattr(module, name, needs_gpu)
        with cpu.enabled():
            print(factory.Adam.__name__, distrib_optimizer.Adam.__name__, factory.SGD.__module__)
            assert needs_gpu not in [*vars(clip_grads).values(), *vars(optimizer).values()]
        assert factory.Adam is FusedAdam and factory.SGD is FusedSGD and clip_grads.l2_norm_impl is needs_gpu
        """
    )
    assert output.split() == ["GroupStepAdamW", "GroupStepAdamW", "torch.optim.sgd"]


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_group_step_adamw_has_torchs_arithmetic(adam_w_mode: bool) -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    mine = GroupStepAdamW([{"params": ours}, {"params": []}], adam_w_mode=adam_w_mode, capturable=False, **options)
    reference = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(theirs, **options)
    for step in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        if step == 2:  # a round trip through a checkpoint
            saved = mine.state_dict()
            mine = GroupStepAdamW([{"params": ours}, {"params": []}], adam_w_mode=adam_w_mode, **options)
            mine.load_state_dict(saved)
        mine.step()
        reference.step()
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))
    assert mine.param_groups[0]["step"] == 4 and "step" not in mine.param_groups[1]
    assert set(mine.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def collectives() -> None:
    """NCCL's abilities on gloo: gathering different sizes, averaging, new groups."""
    from megatron.core.distributed.param_and_grad_buffer import _LayerwiseAllGatherHandle

    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(size)), backend="nccl")
    assert dist.get_backend(group) == "gloo"
    outputs = [torch.empty(n + 1, 2) for n in range(size)]
    dist.all_gather(outputs, torch.full((rank + 1, 2), float(rank)), group=group)
    for n, out in enumerate(outputs):
        assert out.shape == (n + 1, 2) and (out == n).all()
    # As the layer-wise optimizer's older path does it: into views of one buffer, with one handle for several gathers.
    buffers, works = [torch.full((size * (size + 1) // 2,), -1.0) for _ in range(2)], []
    for number, buffer in enumerate(buffers):
        views = buffer.split([n + 1 for n in range(size)])
        views[rank].fill_(10 * number + rank)
        works.append(dist.all_gather(list(views), views[rank], group=group, async_op=True))
    _LayerwiseAllGatherHandle(works).wait()
    for number, buffer in enumerate(buffers):
        assert buffer.tolist() == [10 * number + n for n in range(size) for _ in range(n + 1)]
    mean = torch.full((3,), float(rank))
    dist.all_reduce(mean, op=dist.ReduceOp.AVG, group=group, async_op=True).wait()
    assert (mean == (size - 1) / 2).all()
    part, whole = torch.empty(2), torch.full((2 * size,), float(rank))
    dist.reduce_scatter_tensor(part, whole, dist.ReduceOp.AVG, group)
    assert (part == (size - 1) / 2).all() and (whole == rank).all(), "an input is only read"
    part = whole[2 * rank : 2 * rank + 2]  # as Megatron-Core's DDP does it: in place, without waiting
    dist.reduce_scatter_tensor(output=part, input=whole, op=dist.ReduceOp.AVG, group=group, async_op=True).wait()
    assert (part == (size - 1) / 2).all() and whole.sum() == rank * (2 * size - 2) + size - 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_collectives(pool: RankPool, world_size: int) -> None:
    pool.run(collectives, world_size)

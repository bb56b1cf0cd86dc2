"""torch under megatron_muon.cpu: what looks functions up by identity or name finds what it finds without."""

from __future__ import annotations

import functools
import importlib.util
import pickle
from pathlib import Path

import torch

from megatron_muon import cpu
from megatron_muon.cpu.tensors import PATCHES

CALLS = {
    "arange": "torch.arange(4)",
    "as_tensor": "torch.as_tensor([1.0])",
    "empty": "torch.empty(2, 3)",
    "empty_like": "torch.empty_like(x)",
    "empty_strided": "torch.empty_strided([2, 3], [3, 1])",
    "eye": "torch.eye(3)",
    "full": "torch.full([2], 1.0)",
    "full_like": "torch.full_like(x, 2.0)",
    "linspace": "torch.linspace(0.0, 1.0, 3)",
    "logspace": "torch.logspace(0.0, 1.0, 3)",
    "ones": "torch.ones(2)",
    "ones_like": "torch.ones_like(x)",
    "rand": "torch.rand(2)",
    "rand_like": "torch.rand_like(x)",
    "randint": "torch.randint(0, 5, [2])",
    "randint_like": "torch.randint_like(x, 3)",
    "randn": "torch.randn(2)",
    "randn_like": "torch.randn_like(x)",
    "randperm": "torch.randperm(3)",
    "tensor": "torch.tensor([1.0])",
    "tril_indices": "torch.tril_indices(2, 2)",
    "triu_indices": "torch.triu_indices(2, 2)",
    "zeros": "torch.zeros(2, device=x.device, dtype=x.dtype)",
    "zeros_like": "torch.zeros_like(x)",
    "Tensor.new_empty": "x.new_empty([2])",
    "Tensor.new_full": "x.new_full([2], 1.0)",
    "Tensor.new_ones": "x.new_ones([2])",
    "Tensor.new_zeros": "x.new_zeros([2])",
    "Tensor.to": "x.to(torch.float64)",
    "Tensor.type": "x.type(torch.float64)",
}
"""In TorchScript, which knows the other functions that are replaced on no machine."""


def test_torchscript_compiles_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "scripted.py"
    functions = (f"def {name.replace('.', '_')}(x: torch.Tensor):\n    return {call}\n" for name, call in CALLS.items())
    path.write_text("import torch\n" + "\n".join(functions))
    spec = importlib.util.spec_from_file_location("scripted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with cpu.enabled():
        for name in CALLS:
            function = getattr(module, name.replace(".", "_"))
            torch.manual_seed(0)
            expected = function(torch.ones(2, 2))
            torch.manual_seed(0)
            scripted = torch.jit.script(function)(torch.ones(2, 2))
            assert "empty" in name or torch.equal(scripted, expected), name
    for name in CALLS:
        torch.jit.script(getattr(module, name.replace(".", "_")))(torch.ones(2, 2))


def test_replaced_functions_are_pickled_by_reference() -> None:
    with cpu.enabled():
        for patch in PATCHES:
            value = functools.reduce(getattr, patch.path.split("."), importlib.import_module(patch.module))
            assert pickle.loads(pickle.dumps(value)) is value, patch.target
        assert pickle.loads(pickle.dumps(functools.partial(torch.zeros, 2)))().shape == (2,)
    assert pickle.loads(pickle.dumps(torch.zeros)) is torch.zeros


def test_compiled_functions() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        made = torch.full((2,), 1.0).cuda() + torch.tensor([1.0, 2.0], device="cuda") + torch.arange(2)
        return made + x.to(torch.float64) + x.new_ones(2) + torch.empty_like(x) * 0

    with cpu.enabled():
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert compiled(torch.ones(2)).tolist() == [4.0, 6.0]


def test_devices_as_contexts() -> None:
    with cpu.enabled():
        with torch.device("meta"):
            assert torch.empty(2).is_meta and torch.tensor([1.0]).is_meta and torch.nn.Linear(2, 2).weight.is_meta
        with torch.device("cuda"):
            assert torch.empty(2).device.type == torch.nn.Linear(2, 2).weight.device.type == "cpu"

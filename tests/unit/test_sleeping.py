"""State that sleeps in memory of the host or in a file: back bit for bit, and nothing is lost where that fails."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_muon
from megatron_muon import ConfigError, Muon
from megatron_muon.optimizers.state_files import _PIECE, StateFile


def trained(steps: int = 2) -> Muon:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(24, 16)), torch.nn.Parameter(torch.randn(8, 40))]
    return train(Muon(params, lr=0.1, variant="normuon"), steps)


def train(optimizer: Muon, steps: int = 1) -> Muon:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = param.detach().sin()
        optimizer.step()
    return optimizer


def weights(optimizer: Muon) -> list[torch.Tensor]:
    return [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]


def same(ours: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, ours, others))


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Within, no file can be larger: as a disk with so much room."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_has_the_very_bits(tmp_path: Path) -> None:
    """Of all dtypes that state has, of no element, not contiguous, and longer than what is on the host at a time."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(5, 7).to(torch.bfloat16),
        torch.randint(-128, 127, (3, 256), dtype=torch.int8),
        torch.randint(-(1 << 15), 1 << 15, (4, 9), dtype=torch.int16),
        torch.tensor([float("nan"), -0.0, float("inf")]),
        torch.zeros(0, 4),
        torch.randn(6, 4, dtype=torch.float64).T,
        torch.tensor(3.0),
        torch.arange(_PIECE + 100, dtype=torch.int32).to(torch.uint8),
    ]
    file = StateFile(tmp_path / "new", tensors)
    for number, tensor in enumerate(tensors):
        found = file.read(number, tensor.device)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.reshape(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["muon-asleep-rank00000-0.state"]


def test_files_of_others_in_the_folder(tmp_path: Path) -> None:
    """The lock on a file is one of the system, which other processes see: a run that is gone holds none."""
    left = tmp_path / "muon-asleep-rank00000-0.state"
    left.write_bytes(b"of a run that is gone")
    files = [StateFile(tmp_path, [torch.full((3,), float(number))]) for number in range(2)]
    assert files[0].path == left != files[1].path
    assert [file.read(0, torch.device("cpu"))[0].item() for file in files] == [0.0, 1.0]
    files.clear()
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["host", "folder"])
def test_steps_go_on_bit_for_bit(tmp_path: Path, to: str) -> None:
    """Twice each, with files of two optimizers in one folder; and nothing of a step, or of reading, while asleep."""
    alone, ours = train(trained()), trained()
    where, other = "host" if to == "host" else str(tmp_path), trained(1)
    other.sleep(tmp_path)
    size = sum(value.nbytes for state in ours.state.values() for value in state.values() if hasattr(value, "nbytes"))
    assert [ours.sleep(where) for _ in range(2)] == [size, 0]
    before = weights(ours)
    with pytest.raises(ConfigError, match=rf"asleep (on the host|in {tmp_path}): call wake\(\)"):
        train(ours)
    assert same(before, weights(ours))
    if to == "host":
        assert torch.equal(
            ours.state_dict()["state"][0]["momentum_buffer"], next(iter(ours.state.values()))["momentum_buffer"]
        )
    else:
        assert not any(
            value.device.type == "cpu" for state in ours.state.values() for key, value in state.items() if key != "step"
        )
        with pytest.raises(ConfigError, match=rf"asleep in {tmp_path}: call wake\(\) .* before it is read or saved"):
            ours.state_dict()
    assert [ours.wake() > 0, ours.wake() == 0] == [to == "folder", True]
    assert same(weights(train(ours)), weights(alone))
    assert len(list(tmp_path.iterdir())) == 1  # the other's
    other.wake()
    assert same(weights(train(other)), weights(trained()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "read", [Muon.state_dict, copy.deepcopy, pickle.dumps], ids=["state_dict", "deepcopy", "pickle"]
)
def test_what_is_in_a_file_cannot_be_read(tmp_path: Path, read: Callable[[Muon], Any]) -> None:
    """From the first call on: what stands in its place has no contents."""
    alone, ours = train(trained()), trained()
    ours.sleep(tmp_path)
    with pytest.raises(ConfigError, match=rf"asleep in {tmp_path}: call wake\(\)"):
        read(ours)
    ours.wake()
    read(ours)
    assert same(weights(train(ours)), weights(alone))


def test_from_the_host_to_a_file(tmp_path: Path) -> None:
    alone, ours = train(trained()), trained()
    ours.sleep()
    assert ours.sleep(tmp_path) > 0 == ours.sleep()
    ours.wake()
    assert same(weights(train(ours)), weights(alone))


def test_a_full_disk_takes_nothing(tmp_path: Path) -> None:
    alone, ours = train(trained()), trained()
    with (
        disk_of(1000),
        pytest.raises(OSError, match=r"muon-asleep-rank00000-0\.state: File too large\. It is to hold 3\.0 KiB"),
    ):
        ours.sleep(tmp_path)
    assert not list(tmp_path.iterdir())
    assert same(weights(train(ours)), weights(alone))


def test_a_missing_or_damaged_file_is_named_and_can_be_brought_back(tmp_path: Path) -> None:
    alone, ours = train(trained()), trained()
    ours.sleep(tmp_path)
    (path,) = tmp_path.iterdir()
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(OSError, match=rf"{path}: No such file or directory\. .* bring the file back"):
        ours.wake()
    for wrong, text in ((kept[:-1], "ends too early"), (kept[:-1] + b"x", "damaged")):
        path.write_bytes(wrong)
        with pytest.raises(OSError, match=text):
            ours.wake()
        with pytest.raises(ConfigError, match="asleep"):
            train(ours)
    path.write_bytes(kept)
    assert ours.wake() > 0
    assert same(weights(train(ours)), weights(alone))
    assert not path.exists()


def test_a_load_wakes(tmp_path: Path) -> None:
    alone, ours = trained(), trained()
    kept = copy.deepcopy(ours.state_dict())
    ours.reset()
    train(ours).sleep(tmp_path)
    ours.load_state_dict(kept)
    for mine, theirs in zip(ours.param_groups[0]["params"], weights(alone), strict=True):
        mine.data.copy_(theirs)
    assert same(weights(train(ours)), weights(train(alone)))
    assert not list(tmp_path.iterdir())


def test_nothing_hangs_on_an_optimizer_that_is_gone(tmp_path: Path) -> None:
    ours = trained()
    ours.sleep(tmp_path)
    assert list(tmp_path.iterdir())
    ours.reset()
    gc.collect()
    assert not list(tmp_path.iterdir())  # what is started anew needs no file
    ours.wake()
    train(ours).sleep(tmp_path)
    del ours
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_an_optimizer_of_torch_is_refused_too(tmp_path: Path) -> None:
    param = torch.nn.Parameter(torch.ones(4))
    adam = torch.optim.AdamW([param])
    for to in ("host", tmp_path):
        param.grad = torch.ones(4)
        adam.step()
        megatron_muon.sleep(adam, to)
        with pytest.raises(ConfigError, match="AdamW is to step, but its state is asleep"):
            adam.step()
        megatron_muon.wake(adam)

"""The harness sees what it is to see: single operations on fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.fake_cuda.world import Allowed, DeviceError, World


def cuda(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="cuda")


REFUSED: dict[str, Callable[[], object]] = {
    "item": lambda: cuda(1).item(),
    "float": lambda: float(cuda(1)),
    "bool": lambda: bool(cuda(1) > 0),
    "tolist": lambda: cuda(2).tolist(),
    "equal": lambda: torch.equal(cuda(2), cuda(2)),
    "nonzero": lambda: cuda(2).nonzero(),
    "unique": lambda: cuda(2).unique(),
    "mask": lambda: cuda(2)[cuda(2) > 0],
    "write by mask": lambda: cuda(2).__setitem__(cuda(2) > 0, cuda(2)),
    "cpu": lambda: cuda(2).cpu(),
    "to cuda": lambda: torch.ones(2).to("cuda"),
    "made on cuda": lambda: torch.tensor([1.0, 2.0], device="cuda"),
    "copy": lambda: cuda(2).copy_(torch.ones(2)),
    "scalar of the host": lambda: cuda(2) * torch.tensor(2.0),
    "indices of the host": lambda: cuda(2)[torch.tensor([1])],
    "eigh": lambda: torch.linalg.eigh(cuda(2, 2)),
    "synchronize": lambda: torch.cuda.synchronize(),
    "event": lambda: torch.cuda.Event().synchronize(),
    "objects": lambda: dist.all_gather_object([None, None], 1),
    "send strided": lambda: dist.all_reduce(cuda(2, 2).mT),
    "send from the host": lambda: dist.all_reduce(torch.ones(2)),
    "never waited": lambda: dist.all_reduce(cuda(2), async_op=True),
    "write what is sent": lambda: _in_flight(lambda received, sent: sent.add_(1)),
    "write what is received": lambda: _in_flight(lambda received, sent: received.zero_()),
    "read what is received": lambda: _in_flight(lambda received, sent: received + 1),
    "send what is received": lambda: _in_flight(lambda received, sent: dist.all_reduce(received)),
}
FINE: dict[str, Callable[[], object]] = {
    "number": lambda: cuda(2) * 2.0 + torch.full((), 2.0, device="cuda"),
    "of the host alone": lambda: float(torch.ones(2).sum()),
    "not blocking": lambda: torch.ones(2).to("cuda", non_blocking=True),
    "indices": lambda: cuda(2)[torch.arange(2, device="cuda")],
    "read what is sent": lambda: _in_flight(lambda received, sent: sent + 1),
    "beside what is sent": lambda: _in_flight(lambda received, sent: sent._base[2:].zero_()),
    "views": lambda: _in_flight(lambda received, sent: received.view(2, 2).mT),
    "waits": lambda: torch.cuda.current_stream().wait_event(torch.cuda.Event()),
}


def _in_flight(work: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    received, sent = cuda(4), cuda(4)[:2]
    handle = dist.all_gather_into_tensor(received, sent, async_op=True)
    work(received, sent)
    handle.wait()
    received.zero_()


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    with World(1, 2) as world, pytest.raises(DeviceError), world.refusing():
        REFUSED[case]()


@pytest.mark.parametrize("case", FINE)
def test_not_refused(case: str) -> None:
    with World(1, 2) as world, world.refusing():
        FINE[case]()


def test_tensors_of_two_devices_do_not_mix() -> None:
    with World(), pytest.raises(RuntimeError, match="device"):
        _ = cuda(2) + torch.ones(2)


def test_what_is_allowed_gets_its_answer() -> None:
    here = "tests/fake_cuda/test_world.py:test_what_is_allowed_gets_its_answer"
    with World() as world, world.refusing([Allowed(here, "because", lambda tensor: tensor.numel())]):
        assert cuda(3).sum().item() == 1 and (cuda(3) > 0).tolist() == [True] * 3
    assert world.watch.waits[here] == 4


def test_calls_are_recorded() -> None:
    with World(3, 4) as world:
        world.own_group([(0, 1), (2, 3)])
        group = world.own_group([(0, 2), (1, 3)])
        dist.all_to_all_single(cuda(3).view(torch.uint8), cuda(5).view(torch.uint8), [4, 8], [0, 20], group=group)
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, cuda(3), 1, group), dist.P2POp(dist.irecv, cuda(4), 1, group)]
        )
        for work in works:
            work.wait()
        world.watch.check_all_waited()
        dist.all_reduce(cuda(2).bfloat16())
    exchange, send, receive, reduce = world.calls
    assert (exchange.kind, exchange.group, exchange.rank) == ("all_to_all", (1, 3), 1)
    assert (exchange.sent, exchange.taken, exchange.dtype) == ((0, 20), (4, 8), torch.float32)
    assert [(each.kind, each.peer, each.sent, each.taken, each.batch) for each in (send, receive)] == [
        ("send", 0, (12,), (0,), 1),
        ("recv", 0, (0,), (16,), 1),
    ]
    assert (reduce.group, reduce.sent, reduce.dtype) == ((0, 1, 2, 3), (4,), torch.bfloat16)


def test_bytes_and_kernels_are_counted() -> None:
    with World() as world:
        x = torch.empty(1024, device="cuda")
        y = x.view(32, 32).mT + 1.0
        assert world.watch.live == 8192
        del x
        assert (world.watch.live, world.watch.peak) == (4096, 8192)
        torch._foreach_add_([y, y.mT], 1.0)
    assert world.watch.kernels == {"add": 1, "_foreach_add_": 1}


def test_the_process_is_left_as_it_was() -> None:
    before = torch.cuda.Event, torch.cuda.current_device, dict(dist.distributed_c10d.Backend._plugins)
    with World(0, 2):
        assert torch.cuda.current_device() == 0 and dist.get_backend() == "nccl"
    after = torch.cuda.Event, torch.cuda.current_device, dict(dist.distributed_c10d.Backend._plugins)
    assert before == after and not dist.is_initialized()

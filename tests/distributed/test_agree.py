"""Ranks share a value or a failure: the same on all of them, whatever it is and whoever had it."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_muon.agree import Ranks, ranks_with
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.errors import ConfigError
from tests.pool import RankPool


class OddError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(f"{left} and {right}")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Lets nothing be set."""

    code: int = 3


class MuteError(Exception):
    """Fails when it is asked for its message."""

    def __str__(self) -> str:
        raise RuntimeError("not now")


def local_error() -> Exception:
    """Of a module that only this process has."""
    module = types.ModuleType("only_here")
    sys.modules["only_here"] = module
    module.LocalError = type("LocalError", (Exception,), {"__module__": "only_here"})  # type: ignore[attr-defined]
    return module.LocalError("here")  # type: ignore[no-any-return]


ERRORS: dict[str, Callable[[], Exception]] = {
    "refusal": lambda: ConfigError("--flag 3: give 4."),
    "checkpoint": lambda: CheckpointError("it is damaged"),
    "storage": lambda: OSError(28, "No space left on device"),
    "bug": lambda: KeyError("weight"),
    "odd": lambda: OddError("this", "that"),
}


def grid() -> Ranks:
    """Four ranks as two by two: (0, 1), (2, 3) and (0, 2), (1, 3)."""
    rank = dist.get_rank()
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return Ranks((rows[rank // 2], columns[rank % 2]))


def fail_on(failing: list[int], kind: str) -> dict[str, Any]:
    ranks = grid()

    def work() -> int:
        if dist.get_rank() in failing:
            raise ERRORS[kind]()
        return dist.get_rank()

    answer: dict[str, Any] = {}
    for name in ("gather", "together", "from_first", "to_first"):
        try:
            answer[name] = getattr(ranks, name)(work)
        except Exception as error:
            answer[name] = (type(error).__name__, str(error), ranks_with(error), getattr(error, "__notes__", []))
    return answer


def test_values(pool: RankPool) -> None:
    for rank, answer in enumerate(pool.run(fail_on, 4, [], "bug")):
        on_first = [0, 1, 2, 3] if rank == 0 else None
        assert answer == {"gather": [0, 1, 2, 3], "together": rank, "from_first": 0, "to_first": on_first}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_failure_of_one_rank_is_raised_on_all(pool: RankPool, kind: str) -> None:
    error = ERRORS[kind]()
    expected = (type(error).__name__, str(error), {0, 1, 2, 3})
    if kind == "odd":
        expected = ("RuntimeError", "OddError: this and that", {0, 1, 2, 3})
    for rank, answer in enumerate(pool.run(fail_on, 4, [2, 3], kind)):
        for name in ("gather", "together", "to_first"):
            if rank in (2, 3) and kind == "odd":  # their own is whole
                assert answer[name][:2] == ("OddError", "this and that")
            else:
                assert answer[name][:3] == expected
            if rank in (2, 3):
                assert answer[name][3] == []
            else:
                assert "on rank 2" in answer[name][3][0]
        assert answer["from_first"] == 0


def test_a_failure_of_the_first_rank_is_raised_on_all(pool: RankPool) -> None:
    for answer in pool.run(fail_on, 4, [0], "refusal"):
        assert answer["from_first"][:3] == ("ConfigError", "--flag 3: give 4.", {0, 1, 2, 3})


PAYLOAD = 1_000_000


def sent(name: str) -> tuple[int, int]:
    """Length of what one exchange of a large value brings to this rank, and bytes of the tensors that it made."""
    ranks, made = grid(), [0]

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            tensors = [each for arg in given if arg is not None for each in (arg if isinstance(arg, list) else [arg])]
            made[0] += sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
            return collective(*args, **kwargs)

        return call

    within = distributed_c10d  # where torch's exchanges of objects call these
    names = ("all_gather_single", "broadcast", "gather")
    originals = {each: getattr(within, each) for each in names}
    for each, original in originals.items():
        setattr(within, each, counting(original))
    try:
        value = getattr(ranks, name)(lambda: b"." * PAYLOAD)
    finally:
        for each, original in originals.items():
            setattr(within, each, original)
    return sum(map(len, [value] if isinstance(value, bytes) else value or [])), made[0]


def test_large_values_are_sent_to_those_who_need_them(pool: RankPool) -> None:
    """Once to each rank, and from each rank once to the first: not padded into a place for every rank on every rank."""
    small = PAYLOAD // 10
    assert all(size == PAYLOAD and made < 2 * PAYLOAD + small for size, made in pool.run(sent, 4, "from_first"))
    sizes, made = zip(*pool.run(sent, 4, "to_first"), strict=True)
    assert sizes == (4 * PAYLOAD, 0, 0, 0)
    # In its row (2 values), then from the first of each row to the first of all (4).
    assert all(mine < PAYLOAD * most + small for mine, most in zip(made, (9, 1, 5, 1), strict=True))


def steps(failing: int, step: int) -> tuple[str, frozenset[int]]:
    """Work with exchanges in it, one of them on fewer ranks; a rank fails before, within, between or after them."""
    ranks = grid()
    row = Ranks(ranks.groups[:1])

    def part(number: int) -> None:
        if (dist.get_rank(), step) == (failing, number):
            raise KeyError(number)

    def work() -> None:
        part(0)
        ranks.gather(lambda: part(1))
        part(2)
        ranks.together(lambda: None)
        row.gather(lambda: part(3))
        part(4)

    try:
        ranks.together(work)
    except KeyError as error:
        return str(error), ranks_with(error)
    return "", frozenset()


@pytest.mark.parametrize("step", range(5))
def test_a_rank_that_fails_between_exchanges_meets_the_others_in_the_next(pool: RankPool, step: int) -> None:
    assert pool.run(steps, 4, 2, step, timeout=20) == [(str(step), {0, 1, 2, 3})] * 4


def unpicklable() -> str:
    def work() -> Any:
        return (lambda: 1) if dist.get_rank() == 1 else 1

    ranks = Ranks.of_world()
    assert ranks.together(work) is not None
    try:
        ranks.gather(work)
    except Exception as error:
        return type(error).__name__
    return ""


def test_a_value_that_cannot_travel_is_a_failure_on_all(pool: RankPool) -> None:
    first, second = pool.run(unpicklable, 2)
    assert first == second != ""


def names(make: Callable[[], Exception]) -> list[Any]:
    """Type and message on each rank, when the second of two fails; both can go on."""
    ranks = Ranks.of_world()

    def work() -> None:
        if dist.get_rank() == 1:
            raise make()

    try:
        ranks.together(work)
    except Exception as error:
        message = "" if isinstance(error, MuteError) else str(error)
        after = ranks.gather(lambda: dist.get_rank())
        return [type(error).__name__, message, after, sorted(ranks_with(error))]
    return []


@pytest.mark.parametrize(
    ("make", "elsewhere"),
    [
        (FrozenError, ["RuntimeError", "FrozenError: "]),
        (MuteError, ["MuteError", ""]),
        (local_error, ["RuntimeError", "LocalError: here"]),
    ],
)
def test_errors_that_do_not_bear_being_shared(
    pool: RankPool, make: Callable[[], Exception], elsewhere: list[str]
) -> None:
    first, second = pool.run(names, 2, make, timeout=20)
    assert first == [*elsewhere, [0, 1], [0, 1]]
    own = "here" if make is local_error else ""
    assert second == [elsewhere[1].partition(":")[0] or elsewhere[0], own, [0, 1], [0, 1]]


def test_a_process_alone() -> None:
    alone = Ranks.of_world()
    assert alone == Ranks(())
    assert alone.is_first
    assert alone.gather(lambda: 3) == [3]
    with pytest.raises(KeyError):
        alone.together(lambda: {}["weight"])

"""What all ranks of a model hear of gradients before each step, and before any state changes: by one all-reduce.

NaN and infinity must not reach momentum and weights, which would keep them for ever. Megatron-Core looks for them where
DDP's ``check_for_nan_in_grad`` is on, before gradients are reduced; afterwards only a loss scaler does.

And a weight must have a gradient on all ranks that hold parts or copies of it, or on none. Under DDP all trainable
weights have one (zeros, if nothing came); without it, or with parts that are frozen in between, a rank of a
tensor-parallel group would wait for the others in a collective that they do not come to, or replicas would drift apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.agree import Ranks
from megatron_muon.config import flag
from megatron_muon.monitor.sources import Report
from megatron_muon.optimizers.agreement import unequal_gradients
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.storage import gradient_of, gradients_of
from megatron_muon.plugin import recording
from megatron_muon.plugin.measuring import Measuring
from megatron_muon.plugin.optimizer_state import leaves, param_states
from megatron_muon.plugin.watching import Watching
from megatron_muon.routing import global_names
from megatron_muon.routing.predicate import is_expert_parallel

_SUSPECT, _OVERFLOW, _FAILED = 1.0, 2.0, 3.0
"""What a rank finds: a norm that is not finite, what Megatron-Core's loss scaler has seen, that it cannot step at all.

The largest counts on all ranks: with a loss scaler infinity is to be expected, and Megatron-Core leaves the step out.
"""


class SkippedSteps:
    """How many steps were skipped for NaN or infinity in gradients; logged from the first on, see :class:`Source`."""

    title, prefix = "Gradients", "gradients"
    count = 0

    def report(self, iteration: int) -> Report:
        """See :class:`Source`."""
        text = f"steps skipped for NaN or infinity: {self.count}" if self.count else ""
        return Report(text, {"nonfinite_steps": self.count} if self.count else {})

    def scalars(self, iteration: int) -> dict[str, float]:
        """See :class:`Source`."""
        return {"nonfinite_steps": float(self.count)} if self.count else {}


def check_gradients(
    optimizer: Any,
    model_chunks: Sequence[torch.nn.Module],
    ranks: Ranks,
    choice: str,
    device: torch.device,
    check: Callable[[], None],
    experts: dist.ProcessGroup | None,
    measuring: Measuring,
    watching: Watching | None,
) -> None:
    """Let ``optimizer.prepare_grads``, with which every step begins, have the step skipped or stop the run.

    A skipped step has changed nothing, of Adam's part neither: weights, state, masters and counts of steps are those of
    the last one. That is why the host must know before the first write, and waits; Megatron-Core waits for its norm
    of the gradients, too, and after each step.

    Args:
        optimizer: Megatron-Core's, of a model.
        model_chunks: of the model on this rank.
        ranks: the model's; all of them step together, and decide alike.
        choice: ``skip``, ``stop``, or ``propagate``: nobody looks at the gradients, and where all weights are in DDP,
            so that none can lack one, nothing is exchanged and nobody waits.
        device: of the model.
        check: refuses a step; on some ranks perhaps. What it raises there is raised on all, if they exchange anything.
        experts: the expert-parallel group, whose ranks have other experts under the same names; None for one rank.
        measuring: is told whether any rank has steps of Newton-Schulz to measure in the step that comes.
        watching: is told how many steps have been made, if there is one.

    Raises (in each step):
        RuntimeError: on all ranks, naming the weights: with ``stop``, for NaN or infinity; for gradients that ranks
            which share a weight do not all have. And what ``watching`` raises.
    """
    prepare = optimizer.prepare_grads
    for leaf, _ in leaves(optimizer):
        if isinstance(leaf.optimizer, Muon):
            leaf.optimizer.engines.compared_elsewhere = True
    place = "" if experts is None or experts.size() == 1 else f" of expert-parallel rank {experts.rank()}"
    agreed: list[int] = []  # which weights lacked a gradient when the ranks last compared them
    skipped = SkippedSteps()
    in_buffers = ranks.gather(lambda: all(map(_is_in_buffer, model_chunks)))
    is_known = measuring.is_known_to_all and (watching is None or watching.is_known_to_all)

    def prepare_grads() -> bool:
        if choice == "propagate" and all(in_buffers) and is_known:
            check()
            measuring.is_due = measuring.look()
            if watching is not None:
                watching.begin(watching.count)  # after a measured step the host waits, to tell of it
            return bool(prepare())
        failure: Exception | None = None
        verdict = torch.full((3 if watching is None else 4,), _FAILED, device=device)
        lacking: list[int] = []
        try:
            check()
            verdict[0] = _OVERFLOW if prepare() else 0.0 if choice == "propagate" else _suspect(optimizer, device)
            lacking = [index for index, grad in enumerate(gradients_of(_params(optimizer))) if grad is None]
            verdict[1], verdict[2] = lacking != agreed, measuring.look()
            if watching is not None:
                verdict[3] = watching.count
        except Exception as error:  # the other ranks are on their way to what follows
            failure = error
            verdict[0] = _FAILED
        ranks.reduce_max(verdict)
        worst, others, measuring.is_due, *count = verdict.tolist()  # waits for the device, see above
        if worst == _FAILED:
            ranks.together(lambda: _raise(failure))
        if watching is not None:
            watching.begin(int(count[0]))
        if worst == _OVERFLOW:
            return True
        if others:
            _refuse_unequal(optimizer, model_chunks, ranks, place)
            agreed[:] = lacking
        if worst != _SUSPECT:
            return False
        names = dict.fromkeys(itertools.chain.from_iterable(ranks.gather(lambda: _names(optimizer, model_chunks))))
        if not names:
            return False  # finite, but too large to be squared
        told = ", ".join(itertools.islice(names, 4)) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        if choice == "stop":
            raise RuntimeError(
                f"NaN or infinity in the gradients of {told}. Weights and momentum are those of the last step. "
                f"{flag('nonfinite')} skip leaves out such steps; a checkpoint from before and a lower learning rate "
                "help where they come back."
            )
        skipped.count += 1
        if ranks.is_first:
            print(
                f"megatron_muon: step skipped ({skipped.count} so far): NaN or infinity in the gradients of {told}",
                flush=True,
            )
        return True

    optimizer.prepare_grads = prepare_grads
    if ranks.is_last and choice == "skip":
        recording.watch(optimizer, skipped)


def _is_in_buffer(chunk: torch.nn.Module) -> bool:
    """Whether DDP holds the gradients of all trained weights: none can lack one."""
    return all(hasattr(param, "main_grad") for param in chunk.parameters() if param.requires_grad)


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _params(optimizer: Any) -> Iterator[torch.Tensor]:
    """What this rank's optimizers update: weights, or master weights or slices in their place."""
    return (param for group in optimizer.param_groups for param in group["params"])


def _refuse_unequal(optimizer: Any, model_chunks: Sequence[torch.nn.Module], ranks: Ranks, place: str) -> None:
    """All ranks tell of weights without gradients, and stop if others that share one of them have a gradient for it.

    Args:
        optimizer: as of :func:`check_gradients`.
        model_chunks: likewise.
        ranks: likewise.
        place: what to add to the names of this rank's experts.

    Raises:
        RuntimeError: on all ranks.
    """
    has: dict[str, bool] = {}
    named = (each for chunk in model_chunks for each in global_names(chunk))
    names = {param: name + place * is_expert_parallel(param) for name, param in named}

    def lacking() -> list[str]:
        held = [(names.get(each.param), each.key) for each in param_states(optimizer, refuse=False)]
        has.update((name, gradient_of(key) is not None) for name, key in held if name is not None and key is not None)
        return [name for name, there in has.items() if not there]

    gathered = ranks.by_number(lacking)
    missed = dict.fromkeys(itertools.chain.from_iterable(gathered.values()))
    having = ranks.by_number(lambda: [name for name in missed if has.get(name)]) if missed else {}
    for name in missed:
        those, others = (sorted(rank for rank, its in part.items() if name in its) for part in (having, gathered))
        if those:
            raise RuntimeError(f"Muon: {unequal_gradients(name, those, others)}")


def _suspect(optimizer: Any, device: torch.device) -> torch.Tensor:
    """:data:`_SUSPECT` where a norm of this rank's gradients is not finite, else 0: a scalar."""
    grads = [grad for grad in gradients_of(_params(optimizer)) if grad is not None]
    if not grads:
        return torch.zeros((), device=device)
    alike = [[grad for grad in grads if grad.dtype == dtype] for dtype in {grad.dtype: None for grad in grads}]
    norms = torch.stack([norm.float() for some in alike for norm in torch._foreach_norm(some)])
    return (~norms.isfinite()).any() * _SUSPECT


def _names(optimizer: Any, model_chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Weights whose gradient, as this rank's optimizer is to read it, is not finite."""
    names = {param: name for chunk in model_chunks for name, param in global_names(chunk)}
    held = param_states(optimizer, refuse=False)
    grads = [(each.param, gradient_of(each.key)) for each in held if each.key is not None]
    return [names[param] for param, grad in grads if grad is not None and not grad.isfinite().all()]

"""State tensors, described by the sharding of the model's own weights.

The model says how each of its weights lies in a global tensor (``sharded_state_dict``): along which axes it is cut, in
which layer and expert it is, which ranks hold copies, and whether a fused weight is saved in parts. The state of a
weight is described in the same way.
"""

from __future__ import annotations

import copy
import functools
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.keys import ALONE, name_of, state_key
from megatron_muon.checkpoint.shards import Replica, cut, placed, shaped
from megatron_muon.errors import sizes
from megatron_muon.routing.blocks import plain


@dataclass(frozen=True)
class Block:
    """Rows of a weight that are one shard of a tensor of the model's: all, or what a factory makes of them."""

    base: ShardedTensor  # the model's description, without its data
    first: int  # the first element of the flattened :class:`Template` in it
    suffix: str  # what the factory adds to the model's key


@dataclass(frozen=True)
class Template:
    """A part of a weight that the model saves under a key of its own; mostly the whole weight."""

    base: ShardedTensor | ShardedTensorFactory  # the model's description
    first: int  # the first element of the flattened weight in it; it is a block of whole rows
    shape: tuple[int, ...]  # on this rank

    @property
    def where(self) -> tuple[str, tuple[int, ...]]:
        """The model's key, and the layer, expert... in the tensor of that key."""
        tensor = self.blocks[0].base
        return self.base.key, tuple(tensor.global_offset[: tensor.prepend_axis_num])

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """What a factory saves it in; one for a tensor.

        Raises:
            CheckpointError: for a factory that does other things than cutting rows.
        """
        if isinstance(self.base, ShardedTensor):
            return [Block(self.base.without_data(), 0, "")]
        whole, key = torch.empty(self.shape, device="meta"), self.base.key
        memory, rest = whole.untyped_storage()._cdata, self.shape[1:]
        found = []
        for part in _tensors(self.base.build_fn(key, whole, self.base.replica_id, None)):
            data = part.data
            is_view = data is not None and data.untyped_storage()._cdata == memory and data.is_contiguous()
            if data is None or not is_view or tuple(data.shape[1:]) != rest:
                raise CheckpointError(
                    f"{key}: the model saves this weight in parts that are no blocks of its rows; its optimizer state "
                    "cannot be saved beside it. Let the factory in the model's sharded_state_dict() cut rows."
                )
            found.append(Block(part.without_data(), int(data.storage_offset()), part.key.removeprefix(key)))
        return found


@dataclass(frozen=True)
class Place:
    """Where one weight is in the model's global tensors.

    Attributes:
        shape: of the weight on this rank.
        templates: its parts.
        key: the model's key of the first part.
        index: of the layer, expert... in the tensor of ``key``, which holds several weights; empty if it holds one.
    """

    shape: tuple[int, ...]
    templates: tuple[Template, ...]
    key: str
    index: tuple[int, ...]

    @functools.cached_property
    def name(self) -> str:
        """Unique in the model, at every layout."""
        return name_of(self.key, self.index)

    @functools.cached_property
    def members(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Key and index by name: of the experts of a stack, each a weight of its own at other layouts, or of one."""
        if len(self.templates[0].shape) == len(self.shape):
            return {self.name: (self.key, self.index)}
        return {name_of(*part.where): part.where for part in self.templates}

    @property
    def replica(self) -> Replica:
        """(pipeline, tensor, data) rank among copies; zeros for the one that is saved."""
        replica = self.templates[0].base.replica_id
        assert isinstance(replica, tuple) and len(replica) == 3, f"{self.name}: replica {replica}"
        return replica

    @property
    def siblings(self) -> int:
        """How many weights the tensor of ``key`` holds."""
        tensor = self.templates[0].blocks[0].base
        return _numel(tensor.global_shape[: tensor.prepend_axis_num])

    def sharded(
        self, source: str, tensor: torch.Tensor, replica: Replica, span: tuple[int, int] | None = None
    ) -> list[ShardedTensor]:
        """Describe a state tensor, where it lies: what is read into the descriptions is read into the state.

        Without a regular grid, since ranks may have slices of what others have whole.

        Args:
            source: what precedes the model's key (``optimizer.state.momentum_buffer``). With :data:`ALONE` at its end,
                the state of this layer and expert has a key of its own.
            tensor: of the weight's shape; or with 1 in place of some sizes (one number for each row or column), or of
                one element.
            replica: (pipeline, tensor, data).
            span: ``tensor`` has these elements of the flattened weight only, [start, stop).
        """
        parts: list[ShardedTensor] = []
        alone = source.endswith(ALONE)
        for template in self.templates:
            rows = tensor if span or len(self.templates) == 1 else rows_of(tensor, template)
            for block in template.blocks:
                base = block.base
                index = base.global_offset[: base.prepend_axis_num]
                key = state_key(source, template.base.key, index) + block.suffix
                if span is None:
                    found = [shaped(base, key, _rows(rows, template, block, key), replica)]
                else:
                    found = cut(base, key, tensor, template.first + block.first, span, replica)
                parts += [placed(part, alone) for part in found]
        return parts


def noted(model_state: Any) -> list[ShardedTensor | ShardedTensorFactory]:
    """What a model says of its tensors, as it is now: copies, since saving and loading change the originals.

    Either takes the parameters out; Megatron-Core's fully parallel strategies also put other replica numbers in.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return [copy.copy(base) for base in nested_values(sharded)]


def places_of(
    params: Iterable[torch.nn.Parameter],
    model_state: Any,
    again: Callable[[], Any] | None = None,
    names: Mapping[torch.nn.Parameter, str] | None = None,
) -> list[Place]:
    """Where each weight is.

    Args:
        params: of the model.
        model_state: its sharded state, with the parameters themselves in it.
        again: asks the model once more, for a state that was saved or loaded since.
        names: of weights, for errors.

    Raises:
        CheckpointError: for weights that are not saved with the model, not found in this state of it, or saved in other
            parts than blocks of rows.
    """
    params, bases, problem = list(params), noted(model_state), SAVE_IT
    templates = _templates(params, bases)
    if again is not None and not all(map(_is_complete, templates)):
        fresh, keys = noted(again()), {base.key for base in bases}
        # What a factory makes may have keys of its own.
        if fresh and all(base.key in keys for base in fresh if isinstance(base, ShardedTensor)):
            templates = _templates(params, fresh)
        else:
            problem = _CHANGED
    lost = [param for param, parts in zip(params, templates, strict=True) if not _is_complete(parts)]
    if lost:
        lines = ("Weights that are trained, but not saved:", *_lines(lost, names or {}))
        raise CheckpointError("\n  ".join(lines) + f"\n{problem}")
    return [Place(tuple(param.shape), parts, *parts[0].where) for param, parts in zip(params, templates, strict=True)]


SAVE_IT = (
    "The model's sharded_state_dict() has neither the parameter nor views that make it up. Save it there "
    "(keep_vars=True), or freeze it."
)
_CHANGED = (
    "The model's sharded state that was given has neither the parameter nor views that make it up, as after it was "
    "saved or loaded. Ask for the optimizer's state first, or give it what another sharded_state_dict() returns."
)


def unsaved(names: Mapping[torch.nn.Parameter, str], model_state: Any) -> list[str]:
    """The trained weights that are not in a model's sharded state, as lines."""
    params = [param for param in names if param.requires_grad]
    templates = _templates(params, noted(model_state))
    return _lines([param for param, parts in zip(params, templates, strict=True) if not parts], names)


def _lines(params: Iterable[torch.nn.Parameter], names: Mapping[torch.nn.Parameter, str]) -> list[str]:
    return [f"{names.get(param, 'a weight')} of shape {sizes(param.shape)}" for param in params]


def _templates(params: Iterable[torch.nn.Parameter], bases: list[Any]) -> list[tuple[Template, ...]]:
    """The parts of each weight; none for one that is not there."""
    by_identity = {id(base.data): base for base in bases}
    by_address = sorted(
        ((base.data.data_ptr(), base) for base in bases if isinstance(base.data, torch.Tensor)), key=itemgetter(0)
    )
    found = []
    for param in params:
        base = by_identity.get(id(param))
        found.append(_parts_of(param, by_address) if base is None else (Template(base, 0, tuple(param.shape)),))
    return found


def _is_complete(parts: tuple[Template, ...]) -> bool:
    """Whether they are there, with the numbers that a model gives to copies."""
    return bool(parts) and all(isinstance(part.base.replica_id, tuple) for part in parts)


def _parts_of(param: torch.nn.Parameter, bases: list[tuple[int, Any]]) -> tuple[Template, ...]:
    """The views of a fused weight that the model saves, of ``bases`` by address; none if they do not make it up."""
    begin, size = plain([param])[0].data_ptr(), param.element_size()
    first, last = (bisect_left(bases, address, key=itemgetter(0)) for address in (begin, begin + param.numel() * size))
    parts = []
    for address, base in bases[first:last]:
        if (
            base.data.numel() < param.numel()
            and base.data.is_contiguous()
            and base.data.shape in ((len(base.data), *param.shape[1:]), param.shape[1:])
        ):
            parts.append(Template(base, (address - begin) // size, tuple(base.data.shape)))
    parts.sort(key=lambda part: part.first)
    ends = [part.first + _numel(part.shape) for part in parts]
    whole = parts and [0, *ends[:-1]] == [part.first for part in parts] and ends[-1] == param.numel()
    return tuple(parts) if whole else ()


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _tensors(state: Any) -> Iterator[ShardedTensor]:
    yield from ([state] if isinstance(state, ShardedTensor) else nested_values(state))


def rows_of(tensor: torch.Tensor, template: Template) -> torch.Tensor:
    """The rows of a state that belong to a part of the weight, or the expert of a stack."""
    if len(template.shape) < tensor.dim():
        return tensor[template.first // _numel(template.shape)]
    rest = _numel(template.shape[1:])
    first = template.first // rest
    return tensor[first : first + template.shape[0]] if tensor.shape[0] > 1 else tensor


def _rows(tensor: torch.Tensor, template: Template, block: Block, key: str) -> torch.Tensor:
    """The rows of a state that a factory saves in one block."""
    if len(template.blocks) == 1:
        return tensor
    if tensor.dim() != len(template.shape) or tensor.shape[0] != template.shape[0]:
        raise CheckpointError(
            f"{key}: a state of shape {sizes(tensor.shape)} cannot be saved for a weight of shape "
            f"{sizes(template.shape)}, which the model saves in blocks of rows. Give each row of the weight one."
        )
    first = block.first // _numel(template.shape[1:])
    return tensor[first : first + block.base.local_shape[0]]


def tensors_of(states: Iterable[Any]) -> list[ShardedTensor]:
    """All ``ShardedTensor`` of descriptions, factories built."""
    built = (state.build() if isinstance(state, ShardedTensorFactory) else state for state in states)
    return list(itertools.chain.from_iterable(map(_tensors, built)))

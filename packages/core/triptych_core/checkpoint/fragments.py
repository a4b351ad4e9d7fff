"""What a rank holds of a model in training, as stretches of named flat tensors, whatever the stage.

Of every parameter that trains: its elements in the rank's fp32 master and in the optimizer's states
that are shaped like it. Of the others, and of persistent buffers: the elements themselves. All are
views, so that a checkpoint is written from them and read into them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych_core.checkpoint.payload import BUFFER, FROZEN, MASTER, Payloads, Scalars, Stretch
from triptych_core.engine.light import LightEngine
from triptych_core.engine.masters import changed_masters, flats_of
from triptych_core.optim.shards import Flat, Piece
from triptych_core.parallel.expert import first_element, replicas_of
from triptych_core.parallel.tensor import is_cut, tensor_place

StateDtypes = Mapping[str, torch.dtype | None]  # by kind


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements of a parameter in a flat master of this rank, whose optimizer state is `state`."""

    name: str
    piece: Piece
    master: Tensor
    state: dict[str, Any]
    first: int = 0  # of the parameter's elements here, where ranks hold parts of stacked experts

    def stretches(self) -> Iterator[Stretch]:
        """Its elements in the master and in each state of the master's shape.

        By the states' names: a resume makes them in another order, and ranks share out what is
        alike in this one.
        """
        yield self._of(MASTER, self.master)
        for key, value in sorted(self.state.items()):
            if _is_like(value, self.master, key):
                yield self._of(key, value)

    def scalars(self) -> dict[str, float]:
        """The states that are one number: Adam's count of steps."""
        return {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in self.state.items()
            if not _is_like(value, self.master, key)
        }

    def _of(self, kind: str, tensor: Tensor) -> Stretch:
        size = self.piece.end - self.piece.begin
        flat = tensor.detach().view(-1)[self.piece.offset : self.piece.offset + size]
        return Stretch(self.name, kind, self.first + self.piece.begin, flat)


def fragments(engine: Any) -> list[Fragment]:
    """All this rank holds of parameters that train, in the order of its masters."""
    names = _names(engine)
    state = engine.optimizer.state
    return [
        # Not state[master]: that would make an empty entry, which counts as initialised.
        Fragment(
            names[id(parameter)],
            piece,
            flat.master,
            state.get(flat.master, {}),
            first_element(parameter),
        )
        for flat in flats_of(engine)
        for parameter, piece in flat.pieces()
    ]


def stretches_to_save(engine: Any) -> tuple[list[Stretch], Scalars]:
    """What this rank has to write so that all ranks together write everything once.

    Where ranks hold the same, each writes an equal share.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tp_rank, tp_size = tensor_place(engine)
    held = fragments(engine)
    if tp_size > 1:
        return _part_to_save(engine, held, rank // tp_size, tp_rank, world_size // tp_size)
    trained = [stretch for fragment in held for stretch in fragment.stretches()]
    cut, whole = _untrained(engine)
    scalars = {fragment.name: fragment.scalars() for fragment in held}
    if engine.zero_optimization_stage() > 0:
        return [*trained, *cut, *_share_with_replicas(engine, whole)], scalars
    stretches = _share_with_replicas(engine, [*trained, *whole])
    return stretches, scalars if rank == 0 else {}


def _part_to_save(
    engine: Any, held: list[Fragment], replica: int, tp_rank: int, num_replicas: int
) -> tuple[list[Stretch], Scalars]:
    """Under tensor parallelism: what is cut by each rank, the rest by the first of those."""
    cut_names = {name for p, name in _names_and_parameters(engine) if is_cut(p)}

    def mine(stretches: Iterable[Stretch]) -> list[Stretch]:
        return [s for s in stretches if tp_rank == 0 or s.name in cut_names]

    trained = mine(stretch for fragment in held for stretch in fragment.stretches())
    cut, whole = _untrained(engine)
    scalars = {fragment.name: fragment.scalars() for fragment in held}
    return [*trained, *mine(cut), *_share(mine(whole), replica, num_replicas)], scalars


@torch.no_grad()
def load_stretches(engine: Any, payloads: Payloads, dtypes: StateDtypes) -> None:
    """Fill masters, states, frozen parameters and buffers; then the weights from the masters.

    `dtypes` says of some states in which dtype this run keeps them; None: not at all.

    Raises:
        ValueError: the payloads lack some of it.
    """
    with changed_masters(engine):
        for flat in flats_of(engine):
            _make_states(engine, flat, payloads, dtypes)
        for fragment in fragments(engine):
            for stretch in fragment.stretches():
                payloads.fill(stretch)
        for stretches in _untrained(engine):
            for stretch in stretches:
                payloads.fill(stretch)


def kept_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a state dict would hold."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _is_like(value: Any, master: Tensor, key: str) -> bool:
    if not isinstance(value, Tensor) or key == "step":
        return False
    assert value.shape == master.shape, f"optimizer state {key}: unlike its master {master.shape}"
    return True


def _make_states(engine: Any, flat: Flat, payloads: Payloads, dtypes: StateDtypes) -> None:
    """Give a master the states that its parameters have in the payloads, tensors in zeros.

    The parameters of a master are of one group, have the same states and count the same steps. A
    rank whose stretch of a small group is all padding has them, too, as after a step.
    """
    name = _names(engine)[id(flat.runs[0].parameter)]
    state: dict[str, Any] = dict(payloads.scalars.get(name, {}))
    for kind, saved in payloads.kinds(name).items():
        dtype = dtypes.get(kind, saved)
        if kind != MASTER and dtype is not None:
            state[kind] = torch.zeros_like(flat.master, dtype=dtype, requires_grad=False)
    engine.optimizer.state[flat.master] = state


def _untrained(engine: Any) -> tuple[list[Stretch], list[Stretch]]:
    """Frozen parameters that are cut over ranks; parameters and buffers every rank holds whole."""
    flats = list(engine.frozen()) if isinstance(engine, LightEngine) else []
    cut, whole = list(_frozen_parts(engine, flats)), []
    ours = {run.parameter for flat in flats for run in flat.runs}
    for parameter, name in _names_and_parameters(engine):
        if parameter.requires_grad or parameter in ours:
            continue
        if hasattr(parameter, "ds_tensor"):
            part = parameter.ds_tensor.numel()
            begin = dist.get_rank(parameter.ds_process_group) * part
            size = max(0, min(part, parameter.ds_numel - begin))  # the rest is padding
            begin += first_element(parameter)
            cut.append(Stretch(name, FROZEN, begin, parameter.ds_tensor.detach()[:size]))
        else:
            begin = first_element(parameter)
            whole.append(Stretch(name, FROZEN, begin, parameter.detach().view(-1)))
    whole += [
        Stretch(name, BUFFER, 0, buffer.view(-1)) for name, buffer in kept_buffers(engine.module)
    ]
    return cut, whole


def _frozen_parts(engine: Any, flats: Iterable[Flat]) -> Iterator[Stretch]:
    """What this rank holds of frozen parameters that our ZeRO-3 has cut."""
    names = _names(engine)
    for flat in flats:
        for parameter, piece in flat.pieces():
            part = flat.master[piece.offset : piece.offset + piece.end - piece.begin]
            begin = first_element(parameter) + piece.begin
            yield Stretch(names[id(parameter)], FROZEN, begin, part)


def _names_and_parameters(engine: Any) -> Iterator[tuple[Any, str]]:
    """Parameters and their names; one that tensor parallelism has cut is named by its part."""
    rank, size = tensor_place(engine)
    for name, parameter in engine.module.named_parameters():
        yield parameter, f"{name}[{rank} of {size}]" if is_cut(parameter) else name


def _names(engine: Any) -> dict[int, str]:
    return {id(parameter): name for parameter, name in _names_and_parameters(engine)}


def _share_with_replicas(engine: Any, stretches: list[Stretch]) -> list[Stretch]:
    """This rank's shares of what it holds like others: all of them, or those with its experts."""
    groups = {name: replicas_of(p) for name, p in engine.module.named_parameters()}
    by_group: dict[Any, list[Stretch]] = {}
    for stretch in stretches:
        by_group.setdefault(groups.get(stretch.name), []).append(stretch)
    return [
        stretch
        for group, some in by_group.items()
        for stretch in _share(some, dist.get_rank(group), dist.get_world_size(group))
    ]


def _share(stretches: list[Stretch], rank: int, world_size: int) -> list[Stretch]:
    """This rank's part of what all hold: elements rank / world_size to (rank + 1) / world_size."""
    total = sum(stretch.tensor.numel() for stretch in stretches)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    mine, at = [], 0
    for stretch in stretches:
        size = stretch.tensor.numel()
        begin, end = max(first - at, 0), min(last - at, size)
        if begin < end:
            mine.append(stretch.narrow(begin, end))
        at += size
    return mine

"""Expert parallelism: consecutive ranks hold the experts of every layer between them.

To data parallelism all ranks stay alike. An expert's gradient on a rank holds the tokens of its
whole expert group, so summed over the ranks that hold the same experts (its replicas) it is the sum
over all ranks, and is divided by the number of all. ZeRO-3 is told by attributes of the parameter
that DeepSpeed 0.19.8 reads for its AutoEP (partition_parameters.py, stage3.py). AutoEP itself
refuses rows shared by ranks, and replaces modules whose names our checkpoints need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from triptych_core.launch import Runtime
from triptych_core.optim.clipping import total_norm
from triptych_core.sections import ParallelConfig


def _leave(parameter: nn.Parameter) -> None:
    """Nothing to say of an expert that every rank has."""


@dataclass(frozen=True)
class ExpertPlace:
    """This rank holds the rank-th of `size` parts of the experts; group names the holders' group.

    mark(parameter) makes a parameter known as a part of an expert, before ZeRO-3 sees it.
    """

    group: str = ""
    size: int = 1
    rank: int = 0
    mark: Callable[[nn.Parameter], None] = _leave


def make_expert_place(config: ParallelConfig, runtime: Runtime) -> ExpertPlace:
    """Let every `parallel.expert` consecutive ranks divide the experts; all ranks must call it.

    Raises ValueError where the ranks cannot be grouped.
    """
    n, world_size = config.expert, runtime.world_size
    if n == 1:
        return ExpertPlace()
    if world_size % n:
        raise ValueError(
            f"parallel.expert: must divide the number of ranks ({world_size}), got {n}; "
            f"start a multiple of {n} ranks or lower it"
        )
    name = f"ep_size_{n}"  # what DeepSpeed calls it
    deepspeed_groups._create_expert_and_data_parallel(n)
    replicas = deepspeed_groups._get_expert_data_parallel_group(name)
    holders = deepspeed_groups._get_expert_parallel_group(name)

    def mark(parameter: Any) -> None:
        parameter.allreduce = False
        parameter.group_name = name
        parameter.ds_zero_placement_family = "autoep_expert"  # gradients divided by all ranks
        parameter.ds_zero_partition_group_name = name
        parameter.ds_zero_partition_process_group = replicas
        parameter.expert_groups = (replicas, holders)

    return ExpertPlace(holders.group_name, n, runtime.rank % n, mark)


def replicas_of(parameter: Any) -> Any:
    """The group of ranks that hold the same of a parameter; None for all ranks."""
    return getattr(parameter, "expert_groups", (None, None))[0]


def first_element(parameter: Any) -> int:
    """Where this rank's part of a parameter begins in the whole, were that flat."""
    rank, _ = expert_part(parameter)
    return rank * int(getattr(parameter, "ds_numel", parameter.numel()))


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter of which ranks may hold parts, and ZeRO-3 parts of those."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    _, size = expert_part(parameter)
    return shape if size == 1 else (shape[0] * size, *shape[1:])


def expert_part(parameter: Any) -> tuple[int, int]:
    """(rank, size): of the stacked experts along the first axis this is the rank-th part."""
    rank, size = getattr(parameter, "expert_part", (0, 1))
    return rank, size


def norm_over_holders(gradients: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """The 2-norm of all gradients, () fp32, where ranks hold the whole of some and parts of others.

    All are sums over ranks already; parts of experts have others on the other holders.
    """
    by_holders: dict[Any, list[Tensor]] = {}
    for parameter, gradient in gradients.items():
        holders = getattr(parameter, "expert_groups", (None, None))[1]
        by_holders.setdefault(holders, []).append(gradient)
    norms = {holders: total_norm(some) for holders, some in by_holders.items()}
    if norms.keys() <= {None}:
        return norms[None]
    squares = []
    for holders, norm in norms.items():
        squares.append(norm.square())
        if holders is not None:
            dist.all_reduce(squares[-1], group=holders)
    return torch.stack(squares).sum().sqrt()

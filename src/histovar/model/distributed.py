"""What the processes of a distributed run must agree on; a single process agrees with itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def rank_and_world() -> tuple[int, int]:
    """Number of this process, and of all."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(x: Tensor) -> Tensor:
    """Rows of all processes, in the order in which a single one would have drawn them; (n, ...) of each."""
    _, world = rank_and_world()
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def mean_of_processes(x: Tensor) -> Tensor:
    """Mean over processes."""
    _, world = rank_and_world()
    if world > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x / world


def own_share(x: Tensor) -> Tensor:
    """Rows that belong to this process, of what is the same everywhere, (n of all processes, ...)."""
    rank, world = rank_and_world()
    return x[rank::world]

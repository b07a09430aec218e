"""Collective operations over the processes of a distributed run; without one, they change nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(x: Tensor) -> Tensor:
    """Gather the rows of all processes, (n, ...) from each, interleaved as a single process would have drawn them."""
    _, world = rank_and_world()
    if world == 1:
        return x
    shares = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(shares, x.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)


def average_over_processes(x: Tensor) -> Tensor:
    """Average a tensor over all processes."""
    _, world = rank_and_world()
    if world > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x / world


def take_own_rows(x: Tensor) -> Tensor:
    """Take this process's rows of a tensor that is the same in all processes, (n x number of processes, ...)."""
    rank, world = rank_and_world()
    return x[rank::world]

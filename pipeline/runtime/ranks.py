"""Several processes on one job: who owns which window, and sums over all of them (torch.distributed).

Window i belongs to rank i mod world, and is that rank's window number i // world. What is summed over ranks is a sum
over windows, so that one process and N give the same numbers up to the order of summation.
"""

from typing import Literal

import torch
import torch.distributed as dist

from pipeline.runtime.errors import PipelineError


class RankError(PipelineError):
    """Several processes cannot do this, or one of them failed."""


class Ranks:
    """This process among `world`."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def own(self, count: int) -> slice:
        """Which of `count` windows are this rank's.

        Raises:
            RankError: there are not enough for every rank to have one.
        """
        if count < self.world:
            raise RankError(f"runtime.processes={self.world} exceeds the {count} windows to share; use at most {count}")
        return slice(self.rank, count, self.world)

    def locate(self, windows: torch.Tensor) -> torch.Tensor:
        """Of these windows, this rank's, as its own numbers."""
        return windows[windows % self.world == self.rank] // self.world

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over ranks."""
        self._reduce_("SUM", tensors)

    def count(self, own: int) -> int:
        """What all ranks have together."""
        total = torch.tensor(own)
        self.sum_(total)
        return int(total)

    def least_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its elementwise minimum over ranks."""
        self._reduce_("MIN", tensors)

    def most_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its elementwise maximum over ranks."""
        self._reduce_("MAX", tensors)

    def _reduce_(self, operation: Literal["SUM", "MIN", "MAX"], tensors: tuple[torch.Tensor, ...]) -> None:
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))

    def spread_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by what the first rank has."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0)

    def collect(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """[count, …], every window in its place, from each rank's own [n, …]."""
        if self.world == 1:
            return own
        whole = own.new_zeros(count, *own.shape[1:])
        whole[self.own(count)] = own
        self.sum_(whole)
        return whole

    def join(self, own: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors [n, …], of any n, one behind the other."""
        if self.world == 1:
            return own
        sizes = torch.zeros(self.world, dtype=torch.int64, device=own.device)
        sizes[self.rank] = len(own)
        self.sum_(sizes)
        padded = own.new_zeros(int(sizes.max()), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def shuffle(count: int, generator: torch.Generator) -> torch.Tensor:
    """An order of `count` windows in which batches of 2, 4, 8 … windows are spread evenly over 2, 4, 8 … ranks.

    Windows change places with those of the same remainder by the number of strata, which depends on `count` alone: the
    order is the same for any number of processes.
    """
    strata = 1
    while strata < 64 and strata * 8 <= count:
        strata *= 2
    order = torch.arange(count)
    for remainder in range(strata):
        own = torch.arange(remainder, count, strata)
        order[own] = own[torch.randperm(len(own), generator=generator)]
    return order

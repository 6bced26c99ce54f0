"""Several processes on one job: who owns which window, and sums over all of them (torch.distributed).

Window i belongs to rank i mod world, and is that rank's window number i // world. What is summed over ranks is a sum
over windows, so that one process and N give the same numbers up to the order of summation.
"""

import torch
import torch.distributed as dist


class Ranks:
    """This process among `world`."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def own(self, count: int) -> slice:
        """Which of `count` windows are this rank's."""
        return slice(self.rank, count, self.world)

    def locate(self, windows: torch.Tensor) -> torch.Tensor:
        """Of these windows, this rank's, as its own numbers."""
        return windows[windows % self.world == self.rank] // self.world

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over ranks."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)

    def least(self, value: int) -> int:
        """The smallest value any rank has."""
        tensor = torch.tensor(value)
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()


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

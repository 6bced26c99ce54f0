"""Several processes ("ranks") on one stage: which windows each rank has, and sums over all ranks (torch.distributed).

Window i belongs to rank i % world, where it is local window i // world. All sums over ranks are sums over windows, so
one process and N processes give the same numbers up to the order of summation.
"""

from typing import Literal

import torch
import torch.distributed as dist

from pipeline.runtime.errors import PipelineError


class RankError(PipelineError):
    """A stage cannot run in this many processes, or one of them failed."""


class Ranks:
    """This process among `world` processes. Alone, no method communicates."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def slice_windows(self, count: int) -> slice:
        """Return the slice of `count` windows that belong to this rank.

        Raises:
            RankError: there are fewer windows than ranks.
        """
        if count < self.world:
            raise RankError(f"runtime.processes={self.world}: there are only {count} windows. Use at most {count}.")
        return slice(self.rank, count, self.world)

    def locate(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the numbers in `windows` that belong to this rank, as its local numbers."""
        return windows[windows % self.world == self.rank] // self.world

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over ranks."""
        self._reduce_("SUM", tensors)

    def min_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its elementwise minimum over ranks."""
        self._reduce_("MIN", tensors)

    def max_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its elementwise maximum over ranks."""
        self._reduce_("MAX", tensors)

    def _reduce_(self, operation: Literal["SUM", "MIN", "MAX"], tensors: tuple[torch.Tensor, ...]) -> None:
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))

    def broadcast_(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by the first rank's."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0)

    def count(self, local_count: int) -> int:
        """Return the sum of the ranks' counts."""
        total = torch.tensor(local_count)
        self.sum_(total)
        return int(total)

    def collect(self, local: torch.Tensor, count: int) -> torch.Tensor:
        """Return [count, …], every window at its place, from each rank's local windows [n, …]."""
        if self.world == 1:
            return local
        whole = local.new_zeros(count, *local.shape[1:])
        whole[self.slice_windows(count)] = local
        self.sum_(whole)
        return whole

    def join(self, local: torch.Tensor) -> torch.Tensor:
        """Return the concatenation of the ranks' tensors [n, …], where n may differ from rank to rank."""
        if self.world == 1:
            return local
        sizes = torch.zeros(self.world, dtype=torch.int64, device=local.device)
        sizes[self.rank] = len(local)
        self.sum_(sizes)
        padded = local.new_zeros(int(sizes.max()), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def shuffle(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random order of `count` windows whose batches of 2, 4, 8 … spread evenly over 2, 4, 8 … ranks.

    A window changes places only with windows of the same remainder modulo `strata`. That number depends on `count`
    alone, so the order is the same for any number of processes.
    """
    strata = 1
    while strata < 64 and strata * 8 <= count:
        strata *= 2
    order = torch.arange(count)
    for remainder in range(strata):
        windows = torch.arange(remainder, count, strata)
        order[windows] = windows[torch.randperm(len(windows), generator=generator)]
    return order

"""Run a stage in several processes: start them, or join those that torchrun started.

    if start_ranks(params.runtime.processes):     # they have done the work
        return
    with join_ranks(params.runtime) as (ranks, device): …

A stage started by hand or by DVC starts its ranks itself, with torch's launcher; started by torchrun, on one machine or
on several that share the project's folder, it joins the ranks there.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as run_launcher

from pipeline.runtime.params import RuntimeParams
from pipeline.runtime.progress import DeviceError, select_device
from pipeline.runtime.ranks import RankError, Ranks

_PER_CORE = 4


def start_ranks(processes: int) -> bool:
    """Run the program again in several ranks on this machine. Return False where one process is enough or ranks exist.

    Raises:
        RankError: far more than the machine has cores; or one of them failed, and its own message has been shown.
    """
    if processes == 1 or "RANK" in os.environ:
        return False
    if processes > _PER_CORE * (cores := os.cpu_count() or 1):
        raise RankError(f"runtime.processes={processes}: the machine has {cores} cores. Lower it.")
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        raise RankError(
            f"runtime.processes={processes} needs a stage that runs as a module. Run: python -m stages.NAME"
        )
    module = spec.name
    try:
        run_launcher(["--standalone", f"--nproc-per-node={processes}", "-m", module, *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RankError(
            f"rank {rank} of {processes} ended with exit code {failure.exitcode}. Its message is above."
        ) from None
    return True


@contextmanager
def join_ranks(runtime: RuntimeParams) -> Iterator[tuple[Ranks, torch.device]]:
    """Return the ranks that a launcher started, or this process alone, and its device, one GPU where there are GPUs.

    Raises:
        DeviceError: `cuda` is asked for and there is none, or there are more ranks on this machine than GPUs.
    """
    device = select_device(runtime)
    if "RANK" not in os.environ:
        yield Ranks(), device
        return
    place, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if here > count:
            raise DeviceError(
                f"runtime.processes={here}: the machine has {count} GPUs. Lower it, or set runtime.device: cpu."
            )
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))  # runtime.threads, where set, comes later
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()

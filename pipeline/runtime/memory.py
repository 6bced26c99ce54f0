"""Memory that one process may use, on the host and on a GPU."""

import psutil
import torch

from pipeline.runtime.params import RuntimeParams

GIB = 2**30
_UNITS = {"MiB": 2**20, "GiB": GIB}


def gpu_limit(runtime: RuntimeParams) -> float:
    """Bytes of GPU memory one process may use: three quarters of what is free, at most `runtime.max_memory`."""
    free, given = 0.75 * torch.cuda.mem_get_info()[0], _given_limit(runtime)
    return free if given is None else min(free, given)


def memory_limit(runtime: RuntimeParams) -> float:
    """Bytes one process may use: `runtime.max_memory`, or three quarters of what the machine has to spare."""
    given = _given_limit(runtime)
    return 0.75 * psutil.virtual_memory().available / runtime.processes if given is None else given


def _given_limit(runtime: RuntimeParams) -> float | None:
    if runtime.max_memory is None:
        return None
    number, unit = runtime.max_memory[:-3], runtime.max_memory[-3:]
    return float(number) * _UNITS[unit]

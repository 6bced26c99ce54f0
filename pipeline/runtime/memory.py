"""The memory that one process may use, on the host and on a GPU. `pipeline/planning` computes the need of a stage."""

import torch

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.free_memory import measure_available
from pipeline.runtime.params import RuntimeParams

GIB = 2**30
_UNITS = {"MiB": 2**20, "GiB": GIB}
_USABLE = 0.75  # of the free memory, so that other programs keep some


def gpu_limit(runtime: RuntimeParams) -> float:
    """Return the bytes that one process may use on the current GPU.

    This is three quarters of the GPU's free memory, and at most `runtime.max_memory`.
    """
    free, _ = torch.cuda.mem_get_info()
    limit = _parse_max_memory(runtime)
    return _USABLE * free if limit is None else min(_USABLE * free, limit)


def memory_limit(runtime: RuntimeParams) -> float:
    """Return the bytes that one process may use on the host.

    This is `runtime.max_memory` where it is set. Otherwise it is three quarters of the memory that is available now,
    divided by `runtime.processes`.

    Raises:
        PipelineError: `runtime.max_memory` is not set, and psutil, which measures the available memory, is missing.
    """
    limit = _parse_max_memory(runtime)
    return _USABLE * _available() / runtime.processes if limit is None else limit


def _parse_max_memory(runtime: RuntimeParams) -> float | None:
    """Return `runtime.max_memory` in bytes: "6GiB" -> 6442450944."""
    if runtime.max_memory is None:
        return None
    number, unit = runtime.max_memory[:-3], runtime.max_memory[-3:]
    return float(number) * _UNITS[unit]


def _available() -> int:
    """Return the bytes of host memory that are available to new processes."""
    if (available := measure_available()) is None:
        raise PipelineError(
            "runtime.max_memory=null: the package psutil, which measures the available memory, is not installed. "
            "Run pip install psutil, or set runtime.max_memory, for example to 8GiB."
        )
    return available

"""The memory that is free now, measured without a package that only some installations have."""

import re
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def measure_free(device: torch.device) -> int:
    """Return the bytes that are free on a CPU or GPU; 0 where they cannot be measured."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return (measure_available() or 0) if device.type == "cpu" else 0


def measure_available() -> int | None:
    """Return the bytes of host memory that are available to new processes.

    Linux says so in /proc/meminfo. Other platforms need psutil; without it the result is None.
    """
    try:
        import psutil
    except ImportError:
        if not _MEMINFO.is_file():
            return None
        kibibytes = re.search(r"^MemAvailable: +(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
        return None if kibibytes is None else int(kibibytes[1]) * 1024
    return psutil.virtual_memory().available

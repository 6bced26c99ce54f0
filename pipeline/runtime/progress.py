"""The frame of every stage: torch is set up, a progress bar is shown, and the metrics file is written at the end."""

import ctypes
import logging
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch
import torch.distributed as dist
from tqdm import tqdm

from pipeline.runtime.artifacts import write_json
from pipeline.runtime.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.runtime.params import RuntimeParams  # imports pydantic, which the core does not need

logger = logging.getLogger(__name__)
T = TypeVar("T")
_bars: list[tqdm] = []
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_STATUS = Path("/proc/self/status")  # Linux

_MKL_FUNCTIONS = (
    *(torch.acos, torch.asin, torch.atan, torch.cos, torch.sin, torch.tan, torch.tanh, torch.erf, torch.erfc),
    *(torch.erfinv, torch.exp, torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2, torch.sqrt, torch.trunc),
)


class DeviceError(PipelineError):
    """The device that was asked for is not available."""


@contextmanager
def run_stage(name: str, metrics_path: Path, runtime: "RuntimeParams", seed: int = 0) -> Iterator[dict[str, Any]]:
    """Seed the generators, set the threads, time the body and write the metrics file.

    The body puts its measurements into the yielded dict. Added at the end: `seconds`, `peak_rss_gib` where the platform
    gives it, and `peak_gpu_gib` (the most that tensors took of GPU memory) where a GPU was used. The file is written
    only if the body succeeds. Among several ranks, only the first one writes and logs.
    """
    first = is_first_rank()
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    for package in ("httpx", "huggingface_hub", "datasets", "fsspec", "transformers", "gguf"):
        logging.getLogger(package).setLevel(logging.WARNING)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    settle_kernels()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    metrics: dict[str, Any] = {}
    start = time.perf_counter()
    yield metrics
    if not first:
        return
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    if (peak := peak_rss_gib()) is not None:
        metrics["peak_rss_gib"] = round(peak, 3)
    if torch.cuda.is_initialized():
        metrics["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    write_json(metrics_path, metrics)
    logger.info("%s: %s", name, ", ".join(f"{key} {_short(value)}" for key, value in metrics.items()))


def settle_kernels() -> None:
    """Call each elementwise function of oneMKL once, on one number and therefore on one thread.

    oneMKL selects a function's kernel in its first call. If several threads make that call at once, one of them may get
    a kernel of low precision (https://github.com/pytorch/pytorch/issues/188792). RoPE's cosines of half of the
    positions, and with them all results, then differ from those of any other run.
    """
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for function in _MKL_FUNCTIONS:
            function(number)


def select_device(runtime: "RuntimeParams") -> torch.device:
    """Return the device of `runtime.device`; `auto` is the GPU if torch finds one.

    Raises:
        DeviceError: the setting is `cuda`, and torch finds no GPU.
    """
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("runtime.device='cuda': torch finds no GPU. Use cpu or auto, or install a CUDA build.")
    return torch.device(runtime.device)


def is_first_rank() -> bool:
    """Return whether this process is the one that writes and logs."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def show_progress(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Iterate over `items` with a progress bar. Only the first rank shows it, and only on a terminal."""
    disable = None if is_first_rank() else True
    bar = tqdm(items, total=total, desc=description, disable=disable, leave=False, dynamic_ncols=True)
    _bars.append(bar)
    try:
        yield from bar
    finally:
        _bars.remove(bar)


def note_progress(**values: Any) -> None:
    """Show values, such as the current loss, at the end of the progress bar that was started last."""
    if _bars and not _bars[-1].disable:
        _bars[-1].set_postfix({key: _short(value) for key, value in values.items()}, refresh=False)


def peak_rss_gib() -> float | None:
    """Return the peak resident memory of this process in GiB, or None where the platform does not give it.

    Linux gives it as VmHWM. The figure of getrusage is the fallback, because on Linux it starts at the parent's size.
    """
    if (peak := _read_status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    # macOS counts in bytes, all other systems in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def return_freed_memory() -> None:
    """Make glibc return large blocks (4 MiB and more) to the system when they are freed. Does nothing without glibc.

    By default glibc keeps blocks of up to 32 MiB. Torch asks for aligned blocks, which are seldom reused, so a backward
    pass through all blocks of a model grows the process to twice the memory in use. Measured there: 2.8 GiB before,
    1.9 GiB after, at the same speed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def current_rss_gib() -> float:
    """Return the resident memory of this process in GiB; 0 where the platform does not give it."""
    return _read_status("VmRSS") or 0.0


def _read_status(key: str) -> float | None:
    """Return a size in /proc/self/status in GiB, or None where there is no such file or line."""
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 2**20
    return None


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + "}"
    return str(value)

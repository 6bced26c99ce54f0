"""What every stage does around its work: start-up of torch, one progress bar, the closing line and metrics file."""

import ctypes
import logging
import os
import random
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as dist
from tqdm import tqdm

from pipeline.runtime.artifacts import write_json
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.params import RuntimeParams

logger = logging.getLogger(__name__)
T = TypeVar("T")
_bars: list[tqdm] = []
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h

_MKL_FUNCTIONS = (
    *(torch.acos, torch.asin, torch.atan, torch.cos, torch.sin, torch.tan, torch.tanh, torch.erf, torch.erfc),
    *(torch.erfinv, torch.exp, torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2, torch.sqrt, torch.trunc),
)


class DeviceError(PipelineError):
    """The device asked for is not there."""


@contextmanager
def run_stage(name: str, metrics_path: Path, runtime: RuntimeParams, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Seed, set threads, time the body and write what it puts into the yielded dict, with `seconds` and `peak_rss_gib`.

    Where a GPU was used, `peak_gpu_gib` is what tensors took of its memory at most. The body adds its measurements to
    the dict; the metrics file appears only when the body ends well. Of several ranks the first one writes and logs.
    """
    first = is_first_rank()
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    for noisy in ("httpx", "huggingface_hub", "datasets", "fsspec", "transformers", "gguf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
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
    metrics["peak_rss_gib"] = round(peak_rss_gib(), 3)
    if torch.cuda.is_initialized():
        metrics["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    write_json(metrics_path, metrics)
    logger.info("%s: %s", name, ", ".join(f"{key} {_short(value)}" for key, value in metrics.items()))


def settle_kernels() -> None:
    """Call each elementwise function that oneMKL computes once, on one number and so on one thread.

    oneMKL looks for a function's kernel in its first call. Where several threads make that call at once, one of them
    may get a kernel of low precision for its share (https://github.com/pytorch/pytorch/issues/188792): RoPE's cosines
    of half of the positions, and with them all results, then differ from those of any other run.
    """
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for function in _MKL_FUNCTIONS:
            function(number)


def select_device(runtime: RuntimeParams) -> torch.device:
    """`auto` is the GPU where torch sees one. Raises DeviceError when `cuda` is asked for and there is none."""
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("runtime.device='cuda', but torch sees no GPU; use cpu or auto, or install a CUDA build")
    return torch.device(runtime.device)


def is_first_rank() -> bool:
    """Whether this process is the one that writes and logs."""
    return not dist.is_initialized() or dist.get_rank() == 0


def show_progress(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Iterate with a bar on a terminal, silently elsewhere and on all ranks but the first."""
    disable = None if is_first_rank() else True
    bar = tqdm(items, total=total, desc=description, disable=disable, leave=False, dynamic_ncols=True)
    _bars.append(bar)
    try:
        yield from bar
    finally:
        _bars.remove(bar)


def note_progress(**values: Any) -> None:
    """Show values (the current loss, …) at the end of the bar that was begun last."""
    if _bars and not _bars[-1].disable:
        _bars[-1].set_postfix({key: _short(value) for key, value in values.items()}, refresh=False)


def peak_rss_gib() -> float:
    """Peak resident memory of this process in GiB.

    Read from VmHWM where there is one: unlike getrusage's figure it does not start at the parent's size.
    """
    if os.path.exists("/proc/self/status"):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def return_freed_memory() -> None:
    """Have glibc give large blocks (4 MiB and more) back as soon as they are freed; does nothing elsewhere.

    By default it keeps blocks of up to 32 MiB, and aligned ones, as torch asks for, are seldom reused: a backward pass
    through all blocks grows the process to twice what is in use. Measured on it: 2.8 GiB become 1.9, at the same speed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def current_rss_gib() -> float:
    """Resident memory of this process in GiB; 0 where the system does not say."""
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + "}"
    return str(value)

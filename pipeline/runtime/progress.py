"""The frame of every stage: torch is set up, a progress bar is shown, and the metrics file is written at the end."""

import ctypes
import logging
import random
import sys
import threading
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
from pipeline.runtime.closing import describe_end
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.pace import estimate_run, format_duration
from pipeline.runtime.stage_list import read_stages

if TYPE_CHECKING:
    from pipeline.runtime.params import RuntimeParams  # imports pydantic, which the core does not need

logger = logging.getLogger(__name__)
T = TypeVar("T")
LINE_SECONDS = 60.0  # between two lines of progress
COSTS = ("seconds", "peak_rss_gib", "peak_gpu_gib", "minutes", "gib")  # figures that differ between machines
_HIDDEN = "_hidden_by_prefixquant"
_bars: list[tqdm] = []
_walks: list["_Walk"] = []  # the outermost first; one for each bar
_title = ""  # of the running stage
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_STATUS = Path("/proc/self/status")  # Linux

_MKL_FUNCTIONS = (
    *(torch.acos, torch.asin, torch.atan, torch.cos, torch.sin, torch.tan, torch.tanh, torch.erf, torch.erfc),
    *(torch.erfinv, torch.exp, torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2, torch.sqrt, torch.trunc),
)


class DeviceError(PipelineError):
    """The device that was asked for is not available."""


@contextmanager
def run_stage(
    name: str, metrics_path: Path, cost_path: Path, runtime: "RuntimeParams", seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Seed the generators, set the threads, time the body, and write the metrics file and the file of its cost.

    The body puts its measurements into the yielded dict. The cost is `seconds`, `peak_rss_gib` where the platform gives
    it, `peak_gpu_gib` (the most that tensors took of GPU memory) where a GPU was used, and the measurements named in
    `COSTS`. The files are written only if the body succeeds. Among several ranks, only the first one writes and logs.
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
    hide_bars()
    title, left = _describe_place(name)
    if not is_terminal():
        logger.info("%s: begins%s", title, left)
    start = time.perf_counter()
    with _showing_lines(f"{title}{left}" if is_terminal() else title):
        yield metrics
    if not first:
        return
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    if (peak := peak_rss_gib()) is not None:
        metrics["peak_rss_gib"] = round(peak, 3)
    if torch.cuda.is_initialized():
        metrics["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    write_json(metrics_path, {key: value for key, value in metrics.items() if key not in COSTS})
    write_json(cost_path, {key: value for key, value in metrics.items() if key in COSTS})
    logger.info("%s: %s", title, describe_end(name, metrics))


def _describe_place(name: str) -> tuple[str, str]:
    """Return a stage with its place in the run ("rotation 7/20"), and the time that the stages after it will take."""
    stages = [stage.name for stage in read_stages(Path())]
    if name not in stages:
        return name, ""
    left = estimate_run(stages, name, Path("metrics/runtime"))
    after = "" if left is None else f", about {format_duration(left)} for the stages after it"
    return f"{name} {stages.index(name) + 1}/{len(stages)}", after


def settle_kernels() -> None:
    """Call each elementwise function of oneMKL once, on one number and therefore on one thread.

    oneMKL selects a function's kernel in its first call. If several threads make that call at once, one of them may get
    a kernel of low precision (https://github.com/pytorch/pytorch/issues/188792). RoPE's cosines of half of the
    positions, and with them all results, then differ from any other run.
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


def show_progress(items: Iterable[T], total: int, description: str, unit: str = "block") -> Iterator[T]:
    """Iterate over `items` and show how far it is: as a bar on a terminal, otherwise in the lines of `run_stage`.

    Only the first rank shows it.

    Args:
        unit: the name of an item, such as "block 11 of 30".
    """
    walk = _Walk(description, unit, total)
    disable = None if is_first_rank() else True
    title = f"{_title}: {description}" if _title else description
    bar = tqdm(items, total=total, desc=title, disable=disable, leave=False, dynamic_ncols=True)
    _bars.append(bar)
    _walks.append(walk)
    try:
        for item in bar:
            _show_values(bar, walk)
            yield item
            walk.done += 1
    finally:
        _bars.remove(bar)
        _walks.remove(walk)


def note_progress(**values: Any) -> None:
    """Show values, such as the current loss, with the progress that was started last."""
    if _bars and not _bars[-1].disable:
        _walks[-1].values = values
        _show_values(_bars[-1], _walks[-1])


def _show_values(bar: tqdm, walk: "_Walk") -> None:
    """Show noted values and memory at the end of a bar."""
    if not bar.disable:
        words = [f"{key}={_short(value)}" for key, value in walk.values.items()]
        bar.set_postfix_str(", ".join([*words, f"{current_rss_gib():.2f} GiB"]), refresh=False)


class _Walk:
    """An iteration in progress: how many of its items are done, and since when."""

    def __init__(self, description: str, unit: str, total: int) -> None:
        self.description, self.unit, self.total = description, unit, total
        self.done = 0
        self.start = time.perf_counter()
        self.values: dict[str, Any] = {}

    def describe(self) -> tuple[str, str]:
        """Return the place, and the time that is left ("" where no item is done)."""
        place = f"{self.description}, {self.unit} {min(self.done + 1, self.total)} of {self.total}"
        if not self.done:
            return place, ""
        left = (time.perf_counter() - self.start) / self.done * (self.total - self.done)
        return place, f"about {format_duration(left)} left"


@contextmanager
def _showing_lines(title: str) -> Iterator[None]:
    """Log a line about every minute while the body runs, unless bars are shown on a terminal."""
    global _title
    _title = title
    ended, start = threading.Event(), time.perf_counter()

    def show() -> None:
        while not ended.wait(LINE_SECONDS):
            logger.info("%s", describe_progress(title, time.perf_counter() - start))

    thread = threading.Thread(target=show, daemon=True)
    if is_first_rank() and not is_terminal():
        thread.start()
    try:
        yield
    finally:
        ended.set()
        _title = ""
        if thread.is_alive():
            thread.join()


def describe_progress(title: str, seconds: float) -> str:
    """Return a line such as `quantizer_init 9/20: quantizing, block 11 of 30, 1:02, about 1:50 left, 0.77 GiB`."""
    place, left = _walks[0].describe() if _walks else ("", "")
    parts = [place, format_duration(seconds), left, f"{current_rss_gib():.2f} GiB"]
    return f"{title}: {', '.join(filter(None, parts))}"


def is_terminal() -> bool:
    """Return whether progress is shown to a person, and not written to a file."""
    return sys.stderr is not None and sys.stderr.isatty()


def hide_bars() -> None:
    """Show no bars of other packages where there is no terminal. They would fill a log file with fragments."""
    if is_terminal() or getattr(tqdm, _HIDDEN, False):
        return
    start = tqdm.__init__

    def start_hidden(self: tqdm, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options | {"disable": True})

    tqdm.__init__ = start_hidden
    setattr(tqdm, _HIDDEN, start)


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

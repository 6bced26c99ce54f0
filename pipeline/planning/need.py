"""What a run needs of a machine before it is run: memory, GPU memory, disk; and what it may use.

    peak = what the process has now + streams in memory + the largest of the phases

The phases of a stage are counted in its module here (`rotation.py`, …) from the model's shapes (`sizes.py`): what a
phase holds of a block (integers, float weights, Gram matrices, gradients, AdamW's two moments, the best state so far),
what a batch takes on its way through it and what autograd keeps of it, what logits take. `python -m benchmarks.stages`
and `python -m benchmarks.finetuning` compare plan and peak.
"""

import math
from dataclasses import dataclass

from pipeline.runtime.memory import GIB, gpu_limit, memory_limit
from pipeline.runtime.params import RuntimeParams
from pipeline.runtime.progress import current_rss_gib

_KERNELS = 0.1 * GIB  # what libraries allocate once they are used
_CUDA = 1.1 * GIB  # what CUDA's libraries do, of the host's memory


@dataclass(frozen=True)
class Need:
    """Bytes a run takes at its peak.

    Attributes:
        memory, gpu: of one process.
        disk: in files, the finished artifact excluded: unfinished work and offloaded streams.
        streams: of `memory` or of `disk`, what hidden states take.
        offload: whether they are on disk.
        recompute: whether training a whole model runs blocks again for the backward pass.
        stream: whether it has the weights of one block in memory at a time.
    """

    memory: float
    gpu: float
    disk: float
    streams: float
    offload: bool = False
    recompute: bool = False
    stream: bool = False

    def describe(self) -> str:
        again = "; activations are computed again" if self.recompute else ""
        again += ", blocks are streamed" if self.stream else ""
        return (
            f"memory {self.memory / GIB:.2f} GiB, GPU {self.gpu / GIB:.2f} GiB, disk {self.disk / GIB:.2f} GiB "
            f"(hidden states, {self.streams / GIB:.2f} GiB, {'in files' if self.offload else 'in memory'}{again})"
        )


@dataclass(frozen=True)
class Share:
    """The text that one process is given.

    Attributes:
        tokens: of all its windows.
        length: of a window.
        batch: tokens of one forward pass.
        on_gpu: whether it computes on one.
    """

    tokens: int
    length: int
    batch: int
    on_gpu: bool

    @classmethod
    def of(cls, windows: list[int], length: int, runtime: RuntimeParams, on_gpu: bool) -> "Share":
        """Of texts of so many `windows` each, as `runtime.processes` share them."""
        tokens = sum(math.ceil(count / runtime.processes) * length for count in windows)
        return cls(tokens, length, min(tokens, runtime.batch_size * length), on_gpu)


def make_need(
    work: float,
    streams: float,
    on_gpu: bool,
    disk: float = 0,
    ahead: float = 0,
    here: float = 0,
    passing: float = 0,
    alone: float = 0,
) -> Need:
    """What a run needs.

    Args:
        work: where one computes.
        ahead: the block that is fetched meanwhile, on a GPU.
        here: on the host, wherever one computes.
        passing: on a GPU's host, the largest thing that passes through it, such as tables on their way to the GPU or a
            block on its way to a file; the larger of it and `ahead` counts. Factors in the plans are fitted to what an
            H200's host took (docs/scaling.md).
        alone: where one computes, in phases that fetch no block ahead.
    """
    has = current_rss_gib() * GIB + _KERNELS + (_CUDA if on_gpu else 0) + here
    own = max(ahead, passing) if on_gpu else max(work, alone)
    return Need(has + streams + own, max(work + ahead, alone) if on_gpu else 0, disk, streams)


def fits(need: Need, runtime: RuntimeParams, on_gpu: bool) -> bool:
    """Whether there is room for what stays in memory: on the GPU where one computes, else here."""
    return need.gpu <= gpu_limit(runtime) if on_gpu else need.memory <= memory_limit(runtime)

"""The text that one process gets."""

import math
from dataclasses import dataclass

from pipeline.runtime.params import RuntimeParams


@dataclass(frozen=True)
class Workload:
    """The text that one process gets.

    Attributes:
        tokens: number of tokens in all its windows.
        all_tokens: number of tokens that all processes get together.
        length: tokens in a window.
        batch: tokens in a forward pass.
        processes: number of processes that divide the windows among them.
        on_gpu: whether the process computes on a GPU.
    """

    tokens: int
    all_tokens: int
    length: int
    batch: int
    processes: int
    on_gpu: bool

    @classmethod
    def of(cls, windows: list[int], length: int, runtime: RuntimeParams, on_gpu: bool) -> "Workload":
        """Return the workload of the process that gets most of several texts.

        Args:
            windows: number of windows in each text.
            length: tokens in a window.
            runtime: its `processes` divide each text among them; its `batch_size` is in windows.
        """
        processes = runtime.processes
        tokens = sum(math.ceil(count / processes) * length for count in windows)
        batch = min(tokens, runtime.batch_size * length)
        return cls(tokens, sum(windows) * length, length, batch, processes, on_gpu)

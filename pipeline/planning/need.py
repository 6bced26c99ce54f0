"""Memory, GPU memory and disk that a run needs.

    peak = memory of the process now + hidden states in memory + the largest phase

A phase is a step of a stage, such as "one block is trained" or "logits are computed". The module of a stage
(`rotation.py`, …) counts its phases from the model's shapes (`sizes.py`): weights, gradients, the optimizer's state,
and a batch on its way through a block. `python -m benchmarks.speed.stages` and `python -m benchmarks.speed.finetuning`
compare plans with measured peaks.
"""

from dataclasses import dataclass, replace

from pipeline.planning.constants import CUDA_ON_HOST, KERNELS
from pipeline.runtime.memory import GIB, gpu_limit, memory_limit
from pipeline.runtime.params import RuntimeParams
from pipeline.runtime.progress import current_rss_gib


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs at its peak.

    Attributes:
        memory, gpu: need of one process.
        hidden_states: hidden states of one process's windows. They are part of `memory`, or with `offload` of
            `work_files`.
        artifact: files that the stage leaves.
        work_files: files that all processes write and remove at the end: unfinished work and offloaded hidden states.
        offload: whether hidden states are in files.
        recompute: whether blocks run again for the backward pass.
        stream: whether the weights of one block at a time are in memory.
    """

    memory: float
    gpu: float = 0.0
    hidden_states: float = 0.0
    artifact: float = 0.0
    work_files: float = 0.0
    offload: bool = False
    recompute: bool = False
    stream: bool = False

    @property
    def disk(self) -> float:
        """Return the bytes of all files that the run writes."""
        return self.artifact + self.work_files

    def or_larger(self, other: "Need") -> "Need":
        """Return this need with memory, GPU memory and hidden states of the larger of both.

        For two phases of one stage.
        """
        return replace(
            self,
            memory=max(self.memory, other.memory),
            gpu=max(self.gpu, other.gpu),
            hidden_states=max(self.hidden_states, other.hidden_states),
        )

    def describe(self) -> str:
        """Return the text that `--plan` prints."""
        notes = ["in files" if self.offload else "in memory"]
        if self.recompute:
            notes.append("; activations are computed again")
        if self.stream:
            notes.append(", blocks are streamed")
        memory, gpu, disk, hidden, artifact, work = (
            f"{size / GIB:.2f} GiB"
            for size in (self.memory, self.gpu, self.disk, self.hidden_states, self.artifact, self.work_files)
        )
        return (
            f"memory {memory}, GPU {gpu}, disk {disk} (hidden states, {hidden}, {''.join(notes)})\n"
            f"Disk counts the artifact ({artifact}) and work files that are removed at the end ({work}).\n"
            "It does not count reports, plots (a few MiB) and the artifact of an earlier run, which is replaced."
        )


def make_need(
    *,
    on_gpu: bool,
    compute: float,
    compute_alone: float = 0.0,
    next_block: float = 0.0,
    hidden_states: float = 0.0,
    host: float = 0.0,
    through_host: float = 0.0,
    artifact: float = 0.0,
    work_files: float = 0.0,
) -> Need:
    """Compute the memory of one process at its peak from its largest phases.

    On a CPU, everything is in the host's memory. With a GPU, blocks and batches are in the GPU's memory. The host then
    holds hidden states and the largest thing that passes through it.

    Args:
        on_gpu: whether a GPU computes.
        compute: largest phase during which a GPU fetches the next block.
        compute_alone: largest phase during which no block is fetched.
        next_block: the block that a GPU fetches while the one before it computes.
        hidden_states: hidden states of all windows, always on the host.
        host: more on the host, whichever device computes.
        through_host: largest thing that passes through a GPU's host, such as embeddings on their way to the GPU or a
            block on its way to a file.
        artifact, work_files: files that the stage leaves, and files that it removes at the end.
    """
    process = current_rss_gib() * GIB + KERNELS
    if on_gpu:
        memory = process + CUDA_ON_HOST + host + hidden_states + max(next_block, through_host)
        gpu = max(compute + next_block, compute_alone)
    else:
        memory = process + host + hidden_states + max(compute, compute_alone)
        gpu = 0.0
    return Need(memory, gpu, hidden_states, artifact, work_files)


def fits(need: Need, runtime: RuntimeParams, on_gpu: bool) -> bool:
    """Return whether there is room: in the GPU's memory if a GPU computes, else in the host's."""
    return need.gpu <= gpu_limit(runtime) if on_gpu else need.memory <= memory_limit(runtime)

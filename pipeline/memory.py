"""What fine-tuning will need before it is run: memory, GPU memory, disk.

    peak = what the process has now + streams in memory + the larger of the phases

Sizes are counted from the model's shapes: what a phase holds of a block (integers, float weights, gradients, AdamW's
two moments, the best state so far), what autograd keeps of a batch, what logits take. Counts of floats a token are
measured on Llama-shaped blocks (`python -m benchmarks.finetuning` compares plan and peak).
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import Checkpoint
from pipeline.params import FinetuningParams, ParamsError, RuntimeParams
from pipeline.progress import current_rss_gib

GIB = 2**30
_POSITIONS = 128  # of divergence.py
_KERNELS = 0.1 * GIB  # what libraries allocate once they are used
_UNITS = {"MiB": 2**20, "GiB": GIB}


@dataclass(frozen=True)
class Need:
    """Bytes a run takes at its peak.

    Attributes:
        memory, gpu: of one process.
        disk: in files, the finished artifact excluded: unfinished work and offloaded streams.
        streams: of `memory` or of `disk`, what hidden states take.
        offload: whether they are on disk.
    """

    memory: float
    gpu: float
    disk: float
    streams: float
    offload: bool

    def describe(self) -> str:
        return (
            f"memory {self.memory / GIB:.2f} GiB, GPU {self.gpu / GIB:.2f} GiB, disk {self.disk / GIB:.2f} GiB "
            f"(hidden states, {self.streams / GIB:.2f} GiB, {'in files' if self.offload else 'in memory'})"
        )


def plan_finetuning(
    checkpoint: Checkpoint,
    windows: int,
    length: int,
    params: FinetuningParams,
    runtime: RuntimeParams,
    on_gpu: bool,
) -> Need:
    """What fine-tuning takes.

    Args:
        checkpoint: the rotated model.
        windows: training and validation windows of this process together, `length` tokens each.
    """
    config, block = checkpoint.config, checkpoint.build_block(0)
    hidden, inner = config.hidden_size, config.intermediate_size
    vocabulary, blocks = config.vocab_size, checkpoint.block_count
    numbers = sum(parameter.numel() for parameter in block.parameters())
    keys = config.num_key_value_heads * block.self_attn.head_dim
    item = checkpoint.dtype.itemsize
    kept = {"fp_input": 2, "quant_input": 2, "both": 3}[params.target]
    streams = windows * length * hidden * item * kept
    trained = params.weight_lr > 0 or params.start == "full_precision"
    # Integers; float weights, their gradients, two moments, best state, what rounding leaves and AdamW's temporaries.
    state = numbers * (1 + (4 * 8 if trained else 4))
    tokens = params.batch_size * length
    per_token = 4.6 * (28 * hidden + 10 * inner + 8 * keys)
    training = state + tokens * per_token
    forward = numbers * 5 + runtime.batch_size * length * 4 * (6 * hidden + 4 * inner)
    embedding = vocabulary * hidden * item
    phases = [training, forward, embedding]
    if params.end_to_end.enabled:
        logits = _POSITIONS * vocabulary * 4 * 5
        states = blocks * params.end_to_end.batch_size * length * hidden * 4
        model = blocks * numbers * 1.05 + numbers * 4 * 3
        batch = params.end_to_end.batch_size * length * per_token
        phases.append(model + states + batch + 2 * vocabulary * hidden * 4 + logits)
    work = max(phases)
    has = current_rss_gib() * GIB + _KERNELS
    disk = blocks * numbers * (2 if params.end_to_end.enabled else 1) + windows * length * hidden * item * 2
    in_memory = has + streams + (0 if on_gpu else work)
    offload = runtime.offload == "always" or (runtime.offload == "auto" and in_memory > memory_limit(runtime))
    # Saving maps the files once, one stream at a time.
    return Need(
        memory=in_memory - (streams * (1 - 1 / (2 * kept)) if offload else 0),
        gpu=work if on_gpu else 0,
        disk=disk + (streams if offload else 0),
        streams=streams,
        offload=offload,
    )


def memory_limit(runtime: RuntimeParams) -> float:
    """Bytes one process may use: `runtime.max_memory`, or three quarters of what the machine has to spare."""
    if runtime.max_memory is not None:
        number, unit = runtime.max_memory[:-3], runtime.max_memory[-3:]
        return float(number) * _UNITS[unit]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else ():
        if line.startswith("MemAvailable:"):
            return 0.75 * int(line.split()[1]) * 1024 / runtime.processes
    raise ParamsError("runtime.max_memory=null: this machine does not say how much memory is free; set it, say to 8GiB")

"""What a walking stage will need before it is run: memory, GPU memory, disk.

    peak = what the process has now + streams in memory + the largest of the phases

Sizes are counted from the model's shapes: what a phase holds of a block (integers, float weights, Gram matrices,
gradients, AdamW's two moments, the best state so far), what a batch takes on its way through it and what autograd keeps
of it, what logits take. Counts of floats a token or a weight are measured on Llama-shaped models
(`python -m benchmarks.stages` and `python -m benchmarks.finetuning` compare plan and peak).
"""

import math
from dataclasses import dataclass, replace

import psutil
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.params import FinetuningParams, PrefixTrainingParams, QuantizerInitParams, RuntimeParams
from pipeline.progress import current_rss_gib

GIB = 2**30
_POSITIONS = 128  # of divergence.py and perplexity.py, whose logits exist at a time
_TASK_TOKENS = 224
_ROTATED = 1 << 23  # entries of a matrix rotation.py has in float64 at a time
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
        recompute: whether training a whole model runs blocks again for the backward pass.
    """

    memory: float
    gpu: float
    disk: float
    streams: float
    offload: bool = False
    recompute: bool = False

    def describe(self) -> str:
        again = "; activations are computed again" if self.recompute else ""
        return (
            f"memory {self.memory / GIB:.2f} GiB, GPU {self.gpu / GIB:.2f} GiB, disk {self.disk / GIB:.2f} GiB "
            f"(hidden states, {self.streams / GIB:.2f} GiB, {'in files' if self.offload else 'in memory'}{again})"
        )


@dataclass(frozen=True)
class Sizes:
    """What matters of a model's shape.

    Attributes:
        hidden, inner, keys, queries: widths of the residual stream, the MLP, all keys' heads, all queries' heads.
        vocabulary, blocks: how many.
        numbers: parameters of a block.
        item: bytes of one of them in the checkpoint.
    """

    hidden: int
    inner: int
    keys: int
    queries: int
    vocabulary: int
    blocks: int
    numbers: int
    item: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Sizes":
        config, block = checkpoint.config, checkpoint.build_block(0)
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_key_value_heads * block.self_attn.head_dim,
            config.num_attention_heads * block.self_attn.head_dim,
            config.vocab_size,
            checkpoint.block_count,
            sum(parameter.numel() for parameter in block.parameters()),
            checkpoint.dtype.itemsize,
        )

    @property
    def table(self) -> int:
        """Bytes of the embedding, or of lm_head."""
        return self.vocabulary * self.hidden * self.item

    @property
    def logits(self) -> int:
        return _POSITIONS * self.vocabulary * 4

    def stream(self, tokens: int) -> int:
        return tokens * self.hidden * self.item

    def forward(self, tokens: int) -> int:
        """What a batch takes on its way through a block, without gradients."""
        return tokens * 4 * (6 * self.hidden + 4 * self.inner)

    def graph(self, tokens: int) -> float:
        """What autograd keeps of a batch in a quantized block."""
        return tokens * 4.6 * (28 * self.hidden + 10 * self.inner + 8 * self.keys)

    def kept_graphs(self, tokens: int) -> float:
        """The same of all blocks at once."""
        return self.blocks * tokens * 2.8 * (28 * self.hidden + 10 * self.inner + 8 * self.keys)


def plan_rotation(checkpoint: Checkpoint, dtype: torch.dtype) -> Need:
    """What rotating takes: a block before and after and a tensor in float64, or embedding and lm_head."""
    sizes = Sizes.of(checkpoint)
    entries = sizes.vocabulary * sizes.hidden
    sources = 1 if checkpoint.config.tie_word_embeddings else 2
    tables = entries * (sources * sizes.item + 2 * dtype.itemsize) + _ROTATED * 8
    narrow = 0 if dtype == torch.float32 else dtype.itemsize
    block = sizes.numbers * (sizes.item + 4 + narrow) + 8 * sizes.hidden * sizes.inner + _ROTATED * 8
    return _need(max(block, tables), 0, on_gpu=False)


def plan_walk(checkpoint: Checkpoint, tokens: int, batch: int, on_gpu: bool) -> Need:
    """What a walk in full precision takes.

    Args:
        tokens: of all windows of this process.
        batch: tokens of one batch.
    """
    sizes = Sizes.of(checkpoint)
    block = sizes.numbers * sizes.item
    return _need(block + sizes.forward(batch), sizes.stream(tokens), on_gpu, ahead=block)


def plan_evaluation(
    checkpoint: Checkpoint, tokens: int, batch: int, compared: bool, in_memory: bool, task_items: int, on_gpu: bool
) -> Need:
    """What evaluating a variant takes; arguments as of `plan_walk`.

    Args:
        compared: with the original's final hidden states.
        in_memory: perplexity is that of the whole model (the exported one).
        task_items: of tasks asked at a time; 0 without tasks. Their texts are taken to be `_TASK_TOKENS` long.
    """
    sizes = Sizes.of(checkpoint)
    quantized = bool(checkpoint.settings)
    block = sizes.numbers * (1 + 4 if quantized else sizes.item)
    scoring = (sizes.table + 9 * sizes.logits) if compared else 5 * sizes.logits
    heads = sizes.table * (1.5 if quantized else 1)  # stored in bfloat16 and computed in float32
    model = sizes.blocks * block + 2 * sizes.table
    asked = task_items * _TASK_TOKENS
    phases = [block + sizes.forward(batch), heads + scoring]
    phases += [model + sizes.forward(batch), model + scoring] if in_memory else []
    phases += [model + sizes.forward(asked) + 2 * asked * sizes.vocabulary * 4] if asked else []
    ahead = sizes.numbers * (1 if quantized else sizes.item)
    return _need(max(phases), sizes.stream(tokens) * (2 if compared else 1), on_gpu, ahead=ahead)


def plan_prefix_training(
    checkpoint: Checkpoint,
    tokens: int,
    length: int,
    params: PrefixTrainingParams,
    runtime: RuntimeParams,
    on_gpu: bool,
) -> Need:
    """What training a prefix takes: the whole model, and what its blocks, or one of them, keep of a batch."""
    sizes = Sizes.of(checkpoint)
    if not params.enabled:
        return Need(current_rss_gib() * GIB, 0, 0, 0)
    batch = params.batch_size * (length + (params.length or 0))
    heads = sizes.table + 5 * sizes.logits if params.weights.kl else 0
    model = 2 * (sizes.blocks * sizes.numbers * sizes.item + sizes.table)  # measured: as read and as run
    streams = sizes.stream(tokens) if params.weights.kl else 0
    # Frozen weights need no inputs for the backward pass: less is kept than where scales are trained.
    kept = _need(model + heads + 0.75 * sizes.kept_graphs(batch), streams, on_gpu)
    if fits(kept, memory_limit(runtime), on_gpu):
        return kept
    again = sizes.blocks * batch * sizes.hidden * 4 + 0.85 * sizes.graph(batch)
    return replace(_need(model + heads + again, streams, on_gpu), recompute=True)


def plan_quantizer_init(
    checkpoint: Checkpoint, tokens: int, length: int, params: QuantizerInitParams, batch: int, on_gpu: bool
) -> Need:
    """What choosing quantizers takes: a block, Gram matrices, samples, and a batch or GPTQ's forms of a weight."""
    sizes = Sizes.of(checkpoint)
    widths = (sizes.hidden, sizes.queries, sizes.hidden, sizes.inner)
    square = 4 * max(widths) ** 2
    grams = 4 * sum(width * width for width in widths)
    sampled = min(params.mse_samples * length, tokens)
    samples = sampled * 4 * (5 * sizes.hidden + 2 * sizes.queries + 3 * sizes.keys + sizes.inner)
    block = sizes.numbers * sizes.item
    recording = square + max(sizes.forward(batch), sizes.forward(sampled))
    rounding = square + 5 * 4 * sizes.hidden * sizes.inner
    assembling = sizes.table + 2 * sizes.vocabulary * sizes.hidden * getattr(torch, params.embedding_dtype).itemsize
    work = max(block + grams + samples + max(recording, rounding), assembling)
    disk = sizes.blocks * sizes.numbers + 2 * sizes.stream(tokens)
    return _need(work, sizes.stream(tokens), on_gpu, disk, ahead=block)


def plan_export(checkpoint: Checkpoint, shard: int) -> Need:
    """What packing takes: a shard of at most `shard` bytes, embedding and lm_head whole, and a block in integers."""
    sizes = Sizes.of(checkpoint)
    tables = 2 * sizes.vocabulary * sizes.hidden * 2
    packed = sizes.blocks * sizes.numbers // 2 + tables
    return _need(min(packed, max(shard, tables)) + sizes.numbers, 0, on_gpu=False)


def own_tokens(windows: int, length: int, processes: int) -> int:
    """Tokens of the windows that one of `processes` takes."""
    return math.ceil(windows / processes) * length


def _need(work: float, streams: float, on_gpu: bool, disk: float = 0, ahead: float = 0) -> Need:
    """`ahead`: the block that is fetched while another one computes, on a GPU."""
    has = current_rss_gib() * GIB + _KERNELS
    return Need(has + streams + (ahead if on_gpu else work), work + ahead if on_gpu else 0, disk, streams)


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
    sizes = Sizes.of(checkpoint)
    kept = {"fp_input": 2, "quant_input": 2, "both": 3}[params.target]
    streams = sizes.stream(windows * length) * kept
    trained = params.weight_lr > 0 or params.start == "full_precision"
    # Integers; float weights, their gradients, two moments, best state, and what rounding leaves.
    state = sizes.numbers * (1 + (4 * 6 if trained else 4))
    training = state + sizes.graph(params.batch_size * length)
    forward = sizes.numbers * 5 + sizes.forward(runtime.batch_size * length)
    phases = [training, forward, sizes.table]
    model = sizes.blocks * sizes.numbers
    disk = model * (2 if params.end_to_end.enabled else 1) + 2 * sizes.stream(windows * length)
    limit = memory_limit(runtime)

    def put_together(recompute: bool) -> Need:
        own = []
        if params.end_to_end.enabled:
            batch = params.end_to_end.batch_size * length
            weights = model * 1.05 + sizes.numbers * 4 * 3
            states = sizes.blocks * batch * sizes.hidden * 4
            heads = 2 * sizes.vocabulary * sizes.hidden * 4 + 5 * sizes.logits
            graph = sizes.graph(batch) if recompute else sizes.kept_graphs(batch)
            own.append(weights + states + graph + heads)
        need = _need(max(phases + own), streams, on_gpu, disk, ahead=sizes.numbers * sizes.item)
        if runtime.offload == "never" or (runtime.offload == "auto" and need.memory <= limit):
            return replace(need, recompute=recompute)
        # Saving maps the files once, one stream at a time.
        in_memory = need.memory - streams * (1 - 1 / (2 * kept))
        return Need(in_memory, need.gpu, disk + streams, streams, offload=True, recompute=recompute)

    need = put_together(recompute=False)
    if not params.end_to_end.enabled:
        return need
    # Who always asks for files wants memory for something else.
    return need if fits(need, limit, on_gpu) and runtime.offload != "always" else put_together(recompute=True)


def fits(need: Need, limit: float, on_gpu: bool) -> bool:
    """Whether there is room for what stays in memory, on the GPU or, within `limit` bytes, here."""
    return need.gpu <= gpu_limit() if on_gpu else need.memory <= limit


def gpu_limit() -> float:
    """Bytes of GPU memory one process may use: three quarters of what is free."""
    return 0.75 * torch.cuda.mem_get_info()[0]


def memory_limit(runtime: RuntimeParams) -> float:
    """Bytes one process may use: `runtime.max_memory`, or three quarters of what the machine has to spare."""
    if runtime.max_memory is not None:
        number, unit = runtime.max_memory[:-3], runtime.max_memory[-3:]
        return float(number) * _UNITS[unit]
    return 0.75 * psutil.virtual_memory().available / runtime.processes

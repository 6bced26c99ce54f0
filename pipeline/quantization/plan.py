"""What choosing quantizers will take."""

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sizes import Sizes
from pipeline.quantization.params import QuantizerInitParams
from pipeline.runtime.memory import Need, Share, make_need


def plan_quantizer_init(checkpoint: Checkpoint, share: Share, params: QuantizerInitParams) -> Need:
    """What choosing quantizers takes: a block, Gram matrices, samples, and a batch or GPTQ's forms of a weight.

    Before that, to equalize, hidden states of the sampled windows in front of every block.
    """
    sizes = Sizes.of(checkpoint)
    widths = (sizes.hidden, sizes.queries, sizes.hidden, sizes.inner)
    square = 4 * max(widths) ** 2
    grams = 4 * sum(width * width for width in widths)
    sampled = min(params.mse_samples * share.length, share.tokens)
    batch = min(sampled, share.batch)
    samples = sampled * 4 * (5 * sizes.hidden + 2 * sizes.queries + 3 * sizes.keys + sizes.inner)
    block = sizes.numbers * sizes.item
    recording = square + max(sizes.forward(share.batch), sizes.forward(sampled))
    # A matrix is factorised in place, but with four more of its size on a GPU (measured on an H100).
    rounding = max(square + 5 * 4 * sizes.hidden * sizes.inner, 5 * square if share.on_gpu else 0)
    assembling = sizes.table + 2 * sizes.vocabulary * sizes.hidden * getattr(torch, params.embedding_dtype).itemsize
    equalizing = block + sizes.blocks * sizes.stream(sampled) + max(sizes.graph(batch), 7 * sizes.logits)
    # Recording has all Gram matrices; by the widest weight's turn only its own is left.
    choosing = block + samples + max(grams + recording, square + rounding)
    work = max(choosing, assembling, equalizing if params.equalize else 0)
    disk = sizes.blocks * sizes.numbers + 2 * sizes.stream(share.tokens)
    streams, passing = sizes.stream(share.tokens), sizes.numbers * 5  # integers, and what they stand for
    return make_need(work, streams, share.on_gpu, disk, ahead=sizes.ahead, passing=passing)

"""What choosing quantizers will take."""

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need, Share, make_need
from pipeline.planning.sizes import Sizes
from pipeline.quantization.params import QuantizerInitParams


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
    # A matrix is factorised in place, but with four more of its size on a GPU.
    rounding = max(square + 5 * 4 * sizes.hidden * sizes.inner, 5 * square if share.on_gpu else 0)
    tables = 2 * sizes.vocabulary * sizes.hidden * getattr(torch, params.embedding_dtype).itemsize
    equalizing = block + sizes.blocks * sizes.stream(sampled) + max(sizes.graph(batch), 7 * sizes.logits)
    # Recording has all Gram matrices; by the widest weight's turn only its own is left.
    choosing = block + samples + max(grams + recording, square + rounding)
    work = max(choosing, equalizing if params.equalize else 0)
    if not share.on_gpu:  # embedding and lm_head are rounded on the host
        work = max(work, sizes.table + tables)
    disk = sizes.blocks * sizes.numbers + 2 * sizes.stream(share.tokens)
    rounded = tables + (sizes.table if sizes.item == 4 else 0)
    passing = max(sizes.numbers * 5, rounded)  # integers and what they stand for
    return make_need(work, sizes.stream(share.tokens), share.on_gpu, disk, ahead=sizes.ahead, passing=passing)

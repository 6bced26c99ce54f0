"""Memory and disk of `quantizer_init`."""

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.constants import (
    BLOCK_BYTES_THROUGH_HOST,
    FACTORISED_ON_GPU,
    GPTQ_COPIES,
    SENSITIVITY_LOGITS,
)
from pipeline.planning.disk import count_quantized_blocks, count_rounded_tables, measure_companions
from pipeline.planning.need import Need, make_need
from pipeline.planning.sizes import Sizes
from pipeline.planning.workload import Workload
from pipeline.quantization.block_init import STACKED
from pipeline.quantization.params import QuantizerInitParams
from pipeline.quantization.sensitivity import LOGIT_POSITIONS


def plan_quantizer_init(checkpoint: Checkpoint, workload: Workload, params: QuantizerInitParams) -> Need:
    """Plan the choice of quantizers.

    Phases: measure channels to equalize them; record a block's statistics; round its weights; round the embeddings.
    With a budget, all blocks are quantized for every number of bits before, and these are kept on disk.

    Args:
        checkpoint: the rotated model.
    """
    sizes, on_gpu = Sizes.of(checkpoint), workload.on_gpu
    sampled = min(params.mse_samples * workload.length, workload.tokens)
    # To equalize, hidden states of the sampled windows are kept before every block.
    batch = min(sampled, workload.batch)
    differentiating = max(sizes.graph(batch), SENSITIVITY_LOGITS * sizes.logits(LOGIT_POSITIONS))
    equalizing = sizes.block + sizes.blocks * sizes.hidden_states(sampled) + differentiating
    # Gram matrices [width, width] of the inputs of q/k/v, o, gate/up, and down.
    widths = (sizes.hidden, sizes.queries, sizes.hidden, *sizes.mlps)
    largest_gram = 4 * max(widths) ** 2
    all_grams = 4 * sum(width**2 for width in widths)
    samples = sampled * 4 * (5 * sizes.hidden + 2 * sizes.queries + 3 * sizes.keys + sizes.inner)
    recording = all_grams + largest_gram + max(sizes.forward(workload.batch), sizes.forward(sampled))
    # When GPTQ reaches the widest weight, the other Gram matrices are gone.
    largest_weight = 4 * sizes.hidden * max(sizes.mlps)
    if len(sizes.mlps) > 1:  # the gate projections of all experts are rounded together
        largest_weight = max(largest_weight, 4 * min(STACKED, sizes.hidden * sum(sizes.mlps)))
    factorising = FACTORISED_ON_GPU * largest_gram if on_gpu else 0
    rounding = largest_gram + max(largest_gram + GPTQ_COPIES * largest_weight, factorising)
    compute: float = sizes.block + samples + max(recording, rounding)
    candidates = len(params.budget.choices) if params.budget.bounds else 0
    if candidates:
        # A block in full precision is scaled in float64 and differentiated next to its quantized copies.
        quantized = candidates * (sizes.block + sizes.weights)
        scaling = 8 * sizes.weights
        compute = max(
            compute, equalizing + quantized, sizes.blocks * sizes.hidden_states(sampled) + scaling + quantized
        )
    if params.equalize:
        # The scaled block is compared with a copy in float64, while tensors of one weight are scaled.
        checking = 2 * sizes.block + 8 * sizes.weights + 2 * 8 * sizes.hidden * sizes.inner
        compute = max(compute, equalizing, checking)
    # The host rounds embedding and lm_head.
    tables = count_rounded_tables(sizes, params)
    if not on_gpu:
        compute = max(compute, sizes.table + tables)
    rounded_tables = tables + (sizes.table if sizes.itemsize == 4 else 0)
    unrounded = 2 * sizes.blocks * sizes.weights if params.keep_unrounded else 0
    generations = 2 if workload.processes == 1 else 3  # hidden states after a block; the older ones go at the end
    blocks = count_quantized_blocks(checkpoint, params).total
    return make_need(
        on_gpu=on_gpu,
        compute=compute,
        next_block=sizes.next_block,
        hidden_states=sizes.hidden_states(workload.tokens),
        through_host=max(BLOCK_BYTES_THROUGH_HOST * sizes.weights, rounded_tables),
        artifact=blocks + tables + measure_companions(checkpoint) + unrounded,
        # The values before rounding are copied at the end.
        work_files=(1 + candidates) * generations * sizes.hidden_states(workload.all_tokens)
        + candidates * blocks
        + unrounded,
    )

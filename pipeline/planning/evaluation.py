"""Memory and disk of `evaluation`."""

from pipeline.evaluation.perplexity import LOGIT_POSITIONS
from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.constants import (
    COMPARED_LOGITS,
    PERPLEXITY_LOGITS,
    QUANTIZED_TABLES_THROUGH_HOST,
    TASK_TOKENS,
)
from pipeline.planning.need import Need, make_need
from pipeline.planning.sizes import Sizes
from pipeline.planning.workload import Workload

_TOKEN_ID = 8  # bytes


def plan_evaluation(
    checkpoint: Checkpoint, workload: Workload, *, compared: bool, in_memory: bool, task_items: int
) -> Need:
    """Plan the evaluation of a variant.

    Args:
        checkpoint: the variant, in full precision or quantized.
        compared: whether it is compared with the original's final hidden states.
        in_memory: whether perplexity is computed by the whole model (`export`) instead of a walk. Its hidden
            states are then compared with `finetuning` as well.
        task_items: items of tasks in a batch, each taken to be `TASK_TOKENS` long. 0 if there are no tasks.
    """
    sizes = Sizes.of(checkpoint)
    quantized = bool(checkpoint.settings)
    block = sizes.block
    if quantized:  # its integers, and one linear in float32 while it is dequantized
        block += sizes.weights + (4 * sizes.hidden * sizes.inner if sizes.itemsize < 4 else 0)
    model = sizes.blocks * block + 2 * sizes.table
    logits = sizes.logits(LOGIT_POSITIONS)
    scoring = sizes.table + COMPARED_LOGITS * logits if compared else PERPLEXITY_LOGITS * logits
    lm_head: float = sizes.table
    if quantized and sizes.itemsize == 4:  # stored in bfloat16, computed in float32
        lm_head *= 1.5
    phases = [block + sizes.forward(workload.batch)]
    if in_memory:
        phases += [model + sizes.forward(workload.batch), model + scoring]
    if task_items:
        task_tokens = task_items * TASK_TOKENS
        phases.append(model + sizes.forward(task_tokens) + 2 * sizes.logits(task_tokens))
    return make_need(
        on_gpu=workload.on_gpu,
        compute=max(phases),
        compute_alone=lm_head + scoring,
        next_block=sizes.next_block // sizes.itemsize if quantized else sizes.next_block,
        hidden_states=sizes.hidden_states(workload.tokens) * (1 + compared + in_memory),
        through_host=QUANTIZED_TABLES_THROUGH_HOST * sizes.table if quantized else sizes.tables_through_host,
        artifact=sizes.hidden_states(workload.all_tokens) + workload.all_tokens * _TOKEN_ID,
    )

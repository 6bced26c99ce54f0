"""What an evaluation will take."""

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need, Share, make_need
from pipeline.planning.sizes import Sizes

_TASK_TOKENS = 224


def plan_evaluation(checkpoint: Checkpoint, share: Share, compared: bool, in_memory: bool, task_items: int) -> Need:
    """What evaluating a variant takes.

    Args:
        compared: with the original's final hidden states.
        in_memory: perplexity is that of the whole model (the exported one).
        task_items: of tasks asked at a time; 0 without tasks. Their texts are taken to be `_TASK_TOKENS` long.
    """
    sizes = Sizes.of(checkpoint)
    quantized = bool(checkpoint.settings)
    block = sizes.numbers * sizes.item
    if quantized:  # integers, and one linear in float32 on its way to what they stand for
        block += sizes.numbers + (4 * sizes.hidden * sizes.inner if sizes.item < 4 else 0)
    scoring = (sizes.table + 9 * sizes.logits) if compared else 5 * sizes.logits
    heads = sizes.table * (1.5 if quantized and sizes.item == 4 else 1)  # stored in bfloat16, computed in float32
    model = sizes.blocks * block + 2 * sizes.table
    asked = task_items * _TASK_TOKENS
    ahead = sizes.ahead // sizes.item if quantized else sizes.ahead
    phases = [block + sizes.forward(share.batch)]
    phases += [model + sizes.forward(share.batch), model + scoring] if in_memory else []
    phases += [model + sizes.forward(asked) + 2 * asked * sizes.vocabulary * 4] if asked else []
    streams = sizes.stream(share.tokens) * (2 if compared else 1)
    passing = 2 * sizes.table if quantized else sizes.tables_passing
    return make_need(max(phases), streams, share.on_gpu, ahead=ahead, passing=passing, alone=heads + scoring)

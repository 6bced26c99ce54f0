"""Memory of the comparison of prefixes in full precision, which `prefix_search` and `prefix_training` end with."""

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.constants import KL_LOGITS
from pipeline.planning.need import Need, make_need
from pipeline.planning.sizes import Sizes
from pipeline.planning.workload import Workload
from pipeline.prefix.harm import HARM_TOKENS, find_harm_length
from pipeline.training.divergence import LOGIT_POSITIONS


def plan_harm(checkpoint: Checkpoint, workload: Workload, prefixes: int) -> Need:
    """Plan one walk with hidden states of the original and after each prefix, on windows beyond any sliding window.

    Args:
        checkpoint: the original model.
        workload: workload of the stage.
        prefixes: how many are compared.
    """
    sizes, length = Sizes.of(checkpoint), find_harm_length(checkpoint, workload.length, 0)
    tokens = max(HARM_TOKENS, length)
    batch = min(tokens, workload.batch // workload.length * length)
    scoring = sizes.table + KL_LOGITS * sizes.logits(LOGIT_POSITIONS)
    return make_need(
        on_gpu=workload.on_gpu,
        compute=max(sizes.block + sizes.forward(batch), scoring),
        next_block=sizes.next_block,
        hidden_states=(1 + prefixes) * sizes.hidden_states(tokens),
        through_host=sizes.tables_through_host,
    )

"""Memory of a walk over the blocks in full precision."""

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need, make_need
from pipeline.planning.sizes import Sizes
from pipeline.planning.workload import Workload


def plan_walk(checkpoint: Checkpoint, workload: Workload) -> Need:
    """Plan a walk: a block, a batch in it, and hidden states of all windows. It writes no large file."""
    sizes = Sizes.of(checkpoint)
    return make_need(
        on_gpu=workload.on_gpu,
        compute=sizes.block + sizes.forward(workload.batch),
        next_block=sizes.next_block,
        hidden_states=sizes.hidden_states(workload.tokens),
        through_host=sizes.tables_through_host,
    )

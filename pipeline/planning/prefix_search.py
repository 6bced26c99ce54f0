"""Memory of `prefix_search`."""

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.constants import KL_LOGITS, SIMULATED_BATCHES_ON_GPU
from pipeline.planning.harm import plan_harm
from pipeline.planning.need import Need, make_need
from pipeline.planning.sizes import Sizes
from pipeline.planning.walk import plan_walk
from pipeline.planning.workload import Workload
from pipeline.prefix.benefit import CALIBRATION_WINDOWS, MOST_CANDIDATES, MOST_WINDOWS
from pipeline.prefix.params import PrefixSearchParams
from pipeline.training.divergence import LOGIT_POSITIONS


def plan_prefix_search(checkpoint: Checkpoint, workload: Workload, params: PrefixSearchParams) -> Need:
    """Plan the search of a prefix: the largest of three walks. It writes no large file.

    The first walk looks for outliers. With `choose: benefit`, a second one takes hidden states of the original and of
    every candidate along, and a third one does so in full precision, on windows beyond any sliding window.

    Args:
        checkpoint: the original model.
    """
    search = plan_walk(checkpoint, workload)
    if params.choose == "threshold":
        return search
    sizes = Sizes.of(checkpoint)
    batches = SIMULATED_BATCHES_ON_GPU if workload.on_gpu else 1.0  # the calibration windows are one batch
    comparing = sizes.block + batches * sizes.forward(CALIBRATION_WINDOWS * workload.length)
    scoring = sizes.table + KL_LOGITS * sizes.logits(LOGIT_POSITIONS)
    comparison = make_need(
        on_gpu=workload.on_gpu,
        compute=max(comparing, scoring),
        next_block=sizes.next_block,
        hidden_states=(1 + MOST_CANDIDATES) * sizes.hidden_states(MOST_WINDOWS * workload.length),
        through_host=sizes.tables_through_host,
    )
    harm = plan_harm(checkpoint, workload, MOST_CANDIDATES)
    return search.or_larger(comparison).or_larger(harm)

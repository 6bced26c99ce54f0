"""Memory and disk of `prefix_training`."""

from dataclasses import replace

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.constants import FROZEN_GRAPH, FROZEN_KEPT_GRAPHS, KL_LOGITS, MODEL_COPIES
from pipeline.planning.harm import plan_harm
from pipeline.planning.need import Need, fits, make_need
from pipeline.planning.sizes import Sizes
from pipeline.planning.workload import Workload
from pipeline.prefix.params import PrefixTrainingParams
from pipeline.runtime.params import RuntimeParams
from pipeline.training.divergence import LOGIT_POSITIONS

_CANDIDATES = 3  # found, trained, discretised


def plan_prefix_training(
    checkpoint: Checkpoint, workload: Workload, params: PrefixTrainingParams, runtime: RuntimeParams
) -> Need:
    """Plan the training of a prefix in the fastest way that fits.

    1. The whole model and the values that autograd keeps of all blocks.
    2. The whole model and hidden states between blocks. Blocks run again for the backward pass.
    3. One block and hidden states between blocks, which may be in files.

    Training or not, the gate then compares every candidate with the original, on at most 2048 tokens or one window.

    Args:
        checkpoint: the original model.
        workload: training and validation windows together.
    """
    gate = plan_harm(checkpoint, workload, _CANDIDATES if params.enabled else 1)
    if not params.enabled:
        return gate
    sizes, on_gpu = Sizes.of(checkpoint), workload.on_gpu
    batch = params.batch_size * (workload.length + (params.length or 0))
    with_kl = bool(params.weights.kl)
    heads = sizes.table + KL_LOGITS * sizes.logits(LOGIT_POSITIONS) if with_kl else 0
    hidden_states = sizes.hidden_states(workload.tokens) if with_kl else 0
    model = MODEL_COPIES * (sizes.blocks * sizes.block + sizes.table)
    between_blocks = sizes.blocks * batch * sizes.hidden * 4
    graph = FROZEN_GRAPH * sizes.graph(batch)

    def plan(compute: float, next_block: int = 0, work_files: float = 0.0) -> Need:
        training = make_need(
            on_gpu=on_gpu,
            compute=compute,
            next_block=next_block,
            hidden_states=hidden_states,
            through_host=sizes.tables_through_host,
            work_files=work_files,
        )
        return training.or_larger(gate)

    need = plan(model + heads + FROZEN_KEPT_GRAPHS * sizes.kept_graphs(batch))
    if fits(need, runtime, on_gpu):
        return need
    need = plan(model + heads + between_blocks + graph)
    if fits(need, runtime, on_gpu):
        return replace(need, recompute=True)
    streamed = MODEL_COPIES * (sizes.block + sizes.table) + heads + graph
    need = plan(streamed + between_blocks, sizes.next_block)
    if runtime.offload == "never" or (runtime.offload == "auto" and fits(need, runtime, on_gpu)):
        return replace(need, recompute=True, stream=True)
    need = plan(streamed, sizes.next_block, work_files=workload.processes * between_blocks)
    return replace(need, offload=True, recompute=True, stream=True)

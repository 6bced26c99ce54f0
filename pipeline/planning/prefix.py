"""What searching a prefix, and training one, will take."""

from dataclasses import replace

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need, Share, fits, make_need
from pipeline.planning.sizes import Sizes
from pipeline.planning.walk import plan_walk
from pipeline.prefix.benefit import CALIBRATED, MOST_CANDIDATES, MOST_WINDOWS
from pipeline.prefix.params import PrefixSearchParams, PrefixTrainingParams
from pipeline.runtime.memory import GIB
from pipeline.runtime.params import RuntimeParams
from pipeline.runtime.progress import current_rss_gib


def plan_prefix_search(checkpoint: Checkpoint, share: Share, params: PrefixSearchParams) -> Need:
    """What the walk takes that looks for outliers or, each where it is more, the comparison of candidates behind it."""
    walked = plan_walk(checkpoint, share)
    if params.choose == "threshold":
        return walked
    sizes = Sizes.of(checkpoint)
    tokens, block = MOST_WINDOWS * share.length, sizes.numbers * sizes.item
    # The windows that calibrate are one batch; a GPU's allocator keeps more of what a block has done with.
    batches = 1.8 if share.on_gpu else 1.0
    work = max(block + batches * sizes.forward(CALIBRATED * share.length), sizes.table + 5 * sizes.logits)
    streams = (1 + MOST_CANDIDATES) * sizes.stream(tokens)
    compared = make_need(work, streams, share.on_gpu, ahead=sizes.ahead, passing=sizes.tables_passing)
    larger = {name: max(getattr(walked, name), getattr(compared, name)) for name in ("memory", "gpu", "streams")}
    return replace(walked, **larger)


def plan_prefix_training(
    checkpoint: Checkpoint, share: Share, params: PrefixTrainingParams, runtime: RuntimeParams
) -> Need:
    """What training a prefix takes: the whole model, or a block of it, and what blocks, or one of them, keep."""
    sizes = Sizes.of(checkpoint)
    if not params.enabled:
        return Need(current_rss_gib() * GIB, 0, 0, 0)
    batch = params.batch_size * (share.length + (params.length or 0))
    heads = sizes.table + 5 * sizes.logits if params.weights.kl else 0
    model = 2 * (sizes.blocks * sizes.numbers * sizes.item + sizes.table)  # measured: as read and as run
    streams = sizes.stream(share.tokens) if params.weights.kl else 0
    # Frozen weights need no inputs for the backward pass: less is kept than where scales are trained.
    passing = sizes.tables_passing
    kept = make_need(model + heads + 0.75 * sizes.kept_graphs(batch), streams, share.on_gpu, passing=passing)
    if fits(kept, runtime, share.on_gpu):
        return kept
    states, graph = sizes.blocks * batch * sizes.hidden * 4, 0.85 * sizes.graph(batch)
    again = make_need(model + heads + states + graph, streams, share.on_gpu, passing=passing)
    if fits(again, runtime, share.on_gpu):
        return replace(again, recompute=True)
    block = sizes.numbers * sizes.item
    work = 2 * (block + sizes.table) + heads + graph
    need = make_need(work + states, streams, share.on_gpu, ahead=sizes.ahead, passing=passing)
    if runtime.offload == "never" or (runtime.offload == "auto" and fits(need, runtime, share.on_gpu)):
        return replace(need, recompute=True, stream=True)
    need = make_need(work, streams, share.on_gpu, disk=states, ahead=sizes.ahead, passing=passing)
    return replace(need, offload=True, recompute=True, stream=True)

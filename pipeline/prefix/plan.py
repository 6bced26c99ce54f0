"""What training a prefix will take."""

from dataclasses import replace

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sizes import Sizes
from pipeline.prefix.params import PrefixTrainingParams
from pipeline.runtime.memory import GIB, Need, Share, fits, make_need, memory_limit
from pipeline.runtime.params import RuntimeParams
from pipeline.runtime.progress import current_rss_gib


def plan_prefix_training(
    checkpoint: Checkpoint, share: Share, params: PrefixTrainingParams, runtime: RuntimeParams
) -> Need:
    """What training a prefix takes: the whole model, and what its blocks, or one of them, keep of a batch."""
    sizes = Sizes.of(checkpoint)
    if not params.enabled:
        return Need(current_rss_gib() * GIB, 0, 0, 0)
    batch = params.batch_size * (share.length + (params.length or 0))
    heads = sizes.table + 5 * sizes.logits if params.weights.kl else 0
    model = 2 * (sizes.blocks * sizes.numbers * sizes.item + sizes.table)  # measured: as read and as run
    streams = sizes.stream(share.tokens) if params.weights.kl else 0
    # Frozen weights need no inputs for the backward pass: less is kept than where scales are trained.
    kept = make_need(model + heads + 0.75 * sizes.kept_graphs(batch), streams, share.on_gpu)
    if fits(kept, memory_limit(runtime), share.on_gpu):
        return kept
    again = sizes.blocks * batch * sizes.hidden * 4 + 0.85 * sizes.graph(batch)
    return replace(make_need(model + heads + again, streams, share.on_gpu), recompute=True)

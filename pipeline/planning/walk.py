"""What a walk over the blocks will take."""

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need, Share, make_need
from pipeline.planning.sizes import Sizes


def plan_walk(checkpoint: Checkpoint, share: Share) -> Need:
    """What a walk in full precision takes."""
    sizes = Sizes.of(checkpoint)
    block = sizes.numbers * sizes.item
    work, streams = block + sizes.forward(share.batch), sizes.stream(share.tokens)
    return make_need(work, streams, share.on_gpu, ahead=sizes.ahead, passing=sizes.tables_passing)

"""What a walk over the blocks will take."""

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sizes import Sizes
from pipeline.runtime.memory import Need, Share, make_need


def plan_walk(checkpoint: Checkpoint, share: Share) -> Need:
    """What a walk in full precision takes."""
    sizes = Sizes.of(checkpoint)
    block = sizes.numbers * sizes.item
    return make_need(block + sizes.forward(share.batch), sizes.stream(share.tokens), share.on_gpu, ahead=block)

"""What packing will take."""

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need, make_need
from pipeline.planning.sizes import Sizes


def plan_export(checkpoint: Checkpoint, shard: int) -> Need:
    """What packing takes: a shard of at most `shard` bytes, embedding and lm_head whole, and a block in integers."""
    sizes = Sizes.of(checkpoint)
    tables = 2 * sizes.vocabulary * sizes.hidden * 2
    packed = sizes.blocks * sizes.numbers // 2 + tables
    return make_need(min(packed, max(shard, tables)) + sizes.numbers, 0, on_gpu=False)

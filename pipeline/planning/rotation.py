"""What rotating a model will take."""

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need, make_need
from pipeline.planning.sizes import Sizes
from pipeline.rotation.matrices import ENTRIES


def plan_rotation(checkpoint: Checkpoint, dtype: torch.dtype, on_gpu: bool) -> Need:
    """What rotating takes: a block and the same in float64, or embedding and lm_head; on a GPU, where the rotated block
    is compared with the original one, a block in float64."""
    sizes = Sizes.of(checkpoint)
    entries = sizes.vocabulary * sizes.hidden
    sources = 1 if checkpoint.config.tie_word_embeddings else 2
    tables = entries * (sources * sizes.item + 2 * dtype.itemsize) + ENTRIES * 8
    # The original as stored and in float64, or the rotated one growing beside it; then float64 gives way to float32.
    block = sizes.numbers * (sizes.item + 8) + ENTRIES * 8
    return make_need(sizes.numbers * 8 if on_gpu else 0, 0, on_gpu, here=max(block, tables))

"""What rotating a model will take."""

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sizes import Sizes
from pipeline.rotation.matrices import ENTRIES
from pipeline.runtime.memory import Need, make_need


def plan_rotation(checkpoint: Checkpoint, dtype: torch.dtype) -> Need:
    """What rotating takes: a block and the same in float64, or embedding and lm_head."""
    sizes = Sizes.of(checkpoint)
    entries = sizes.vocabulary * sizes.hidden
    sources = 1 if checkpoint.config.tie_word_embeddings else 2
    tables = entries * (sources * sizes.item + 2 * dtype.itemsize) + ENTRIES * 8
    # The original as stored and in float64, or the rotated one growing beside it; then float64 gives way to float32.
    block = sizes.numbers * (sizes.item + 8) + ENTRIES * 8
    return make_need(max(block, tables), 0, on_gpu=False)

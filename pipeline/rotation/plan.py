"""What rotating a model will take."""

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sizes import Sizes
from pipeline.rotation.matrices import ENTRIES
from pipeline.runtime.memory import Need, make_need


def plan_rotation(checkpoint: Checkpoint, dtype: torch.dtype) -> Need:
    """What rotating takes: a block before and after and a tensor in float64, or embedding and lm_head."""
    sizes = Sizes.of(checkpoint)
    entries = sizes.vocabulary * sizes.hidden
    sources = 1 if checkpoint.config.tie_word_embeddings else 2
    tables = entries * (sources * sizes.item + 2 * dtype.itemsize) + ENTRIES * 8
    narrow = 0 if dtype == torch.float32 else dtype.itemsize
    block = sizes.numbers * (sizes.item + 4 + narrow) + 8 * sizes.hidden * sizes.inner + ENTRIES * 8
    return make_need(max(block, tables), 0, on_gpu=False)

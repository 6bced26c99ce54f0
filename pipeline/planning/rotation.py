"""Memory and disk of `rotation`."""

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.disk import count_tables, measure_companions
from pipeline.planning.need import Need, make_need
from pipeline.planning.sizes import Sizes
from pipeline.rotation.matrices import ENTRIES
from pipeline.rotation.params import RotationParams

_FLOAT64 = 8  # bytes


def plan_rotation(checkpoint: Checkpoint, params: RotationParams, on_gpu: bool) -> Need:
    """Plan the rotation of a model.

    The host rotates: a block, then embedding and lm_head. A GPU only compares the rotated block with the original one,
    in float64.

    Args:
        checkpoint: the original model.
    """
    sizes = Sizes.of(checkpoint)
    dtype = getattr(torch, params.dtype)
    slices = ENTRIES * _FLOAT64
    # The original as stored and in float64, or next to it the growing rotated one. Then float32 replaces float64.
    block = sizes.weights * (sizes.itemsize + _FLOAT64) + slices
    stored_tables = 1 if checkpoint.config.tie_word_embeddings else 2
    tables = sizes.table_entries * (stored_tables * sizes.itemsize + 2 * dtype.itemsize) + slices
    written_blocks = sizes.blocks * sizes.weights * dtype.itemsize
    written_tables = count_tables(sizes, dtype)
    head_dim = sizes.keys // checkpoint.config.num_key_value_heads
    rotations = ((params.r1, sizes.hidden), (params.r2, head_dim))
    matrices = sum(width**2 * _FLOAT64 for mode, width in rotations if mode == "random")
    return make_need(
        on_gpu=on_gpu,
        compute=sizes.weights * _FLOAT64 if on_gpu else 0,
        host=max(block, tables),
        artifact=written_blocks + written_tables + matrices + measure_companions(checkpoint),
    )

"""Rotate the model: norms folded, embeddings untied, R2 and a merged R1 in the weights, and the inverses of R4 and R5.

Reads   artifacts/model/
Writes  artifacts/rotation/ (a checkpoint; config.json says which rotations are online), metrics/rotation.json
arXiv:2404.00456, §4. Fails if any logit changes, computed in float64.
Packaged model: about 10 seconds and 1 GiB.
"""

from pathlib import Path

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.need import Need
from pipeline.planning.rotation import plan_rotation
from pipeline.rotation.merging import rotate_model
from stages.opening import Run, open_stage

MODEL = Path("artifacts/model")
ROTATION = Path("artifacts/rotation")


def main(run: Run) -> None:
    own = run.params.rotation
    modes = (own.r1, own.r2, own.r3, own.r4, own.r5)
    options = (own.seed, getattr(torch, own.dtype), run.device, own.block_size, own.online_signs)
    run.metrics.update(rotate_model(Checkpoint(MODEL, "model"), ROTATION, *modes, *options))


def plan(run: Run) -> Need:
    return plan_rotation(Checkpoint(MODEL, "model"), run.params.rotation, run.device.type == "cuda")


if __name__ == "__main__":
    open_stage("rotation", main, __doc__, plan)

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
    rotation = run.params.rotation
    run.metrics.update(
        rotate_model(
            Checkpoint(MODEL, "model"),
            ROTATION,
            r1=rotation.r1,
            r2=rotation.r2,
            r3=rotation.r3,
            r4=rotation.r4,
            r5=rotation.r5,
            seed=rotation.seed,
            dtype=getattr(torch, rotation.dtype),
            device=run.device,
            block_size=rotation.block_size,
            online_signs=rotation.online_signs,
        )
    )


def plan(run: Run) -> Need:
    return plan_rotation(Checkpoint(MODEL, "model"), run.params.rotation, run.device.type == "cuda")


if __name__ == "__main__":
    open_stage("rotation", main, __doc__, plan)

"""Rotate the model: norms folded, embeddings untied, R1 and R2 merged, the inverse of R4 merged into down_proj.

Reads   artifacts/model/
Writes  artifacts/rotation/ (a checkpoint; config.json says which rotations are online), metrics/rotation.json
arXiv:2404.00456, §4. Fails if any logit changes by more than 1e-4 of the largest.
Packaged model: about 10 seconds and 1 GiB.
"""

from pathlib import Path

import torch

from pipeline.checkpoint import Checkpoint
from pipeline.memory import plan_rotation
from pipeline.params import load_params
from pipeline.progress import return_freed_memory, run_main, run_stage, select_device
from pipeline.rotation import rotate_model
from stages.arguments import parse_arguments

PARAMS = Path("params.yaml")
MODEL = Path("artifacts/model")
ROTATION = Path("artifacts/rotation")
METRICS = Path("metrics/rotation.json")


def main() -> None:
    plan_only = parse_arguments(__doc__).plan
    params = load_params(PARAMS)
    rotation = params.rotation
    if plan_only:
        print(plan_rotation(Checkpoint(MODEL, "model"), getattr(torch, rotation.dtype)).describe())
        return
    return_freed_memory()
    with run_stage("rotation", METRICS, params.runtime, rotation.seed) as metrics:
        metrics |= rotate_model(
            Checkpoint(MODEL, "model"),
            ROTATION,
            rotation.r1,
            rotation.r2,
            rotation.r3,
            rotation.r4,
            rotation.seed,
            getattr(torch, rotation.dtype),
            select_device(params.runtime),
        )


if __name__ == "__main__":
    run_main(main)

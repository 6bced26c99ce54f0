"""The comparison of the evaluated export with the evaluated fine-tuned model, of which it is the packed form.

Both run the same modules on batches of the same shape, so on a CPU their final hidden states have the same bits.
"""

import logging
from pathlib import Path

import torch

from pipeline.runtime.artifacts import ArtifactError, Header, load_tensors
from pipeline.runtime.errors import PipelineError

# On CPUs the figure is 0.0 (the packaged model in float32, a tiny model in float32 and bfloat16). The bounds are about
# 800, 4 and 4 units in the last place. Means of keys cast to bfloat16, a fault of earlier revisions, give 0.22 to 0.24.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Quantizers at 4 bits amplify rounding. Noise of one unit in the last place of the embeddings moves the packaged model
# by 0.19 (float32) and 0.24 (bfloat16), a tiny random one by 0.47 (bfloat16). GPUs choose their kernels by themselves,
# so only this is an error there. Unrelated states of equal norm differ by 1.4.
AMPLIFIED = 1.0

logger = logging.getLogger(__name__)


class ExportDifferenceError(PipelineError):
    """The export computes something else than the fine-tuned model."""


def check_export(tensors: dict[str, torch.Tensor], path: Path, export: Header, device: torch.device) -> float:
    """Compare the final hidden states of the export with the fine-tuned model's.

    Args:
        tensors: tensors of the evaluated export: `hidden.CORPUS` [N, T, D] and `token_ids.CORPUS` [N, T].
        path: the artifact of `evaluation@finetuning`.
        export: header of the export.
        device: where the export was evaluated.

    Returns:
        The largest relative difference of a window: the norm of the difference over the norm of the fine-tuned model's.

    Raises:
        ArtifactError: the artifact is missing, or of another checkpoint or other windows.
        ExportDifferenceError: a window differs by more than the bound of its dtype and device.
    """
    reference, header = load_tensors(path, "evaluation")
    remedy = "Rerun: dvc repro --force --single-item evaluation@finetuning, then evaluation@export."
    if header.inputs.get("checkpoint") != export.inputs.get("finetuning"):
        raise ArtifactError(f"{path} is of another fine-tuned model than the export. {remedy}")
    names = sorted(name for name in tensors if name.startswith("hidden."))
    dtype, largest = tensors[names[0]].dtype, 0.0
    bound = BOUNDS.get(dtype, BOUNDS[torch.float32])
    limit = bound if device.type == "cpu" else AMPLIFIED
    for name in names:
        corpus, hidden = name.removeprefix("hidden."), tensors[name]
        same_windows = torch.equal(reference[f"token_ids.{corpus}"], tensors[f"token_ids.{corpus}"])
        if not same_windows or reference[name].dtype != dtype:
            raise ArtifactError(f"{path} has other windows of {corpus}, or another dtype. {remedy}")
        for window, (states, expected) in enumerate(zip(hidden, reference[name], strict=True)):
            norm = expected.float().norm().item()
            difference = torch.dist(states.float(), expected.float()).item() / max(norm, 1e-30)
            if not difference <= limit:
                raise ExportDifferenceError(
                    f"evaluation@export, {str(dtype).removeprefix('torch.')}: the final hidden states of "
                    f"window {window} of {corpus} differ from those of evaluation@finetuning by {difference:.2g} "
                    f"of their norm; at most {limit:.2g} is rounding. If runtime settings or the machine changed in "
                    "between, rerun "
                    "evaluation@finetuning, then evaluation@export, both with --force. Otherwise rerun export. If that "
                    "does not help, it is a bug of this project."
                )
            largest = max(largest, difference)
    if largest > bound:
        logger.warning(
            "The export differs from evaluation@finetuning by %.2g of the norm. On a GPU this can be rounding.", largest
        )
    return largest

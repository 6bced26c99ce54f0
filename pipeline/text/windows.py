"""Token windows as an artifact: what `calibration` writes and every later stage reads."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.runtime.artifacts import Header, load_tensors, save_tensors

_TENSOR = "token_ids"


@dataclass(frozen=True)
class Windows:
    """Token windows [N, T] int64 and the header of the artifact that holds them."""

    token_ids: torch.Tensor
    header: Header


def save_windows(path: Path, windows: Windows) -> None:
    save_tensors(path, {_TENSOR: windows.token_ids}, windows.header)


def load_windows(path: Path) -> Windows:
    """Raises ArtifactError when the file is missing, damaged or not of the calibration stage."""
    tensors, header = load_tensors(path, "calibration")
    return Windows(tensors[_TENSOR], header)

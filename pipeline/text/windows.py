"""Token windows as an artifact: what `calibration` writes and every later stage reads.

Windows are cut from content. Where a model was trained with a start token in front of every text
(`calibration.start_token`), it stands in front of every window as an ordinary token, unless a prefix that ends in it
stands there already: `start_behind` decides, for everybody. Lengths count content, and so does every loss: the targets
are the same with and without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.runtime.artifacts import Header, load_tensors, make_header, save_tensors

_TENSOR = "token_ids"
START_TOKEN = "start_token"  # a tensor [1]; absent where there is none


@dataclass(frozen=True)
class Windows:
    """Token windows.

    Attributes:
        token_ids: [N, T] int64, content alone.
        header: of the artifact that holds them.
        start_token: what belongs in front of each, or None.
    """

    token_ids: torch.Tensor
    header: Header
    start_token: int | None = None

    def begin_with(self, start_token: int | None) -> "Windows":
        """The same windows with this start token, or, None, as they are."""
        if start_token is None:
            return self
        header = make_header("calibration", {START_TOKEN: start_token}, {"content": self.header})
        return replace(self, start_token=start_token, header=header)

    def behind(self, prefix_token_ids: torch.Tensor | Sequence[int] = ()) -> torch.Tensor:
        """What a model reads behind a prefix: [N, T], or [N, T + 1] with the start token in front of each."""
        return put_in_front(self.token_ids, start_behind(self.start_token, prefix_token_ids))


def start_behind(start_token: int | None, prefix_token_ids: torch.Tensor | Sequence[int]) -> int | None:
    """What stands between a prefix and every text: the start token, unless the prefix ends in it.

    Args:
        start_token: what belongs in front of every text, or None.
        prefix_token_ids: of the prefix; of a continuous one, those it was begun from; none: no prefix.
    """
    return None if len(prefix_token_ids) and int(prefix_token_ids[-1]) == start_token else start_token


def put_in_front(token_ids: torch.Tensor, start_token: int | None) -> torch.Tensor:
    """Windows [N, T] -> [N, T + 1] that begin with the start token; None: as they are."""
    return token_ids if start_token is None else torch.nn.functional.pad(token_ids, (1, 0), value=start_token)


def pack_start_token(start_token: int | None) -> dict[str, torch.Tensor]:
    """A start token as tensors of an artifact."""
    return {} if start_token is None else {START_TOKEN: torch.tensor([start_token])}


def unpack_start_token(tensors: dict[str, torch.Tensor]) -> int | None:
    """What `pack_start_token` packed."""
    return int(tensors[START_TOKEN]) if START_TOKEN in tensors else None


def load_start_token(path: Path, stage: str) -> int | None:
    """What stands between the prefix of a quantized checkpoint, the artifact `path`, and every text, or None."""
    tensors, _ = load_tensors(path, stage)
    return unpack_start_token(tensors)


def save_windows(path: Path, windows: Windows) -> None:
    save_tensors(path, {_TENSOR: windows.token_ids} | pack_start_token(windows.start_token), windows.header)


def load_windows(path: Path) -> Windows:
    """Raises ArtifactError when the file is missing, damaged or not of the calibration stage."""
    tensors, header = load_tensors(path, "calibration")
    return Windows(tensors[_TENSOR], header, unpack_start_token(tensors))

"""Token windows as an artifact, which `calibration` writes and every later stage reads.

Windows are cut from content. A model that was trained with a start token before every text (`calibration.start_token`)
reads it before every window like any other token, unless the prefix ends in it: `find_text_start_token` decides this
for the whole library. Lengths count content, and so does every loss: the targets are the same with and without the
start token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.runtime.artifacts import Header, load_tensors, make_header, open_tensors, save_tensors

_TENSOR = "token_ids"
START_TOKEN = "start_token"  # a tensor [1]; absent where there is none


@dataclass(frozen=True)
class Windows:
    """Token windows.

    Attributes:
        token_ids: [N, T] int64, content only.
        header: header of the artifact that holds them.
        text_start_token_id: the start token before every window where there is no prefix, or None.
    """

    token_ids: torch.Tensor
    header: Header
    text_start_token_id: int | None = None

    def with_start_token(self, token_id: int | None) -> "Windows":
        """Return the same windows with this start token; unchanged for None."""
        if token_id is None:
            return self
        header = make_header("calibration", {START_TOKEN: token_id}, {"content": self.header})
        return replace(self, text_start_token_id=token_id, header=header)

    def model_inputs(self, prefix_token_ids: torch.Tensor | Sequence[int] = ()) -> torch.Tensor:
        """Return the token ids that a model reads after a prefix: [N, T], or [N, T + 1] with the start token first."""
        return prepend_start_token(self.token_ids, find_text_start_token(self.text_start_token_id, prefix_token_ids))


def find_text_start_token(
    text_start_token_id: int | None, prefix_token_ids: torch.Tensor | Sequence[int]
) -> int | None:
    """Return the start token between a prefix and every text: None if the prefix ends in it.

    Args:
        text_start_token_id: the start token before every text where there is no prefix, or None.
        prefix_token_ids: the tokens of the prefix; for a continuous one, the tokens that its training began with. Empty
            where there is no prefix.
    """
    ends_in_it = len(prefix_token_ids) > 0 and int(prefix_token_ids[-1]) == text_start_token_id
    return None if ends_in_it else text_start_token_id


def prepend_start_token(token_ids: torch.Tensor, text_start_token_id: int | None) -> torch.Tensor:
    """Return windows [N, T] with the start token before each, [N, T + 1]; the same tensor for None."""
    if text_start_token_id is None:
        return token_ids
    return torch.nn.functional.pad(token_ids, (1, 0), value=text_start_token_id)


def pack_start_token(text_start_token_id: int | None) -> dict[str, torch.Tensor]:
    """Return a start token as tensors of an artifact: {} for None."""
    return {} if text_start_token_id is None else {START_TOKEN: torch.tensor([text_start_token_id])}


def unpack_start_token(tensors: dict[str, torch.Tensor]) -> int | None:
    """Return the start token that `pack_start_token` packed."""
    return int(tensors[START_TOKEN]) if START_TOKEN in tensors else None


def load_start_token(path: Path, stage: str) -> int | None:
    """Return the start token between prefix and text of a quantized checkpoint, from its prefix artifact `path`."""
    tensors, _ = load_tensors(path, stage)
    return unpack_start_token(tensors)


class StoredTokens:
    """Token ids [N, T] int64 that stay in their file. Indexing the first dimension reads those rows.

    Attributes:
        rows: numbers of the file's rows, in order.
        shape: (N, T).
    """

    def __init__(self, path: Path, rows: range, length: int) -> None:
        self.path, self.rows = path, rows
        self.shape = (len(rows), length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        numbers = self.rows[rows] if isinstance(rows, slice) else [self.rows[number] for number in rows.tolist()]
        with open_tensors(self.path, "calibration") as (file, _):
            stored = file.get_slice(_TENSOR)
            read = [stored[number : number + 1] for number in numbers]
        return torch.cat(read) if read else torch.empty(0, self.shape[1], dtype=torch.int64)

    def select(self, rows: slice) -> "StoredTokens":
        """Return the token ids of some rows, which stay in the file too."""
        return StoredTokens(self.path, self.rows[rows], self.shape[1])


TokenRows = torch.Tensor | StoredTokens  # token ids [N, T], in memory or in their file


def open_token_ids(path: Path) -> StoredTokens:
    """Return the token ids of a windows file without reading them.

    Raises:
        ArtifactError: the file is missing, damaged or from another stage.
    """
    with open_tensors(path, "calibration") as (file, _):
        count, length = file.get_slice(_TENSOR).get_shape()
    return StoredTokens(path, range(count), length)


def save_windows(path: Path, windows: Windows) -> None:
    """Write windows to a safetensors file."""
    save_tensors(path, {_TENSOR: windows.token_ids} | pack_start_token(windows.text_start_token_id), windows.header)


def load_windows(path: Path) -> Windows:
    """Return windows from a safetensors file.

    Raises:
        ArtifactError: the file is missing, damaged or from another stage.
    """
    tensors, header = load_tensors(path, "calibration")
    return Windows(tensors[_TENSOR], header, unpack_start_token(tensors))

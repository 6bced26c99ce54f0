"""Hidden states of all windows, in memory or in memory-mapped files.

    with Offload(folder) as offload:                     # Offload(None) leaves them in memory
        stream = offload.keep("quantized", hidden)       # [N, T, D]
        stream[rows] = block(stream[rows])

A file is mapped for each access and unmapped afterwards, so only the rows in use are resident.
"""

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch


class FileStream:
    """A tensor [N, …] in a file. Indexing its first dimension reads a copy, or writes."""

    device = torch.device("cpu")

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, keep: bool = False) -> None:
        """Create the file, or replace the one at `path`. Its values are zero. With `keep`, the values there stay."""
        self.path, self.shape, self.dtype = path, shape, dtype
        with open(path, "r+b" if keep else "wb") as file:
            file.truncate(self.numel() * dtype.itemsize)

    def numel(self) -> int:
        """Return the number of elements."""
        return torch.Size(self.shape).numel()

    def __len__(self) -> int:
        return self.shape[0]

    def map(self) -> torch.Tensor:
        """Return the whole file as a tensor. Writing to it writes to the file."""
        return torch.from_file(str(self.path), shared=True, size=self.numel(), dtype=self.dtype).view(self.shape)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return self.map()[rows].clone()

    def __setitem__(self, rows: Any, values: torch.Tensor) -> None:
        self.map()[rows] = values


Stream = torch.Tensor | FileStream


class Offload:
    """Holds streams in files, in a new folder below `folder` that is removed at the end; None: in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._stream_folder: Path | None = None

    def __enter__(self) -> "Offload":
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stream_folder = Path(tempfile.mkdtemp(prefix="streams-", dir=self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream_folder is not None:
            shutil.rmtree(self._stream_folder)

    def keep(self, name: str, values: torch.Tensor) -> Stream:
        """Return `values` [N, …] copied to a file, or `values` themselves where streams stay in memory."""
        if self._stream_folder is None:
            return values
        stream = FileStream(self._stream_folder / name, tuple(values.shape), values.dtype)
        stream[:] = values
        return stream


IN_MEMORY = Offload(None)


def as_tensor(stream: Stream) -> torch.Tensor:
    """Return a stream as one tensor, for example to save it. Makes no copy."""
    return stream if isinstance(stream, torch.Tensor) else stream.map()

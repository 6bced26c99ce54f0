"""Hidden states of all windows, in memory or in memory-mapped files.

    with Offload(folder) as offload:                     # or Offload(None): keep them in memory
        stream = offload.keep("quantized", hidden)       # [N, T, D]
        stream[rows] = block(stream[rows])

A file is mapped for each access and let go again, so that what is resident is the rows in use.
"""

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch


class FileStream:
    """A tensor [N, …] in a file; indexing the first dimension reads a copy or writes."""

    device = torch.device("cpu")

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Creates the file, or grows or shrinks the one there."""
        self.path, self.shape, self.dtype = path, shape, dtype
        with open(path, "wb") as file:
            file.truncate(self.numel() * dtype.itemsize)

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def __len__(self) -> int:
        return self.shape[0]

    def map(self) -> torch.Tensor:
        """The whole file as a tensor; what is written to it is written to the file."""
        return torch.from_file(str(self.path), shared=True, size=self.numel(), dtype=self.dtype).view(self.shape)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return self.map()[rows].clone()

    def __setitem__(self, rows: Any, values: torch.Tensor) -> None:
        self.map()[rows] = values


Stream = torch.Tensor | FileStream


class Offload:
    """Where streams are kept: in files of a folder of its own below `folder`, removed at the end whatever happens."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._own: Path | None = None

    def __enter__(self) -> "Offload":
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own = Path(tempfile.mkdtemp(prefix="streams-", dir=self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own is not None:
            shutil.rmtree(self._own)

    def keep(self, name: str, values: torch.Tensor) -> Stream:
        """`values` [N, …], in a file when this offloads, themselves otherwise."""
        if self._own is None:
            return values
        stream = FileStream(self._own / name, tuple(values.shape), values.dtype)
        stream[:] = values
        return stream


IN_MEMORY = Offload(None)


def as_tensor(stream: Stream) -> torch.Tensor:
    """The stream as one tensor, without a copy: to be saved."""
    return stream if isinstance(stream, torch.Tensor) else stream.map()

"""Final hidden states of the original model, which training end to end compares with: kept in a file, or recomputed.

    cached      Computed once, a part of the windows at a time, into a file of the work folder: T x D numbers a window.
                A killed run continues after the last finished part.
    alongside   Computed for each batch, next to the model under training. Nothing is kept, so any amount of text
                fits. It computes as the model under training does, in bfloat16 with `finetuning.autocast`.

Neither keeps the hidden states of all windows in memory.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from pipeline.blocks.walk import BlockRunner, batches, load_blocks, walk
from pipeline.models.checkpoint import Checkpoint
from pipeline.runtime.artifacts import Header, load_unfinished, save_tensors
from pipeline.runtime.streams import FileStream
from pipeline.text.windows import TokenRows, prepend_start_token

logger = logging.getLogger(__name__)

PART_BYTES = 2**30  # of hidden states that are in memory at a time


@torch.no_grad()
def run_original(
    original: Checkpoint, token_ids: torch.Tensor, runner: BlockRunner, text_start_token_id: int | None = None
) -> torch.Tensor:
    """Return hidden states of windows after the original's final norm, without a prefix, [N, T, D].

    Args:
        token_ids: [N, T], content alone.
        text_start_token_id: the start token that is put before each window, or None. Its states are left out.
    """
    hidden = walk(original, original.embed(prepend_start_token(token_ids, text_start_token_id)), runner, "original")
    hidden = hidden[:, -token_ids.shape[1] :]
    original.apply_final_norm_(hidden)
    return hidden


class Reference:
    """Final hidden states [N, T, D] of the original. Indexing the first dimension returns those windows."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, rows: Any) -> torch.Tensor:
        raise NotImplementedError


class CachedReference(Reference):
    """Hidden states in a file, which a killed run finds again."""

    def __init__(self, stream: FileStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return self.stream[rows]

    @classmethod
    def compute(
        cls,
        original: Checkpoint,
        token_ids: TokenRows,
        runner: BlockRunner,
        *,
        text_start_token_id: int | None,
        path: Path,
        header: Header,
    ) -> "CachedReference":
        """Compute the file at `path`, or the part of it that an unfinished run with an equal header lacks.

        The parts hold whole batches of the runner, so their number does not change the bytes.
        """
        count, length = token_ids.shape
        shape, dtype = (count, length, original.config.hidden_size), original.dtype
        bytes_of_window = torch.Size(shape[1:]).numel() * dtype.itemsize
        size = max(PART_BYTES // bytes_of_window // runner.batch_size, 1) * runner.batch_size
        progress = path.with_suffix(".safetensors")
        saved = load_unfinished(progress, header) if path.is_file() else None
        finished = 0 if saved is None else int(saved["finished"])
        stream = FileStream(path, shape, dtype, keep=finished > 0)
        for part in batches(count, size):
            if part.start >= finished:
                stream[part] = run_original(original, token_ids[part], runner, text_start_token_id)
                save_tensors(progress, {"finished": torch.tensor(part.stop)}, header)
        return cls(stream)


class AlongsideReference(Reference):
    """Hidden states that are computed when they are read, a block at a time, in the autocast of the reader."""

    def __init__(
        self, original: Checkpoint, token_ids: TokenRows, runner: BlockRunner, text_start_token_id: int | None
    ) -> None:
        self.original, self.token_ids, self.runner = original, token_ids, runner
        self.text_start_token_id = text_start_token_id
        self._table = original.load_tensor(original.architecture.embedding)

    def __len__(self) -> int:
        return len(self.token_ids)

    @torch.no_grad()
    def __getitem__(self, rows: Any) -> torch.Tensor:
        content = self.token_ids[rows]
        token_ids = prepend_start_token(content, self.text_start_token_id)
        embedded = self.original.scale_embeddings(torch.nn.functional.embedding(token_ids, self._table))
        hidden = embedded.to(self.runner.device)
        for block in load_blocks(self.original, self.runner.device):
            hidden = self.runner.run(block, hidden)
        hidden = hidden[:, -content.shape[1] :].to(self.original.dtype).cpu()
        self.original.apply_final_norm_(hidden)
        return hidden

"""Unfinished work on disk, so that a killed run continues after its last finished block.

Every rank saves its hidden states after a block, and only after the block's other files. The number of finished blocks
is inside the same file, so whatever a kill leaves, this file is right. One of several ranks may be killed before the
others have saved. So each rank keeps its last two generations, and all continue after the last block that all have
finished.

A run must not be continued by another version of the code. So a work folder stores a hash of the code.
"""

import functools
import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import pipeline
from pipeline.runtime.artifacts import Header, load_unfinished, save_tensors
from pipeline.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

_STREAMS = "streams-{rank:05d}-{generation}.safetensors"
_CODE = "code"


@functools.cache
def describe_code() -> str:
    """Return a hash of this project's Python files: pipeline/ and, where it is next to that folder, stages/."""
    digest, root = hashlib.sha256(), Path(pipeline.__file__).parent.parent
    for path in sorted(path for folder in ("pipeline", "stages") for path in (root / folder).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@contextmanager
def open_work_folder(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Open a stage's work folder for the body; remove it once the stage has succeeded.

    The work of another version of the code is removed first. A stage that fails leaves its finished work, and leaves no
    folder where there is none.
    """
    stamp = folder / _CODE
    if ranks.first:
        if folder.is_dir() and not (stamp.is_file() and stamp.read_text(encoding="utf-8") == describe_code()):
            logger.warning("starting over: the unfinished run in %s is of another version of the code", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(describe_code(), encoding="utf-8")
    ranks.wait()
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if ranks.first and (succeeded or [*folder.glob("*")] == [stamp]):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # other stages have folders there
                folder.parent.rmdir()


def save_generation(
    work_folder: Path, streams: dict[str, torch.Tensor], finished: int, header: Header, ranks: Ranks
) -> None:
    """Save this rank's streams after `finished` blocks, then wait until the other ranks have saved theirs."""
    state = {"finished": torch.tensor(finished), "ranks": torch.tensor(ranks.world)}
    save_tensors(_path(work_folder, ranks, finished), streams | state, header)
    ranks.wait()


def load_generation(work_folder: Path, header: Header, ranks: Ranks) -> tuple[int, dict[str, torch.Tensor]]:
    """Return how many blocks an unfinished run has finished on all ranks, and this rank's streams after them.

    Returns (0, {}) where no run with an equal header and the same number of ranks has left its work.
    """
    generations: dict[int, dict[str, torch.Tensor]] = {}
    for path in {_path(work_folder, ranks, generation) for generation in (0, 1)}:
        saved = load_unfinished(path, header)
        if saved is not None and int(saved["ranks"]) == ranks.world:
            generations[int(saved["finished"])] = saved
        elif saved is not None:
            logger.warning("starting over: the unfinished run in %s had another number of processes", work_folder)
    newest = torch.tensor(max(generations, default=0))
    ranks.min_(newest)
    everywhere = torch.tensor(int(newest) if int(newest) in generations else 0)
    ranks.min_(everywhere)
    return int(everywhere), generations.get(int(everywhere), {})


def _path(work_folder: Path, ranks: Ranks, finished: int) -> Path:
    generation = finished % 2 if ranks.world > 1 else 0
    return work_folder / _STREAMS.format(rank=ranks.rank, generation=generation)

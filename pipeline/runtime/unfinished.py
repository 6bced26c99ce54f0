"""Hidden states behind the last finished block, kept on disk by every rank, so that a killed run continues.

Written behind everything else a block leaves, and with the number of finished blocks inside: whatever a kill leaves,
these files are the truth. Of several ranks one may be killed before the others have written; so they keep two
generations, and continue behind the last block that all of them have finished.

What one version of the code has begun another one must not finish: a work folder says which it is of.
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
    """A hash of this project's Python files: pipeline/ and, where they are beside it, stages/."""
    found, root = hashlib.sha256(), Path(pipeline.__file__).parent.parent
    for path in sorted(path for folder in ("pipeline", "stages") for path in (root / folder).rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


@contextmanager
def work_of_this_code(folder: Path, ranks: Ranks) -> Iterator[None]:
    """A stage's work folder: without what other code left there, gone once the stage is through.

    What a stage that fails has finished is kept; where that is nothing, no folder is left.
    """
    stamp = folder / _CODE
    if ranks.first:
        if folder.is_dir() and not (stamp.is_file() and stamp.read_text(encoding="utf-8") == describe_code()):
            logger.warning("starting over: the unfinished run in %s is of another version of the code", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(describe_code(), encoding="utf-8")
    ranks.wait()
    through = False
    try:
        yield
        through = True
    finally:
        if ranks.first and (through or [*folder.glob("*")] == [stamp]):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # there are others' folders
                folder.parent.rmdir()


def save_generation(work: Path, streams: dict[str, torch.Tensor], finished: int, header: Header, ranks: Ranks) -> None:
    """Keep this rank's streams behind `finished` blocks, and wait for the other ranks to have done so."""
    state = {"finished": torch.tensor(finished), "ranks": torch.tensor(ranks.world)}
    save_tensors(_path(work, ranks, finished), streams | state, header)
    ranks.wait()


def load_generation(work: Path, header: Header, ranks: Ranks) -> tuple[int, dict[str, torch.Tensor]]:
    """How many blocks an unfinished run of the same header has finished on all ranks, and this rank's streams there."""
    found = {}
    for path in {_path(work, ranks, generation) for generation in (0, 1)}:
        saved = load_unfinished(path, header)
        if saved is not None and int(saved["ranks"]) == ranks.world:
            found[int(saved["finished"])] = saved
        elif saved is not None:
            logger.warning("starting over: the unfinished run in %s had another number of processes", work)
    newest = torch.tensor(max(found, default=0))
    ranks.least_(newest)
    everywhere = torch.tensor(int(newest) if int(newest) in found else 0)
    ranks.least_(everywhere)
    return int(everywhere), found.get(int(everywhere), {})


def _path(work: Path, ranks: Ranks, finished: int) -> Path:
    return work / _STREAMS.format(rank=ranks.rank, generation=finished % 2 if ranks.world > 1 else 0)

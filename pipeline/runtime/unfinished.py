"""Hidden states behind the last finished block, kept on disk by every rank, so that a killed run continues.

Written behind everything else a block leaves, and with the number of finished blocks inside: whatever a kill leaves,
these files are the truth. Of several ranks one may be killed before the others have written; so they keep two
generations, and continue behind the last block that all of them have finished.
"""

import logging
from pathlib import Path

import torch

from pipeline.runtime.artifacts import Header, load_unfinished, save_tensors
from pipeline.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

_STREAMS = "streams-{rank:05d}-{generation}.safetensors"


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

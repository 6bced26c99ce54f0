"""Where a training run takes place, and how it saves memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.checkpoint import checkpoint as run_again

from pipeline.blocks.walk import BlockRunner
from pipeline.runtime.artifacts import Header
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.runtime.streams import Offload


@dataclass(frozen=True)
class Keeping:
    """The way in which a whole model under training saves memory; it changes time and memory, and no result.

    Attributes:
        recompute: whether blocks run again for the backward pass. Then only the hidden states between them are kept.
        stream: whether the weights of one block at a time are in memory (`streamed.py`). Then blocks always run again.
    """

    recompute: bool = True
    stream: bool = False


HIDDEN_STATES = Keeping()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a training run takes place.

    Attributes:
        runner: runs blocks on its device.
        offload: holds hidden states of all windows, in memory or in files.
        work_folder: folder of unfinished work; an unfinished run with the same header is continued.
        header: header of the artifact.
        ranks: each rank runs its own windows; the first one writes.
        keeping: how a whole model saves memory.
    """

    runner: BlockRunner
    offload: Offload
    work_folder: Path
    header: Header
    ranks: Ranks = ALONE
    keeping: Keeping = HIDDEN_STATES


def run_differentiably(recompute: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args); with `recompute` it runs again for the backward pass, and keeps only its arguments."""
    return run_again(function, *args, use_reentrant=False) if recompute else function(*args)

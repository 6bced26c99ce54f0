"""Where a training run takes place, and what it keeps for the backward pass."""

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
    """What of a whole model under training is kept; changes nothing but time and memory.

    Attributes:
        recompute: blocks are run again for the backward pass, so that only hidden states between them are kept.
        stream: the weights of one block are in memory at a time (`streamed.py`); blocks are run again.
    """

    recompute: bool = True
    stream: bool = False


HIDDEN_STATES = Keeping()


@dataclass(frozen=True)
class Place:
    """Where a training run takes place.

    Attributes:
        runner: runs blocks, on its device.
        offload: where streams are kept.
        work: where what is finished is kept until the end; an unfinished run with the same header is continued.
        header: of the artifact.
        ranks: each runs its own windows; the first one writes.
        keeping: what of a whole model is.
    """

    runner: BlockRunner
    offload: Offload
    work: Path
    header: Header
    ranks: Ranks = ALONE
    keeping: Keeping = HIDDEN_STATES


def run_differentiably(recompute: bool, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args); for the backward pass it is run again, or all it needs is kept."""
    return run_again(function, *args, use_reentrant=False) if recompute else function(*args)

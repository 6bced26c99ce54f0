"""One mutation: the damage, the entry point that reads it, and its judge."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Trial:
    """A damaged input and the action that reads it.

    Attributes:
        mutation: the damage in words.
        act: performs the action of a user.
        judge: returns the objection of a reference to an accepted input, or None.
        writes: files that must not exist after a refusal.
        unchanged: folder that must stay as it was, whatever happens.
        disk: bytes after which a file cannot grow any more, or None.
    """

    mutation: str
    act: Callable[[], None]
    judge: Callable[[], str | None] = lambda: None
    writes: tuple[Path, ...] = ()
    unchanged: Path | None = None
    disk: int | None = None

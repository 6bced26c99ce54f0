"""Which of the documents that a model has sampled are worth keeping: no loops, no copies, none of a few tokens.

A sampled document is judged by its token ids, one document at a time and in the order of sampling, so a continued run
judges as an uninterrupted one.

    short            fewer than 16 tokens
    loop             some stretch of 64 tokens in which less than half of the runs of 4 tokens are different
    near_duplicate   more than half of its pieces of 16 tokens occur in documents that were kept before
"""

from collections.abc import Sequence

SHORT, LOOP, NEAR_DUPLICATE = "short", "loop", "near_duplicate"

_PIECE = 16  # tokens; two texts that share as many in a row have hardly come to them independently
_STRETCH, _RUN = 64, 4


class DocumentFilter:
    """Judges sampled documents and counts those that it drops.

    Attributes:
        dropped: reason -> number of documents.
        kept_documents: number of documents that it has let pass.
        kept_tokens: their tokens.
    """

    def __init__(self) -> None:
        self.dropped: dict[str, int] = dict.fromkeys((SHORT, LOOP, NEAR_DUPLICATE), 0)
        self.kept_documents = self.kept_tokens = 0
        self._pieces: set[tuple[int, ...]] = set()

    def accepts(self, token_ids: Sequence[int]) -> bool:
        """Return whether a document is kept; count it either way."""
        pieces = [tuple(token_ids[start : start + _PIECE]) for start in range(len(token_ids) - _PIECE + 1)]
        if reason := self._find_fault(token_ids, pieces):
            self.dropped[reason] += 1
            return False
        self._pieces.update(pieces)
        self.kept_documents += 1
        self.kept_tokens += len(token_ids)
        return True

    def _find_fault(self, token_ids: Sequence[int], pieces: list[tuple[int, ...]]) -> str | None:
        if not pieces:
            return SHORT
        if has_loop(token_ids):
            return LOOP
        known = sum(piece in self._pieces for piece in pieces)
        return NEAR_DUPLICATE if 2 * known > len(pieces) else None


def has_loop(token_ids: Sequence[int]) -> bool:
    """Return whether less than half of the runs of 4 tokens in some stretch of 64 tokens are different.

    Stretches begin at every 32nd token. A shorter document is one stretch.
    """
    for start in range(0, max(len(token_ids) - _STRETCH // 2, 1), _STRETCH // 2):
        stretch = token_ids[start : start + _STRETCH]
        runs = [tuple(stretch[place : place + _RUN]) for place in range(len(stretch) - _RUN + 1)]
        if 2 * len(set(runs)) < len(runs):
            return True
    return False

"""Special tokens of a tokenizer, which transformers types too widely."""

from typing import Literal

from transformers import PreTrainedTokenizerBase


def read_token(tokenizer: PreTrainedTokenizerBase, name: Literal["bos", "eos"]) -> str | None:
    """Return the start or end token of a tokenizer as text, or None.

    Raises:
        TypeError: the tokenizer holds something else under this name.
    """
    token = getattr(tokenizer, f"{name}_token")
    if token is not None and not isinstance(token, str):
        raise TypeError(f"{name}_token={token!r}: expected a text or null")
    return token

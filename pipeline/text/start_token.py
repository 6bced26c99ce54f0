"""The start token: which one a model has, whether its tokenizer puts it in front of texts, and how to make it do so.

Some models were trained with a start token in front of every text and cannot read without one (Gemma), others never saw
one there. Whether windows have it, `calibration.start_token` says; `inspection/start_decision.py` finds out.
"""

from typing import Any

from tokenizers import processors

from pipeline.models.checkpoint import Checkpoint


def choose_start_token(checkpoint: Checkpoint) -> tuple[int | None, str]:
    """A model's start token and why: BOS; for tokenizers without one EOS, as the paper does for Qwen."""
    tokenizer = checkpoint.tokenizer
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id, f"BOS {tokenizer.bos_token!r}"
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id, f"EOS {tokenizer.eos_token!r}, for lack of a BOS"
    return None, "none: the tokenizer has neither BOS nor EOS"


def find_added_token(tokenizer: Any) -> int | None:
    """The special token a tokenizer puts in front of texts by itself, or None."""
    added, plain = (tokenizer("a", add_special_tokens=wanted)["input_ids"][:1] for wanted in (True, False))
    return None if added == plain else added[0]


def set_start_token_(tokenizer: Any, start_token: int | None) -> bool:
    """Have a tokenizer put `start_token` in front of texts, None: nothing; whether it did something else before."""
    if find_added_token(tokenizer) == start_token:
        return False
    special = [] if start_token is None else [(tokenizer.convert_ids_to_tokens(start_token), start_token)]
    front = [token for token, _ in special]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*front, "$A"], pair=[*front, "$A", "$B"], special_tokens=special
    )
    return True

"""The start token of a model: which one it is, whether the tokenizer adds it to texts, and how to make it do so.

Some models were trained with a start token before every text and cannot read without one (Gemma). Others never read one
there. `calibration.start_token` says whether windows have it, and `inspection/start_decision.py` finds out.
"""

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from pipeline.models.checkpoint import Checkpoint


def choose_start_token(checkpoint: Checkpoint) -> tuple[int | None, str]:
    """Return a model's start token and the reason: BOS, or EOS where there is no BOS, as the paper does for Qwen."""
    tokenizer = checkpoint.tokenizer
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id, f"BOS {tokenizer.bos_token!r}"
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id, f"EOS {tokenizer.eos_token!r}, for lack of a BOS"
    return None, "none: the tokenizer has neither BOS nor EOS"


def find_added_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that a tokenizer adds before every text on its own, or None."""
    with_special, plain = (tokenizer("a", add_special_tokens=special)["input_ids"][:1] for special in (True, False))
    return None if with_special == plain else with_special[0]


def set_start_token_(tokenizer: PreTrainedTokenizerBase, text_start_token_id: int | None) -> bool:
    """Make a tokenizer add `text_start_token_id` before every text, or nothing for None. Return whether it changed."""
    if find_added_token(tokenizer) == text_start_token_id:
        return False
    special = []
    if text_start_token_id is not None:
        special = [(tokenizer.convert_ids_to_tokens(text_start_token_id), text_start_token_id)]
    first = [token for token, _ in special]
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend, Tokenizer):
        raise TypeError(f"{type(tokenizer).__name__} has no fast tokenizer, whose start token can be set")
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A"], pair=[*first, "$A", "$B"], special_tokens=special
    )
    return True

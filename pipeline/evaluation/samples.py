"""Continuations of a few prompts by a model, for the report and the model card.

Decoding is greedy and one prompt is read at a time, so the same model always writes the same text.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.inference.prefixed_model import strip_start_token
from pipeline.models.layers import Generates
from pipeline.runtime.errors import PipelineError

_PREFIX = 64  # positions that are left for the prefix


class SamplesError(PipelineError):
    """A prompt cannot be continued."""


PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, a small robot",
    "def fibonacci(n):",
    "The three most important rules of good writing are",
)


def choose_prompts(prompts: list[str] | None, tokenizer: PreTrainedTokenizerBase, room: int) -> list[str]:
    """Return the prompts to continue: `report.prompts`, or those of the five `PROMPTS` that fit.

    Args:
        prompts: `report.prompts`.
        room: positions for prefix and prompt. `_PREFIX` of them are set aside for the prefix.

    Raises:
        SamplesError: one of `prompts` does not fit.
    """
    lengths = {prompt: len(tokenizer(prompt)["input_ids"]) for prompt in (PROMPTS if prompts is None else prompts)}
    fitting = [prompt for prompt, length in lengths.items() if length + _PREFIX <= room]
    if prompts is not None and len(fitting) < len(lengths):
        prompt, length = next((prompt, length) for prompt, length in lengths.items() if length + _PREFIX > room)
        raise SamplesError(
            f"report.prompts: {prompt[:40]!r} has {length} tokens, and the model has room for {max(room - _PREFIX, 0)} "
            "before report.new_tokens new ones. Shorten it, or lower report.new_tokens."
        )
    return fitting


@torch.no_grad()
def generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> list[dict[str, Any]]:
    """Return the greedy continuation of each prompt.

    Args:
        model: plain or with a prefix.
        prompts: not empty; a prompt that the tokenizer makes no token of is left out.
        new_tokens: the most tokens that are generated for a prompt. A stop token ends earlier.

    Returns:
        For each prompt {"prompt", "token_ids" of the continuation, "pieces"}. The pieces are the texts of the tokens;
        joined, they are the continuation.
    """
    samples = []
    for prompt in prompts:
        token_ids = strip_start_token(tokenizer(prompt)["input_ids"], model)
        if not token_ids:
            continue
        inputs = torch.tensor([token_ids], device=model.device)
        output = cast(Generates, model).generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens, do_sample=False, num_beams=1
        )
        assert isinstance(output, torch.Tensor), "generate returns ids unless it is asked for more"
        continuation = output[0, len(token_ids) :].tolist()
        samples.append(
            {"prompt": prompt, "token_ids": continuation, "pieces": split_text(continuation, tokenizer, token_ids)}
        )
    return samples


def split_text(token_ids: list[int], tokenizer: PreTrainedTokenizerBase, before: list[int]) -> list[str]:
    """Return the text that each token adds, so that the pieces join to the decoded text.

    A token that ends within a character adds nothing. The token that completes the character adds all of it.

    Args:
        before: tokens of the prompt, because some tokenizers decode the first token of a text in another way.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text, pieces = tokenizer.decode(before, **options), []
    for end in range(1, len(token_ids) + 1):
        longer = tokenizer.decode([*before, *token_ids[:end]], **options)
        assert isinstance(longer, str), "one text was decoded"
        complete = longer.rstrip("\ufffd") if end < len(token_ids) else longer
        pieces.append(complete[len(text) :])
        text = max(text, complete, key=len)
    return pieces


def find_first_difference(reference: Sequence[int], token_ids: Sequence[int]) -> int | None:
    """Return the index of the first token that differs from the reference's, or None if there is none.

    Where one continuation is the beginning of the other, the index is the length of the shorter one.
    """
    for index, (expected, actual) in enumerate(zip(reference, token_ids, strict=False)):
        if expected != actual:
            return index
    return None if len(reference) == len(token_ids) else min(len(reference), len(token_ids))

"""Samples: greedy continuations that equal transformers' own, cut into the text of each token."""

import pytest
import torch

from pipeline.evaluation.samples import (
    PROMPTS,
    SamplesError,
    choose_prompts,
    find_first_difference,
    generate_samples,
    split_text,
)
from pipeline.inference.prefixed_model import assemble_model
from tests.conftest import make_model, open_model


@torch.no_grad()
def test_continuations_equal_transformers(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    samples = generate_samples(assemble_model(checkpoint), checkpoint.tokenizer, ["once upon", "a dog"], 6)
    reference = make_model("llama_tied")
    for sample in samples:
        inputs = torch.tensor([checkpoint.tokenizer(sample["prompt"])["input_ids"]])
        expected = reference.generate(inputs, max_new_tokens=6, do_sample=False)[0, inputs.shape[1] :].tolist()
        assert sample["token_ids"] == expected
        assert len(sample["pieces"]) == len(expected)
        before = checkpoint.tokenizer.decode(inputs[0], skip_special_tokens=True)
        whole = checkpoint.tokenizer.decode([*inputs[0].tolist(), *expected], skip_special_tokens=True)
        assert before + "".join(sample["pieces"]) == whole
    assert generate_samples(reference, checkpoint.tokenizer, [""], 6) == []


def test_a_character_of_several_tokens_is_shown_with_its_last_token(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    tokenizer = checkpoint.tokenizer
    token_ids = tokenizer("né 日")["input_ids"]
    pieces = split_text(token_ids[1:], tokenizer, token_ids[:1])
    assert "\ufffd" not in "".join(pieces)
    assert tokenizer.decode(token_ids[:1]) + "".join(pieces) == tokenizer.decode(token_ids)


def test_the_first_difference_is_found():
    assert find_first_difference([1, 2, 3], [1, 2, 3]) is None
    assert find_first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert find_first_difference([1, 2, 3], [1, 2]) == 2
    assert find_first_difference([1, 2], [1, 2, 3]) == 2


def test_own_prompts_must_fit_and_built_in_ones_are_left_out(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    assert choose_prompts(None, checkpoint.tokenizer, 10_000) == list(PROMPTS)
    assert choose_prompts(None, checkpoint.tokenizer, 65) == []
    assert choose_prompts(["once"], checkpoint.tokenizer, 10_000) == ["once"]
    with pytest.raises(
        SamplesError, match=r"report\.prompts: 'once upon a time' has \d+ tokens, and the model has room"
    ):
        choose_prompts(["once upon a time"], checkpoint.tokenizer, 66)

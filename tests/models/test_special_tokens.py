"""Special tokens are texts or absent."""

from types import SimpleNamespace

import pytest

from pipeline.models.special_tokens import read_token


def test_tokens_are_read_and_other_values_refused():
    tokenizer = SimpleNamespace(bos_token="<s>", eos_token=None)
    assert read_token(tokenizer, "bos") == "<s>"
    assert read_token(tokenizer, "eos") is None
    with pytest.raises(TypeError, match=r"^bos_token=1: expected a text or null$"):
        read_token(SimpleNamespace(bos_token=1), "bos")

"""Tokenizers add a start token before texts, or none, as they are told to, also after they are saved and loaded."""

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.text.start_token import find_added_token, set_start_token_
from tests.conftest import make_tokenizer

PLAIN = make_tokenizer()("The house")["input_ids"]


def add_by_template(folder):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(folder)


def add_by_attribute(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)


def have_no_start_token(folder):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)


SOURCES = {
    "none added": (None, lambda folder: make_tokenizer().save_pretrained(folder)),
    "by template": (0, add_by_template),
    "by attribute": (0, add_by_attribute),
    "no BOS": (None, have_no_start_token),
}


@pytest.mark.parametrize("wanted", [None, 0, 1])
@pytest.mark.parametrize("source", SOURCES)
def test_tokenizer_adds_the_token_that_was_set(source, wanted, tmp_path):
    habit, make = SOURCES[source]
    make(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert find_added_token(tokenizer) == habit
    assert set_start_token_(tokenizer, wanted) == (wanted != habit)
    tokenizer.save_pretrained(tmp_path / "saved")
    first = [] if wanted is None else [wanted]
    for either in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert find_added_token(either) == wanted
        assert either("The house")["input_ids"] == [*first, *PLAIN]
        assert either("The house", add_special_tokens=False)["input_ids"] == PLAIN
        assert not set_start_token_(either, wanted)

"""Items of the packaged tasks are the same everywhere, held out from calibration, and well formed."""

from itertools import islice

from pipeline.evaluation.packaged_tasks import find_passages, load_last_words, load_word_analogies
from pipeline.text.corpora import fetch_corpus, read_documents, read_packaged_split


def test_packaged_items_are_fixed_held_out_and_well_formed(tmp_path):
    analogies = load_word_analogies()["test"]
    assert len(analogies) > 500
    for item in analogies:
        b = item["text"].split()[3]
        assert len(set(item["choices"])) == 4
        assert b not in item["choices"]
    first = analogies[0]
    assert (first["text"], first["choices"][first["label"]]) == ("Korea is to won as Canada is to", "dollar")
    assert load_word_analogies()["test"][:30] == analogies[:30]
    fetch_corpus("packaged:news", None, "text", tmp_path)
    assert list(read_packaged_split("packaged:news", "test")) == read_documents(tmp_path / "test.jsonl")
    passages = load_last_words()
    articles = " ".join(
        " ".join(text.split()) for text in islice(read_packaged_split("packaged:wikipedia", "test"), 11)
    )
    assert len(passages["test"]) >= 64
    for item in [*passages["test"], *passages["train"]]:
        assert item["word"] in item["context"]
        assert 39 <= len(item["context"].split()) < 90
        assert f"{item['context']} {item['word']}" in articles


def test_passages_end_in_a_word_that_occurred_before():
    filler = " ".join(f"w{i}" for i in range(38))
    assert list(find_passages(f"{filler} garden. The garden.")) == [
        {"context": f"{filler} garden. The", "word": "garden"}
    ]
    assert not list(find_passages(f"{filler} house. The garden."))  # not used before
    assert not list(find_passages("The garden. The garden."))  # too short
    assert not list(find_passages(f"{filler} cat. A cat."))  # a word of three letters

"""Sampled documents that are dropped: short ones, loops and copies."""

import torch

from pipeline.text.sampled import DocumentFilter, has_loop


def draw(count, seed=0):
    return torch.randint(1000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_document_is_kept_once_and_its_copy_is_dropped():
    judge, text = DocumentFilter(), draw(100)
    assert judge.accepts(text)
    assert not judge.accepts(text)
    assert judge.dropped == {"short": 0, "loop": 0, "near_duplicate": 1}
    assert (judge.kept_documents, judge.kept_tokens) == (1, 100)


def test_a_document_that_shares_less_than_half_of_its_pieces_is_kept():
    judge, text = DocumentFilter(), draw(100)
    judge.accepts(text)
    assert judge.accepts(text[:40] + draw(60, seed=1))
    assert not judge.accepts(draw(20, seed=2) + text)


def test_fifteen_tokens_are_short_and_sixteen_are_not():
    judge = DocumentFilter()
    assert not judge.accepts(draw(15))
    assert judge.accepts(draw(16))
    assert judge.dropped["short"] == 1


def test_a_loop_is_found_wherever_it_begins_and_a_repeated_phrase_is_no_loop():
    text = draw(200)
    assert not has_loop(text)
    assert has_loop(text + [7, 8, 9] * 30)
    assert has_loop([5] * 16)
    phrase = draw(12, seed=3)
    assert not has_loop(text[:50] + phrase + text[50:100] + phrase + text[100:])


def test_dropped_documents_do_not_count_as_known():
    """Otherwise a loop would make later documents near-duplicates of something that is not in the corpus."""
    judge, loop = DocumentFilter(), [1, 2, 3, 4] * 20
    assert not judge.accepts(loop)
    assert not judge.accepts(loop)
    assert judge.dropped == {"short": 0, "loop": 2, "near_duplicate": 0}

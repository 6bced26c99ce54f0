"""Windows cut from documents: which documents each split gets, in which order, and what refuses to be cut."""

import json

import pytest
import torch

from pipeline.text.calibration import (
    WindowsError,
    check_token_ids,
    count_overlapping_windows,
    cut_calibration_windows,
    cut_documents,
    cut_evaluation_windows,
    render_documents,
)
from pipeline.text.conversations import Conversation
from pipeline.text.corpora import fetch_corpus, read_documents
from tests.conftest import make_tokenizer

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
DOCUMENTS = [f"Document {number} speaks of the number {number} and of nothing else." for number in range(60)]


class Folders(dict):
    """Every corpus in a folder of its name below `data`."""

    def __init__(self, data):
        super().__init__({path.name: path for path in data.iterdir()})


def cut_evaluation(corpus, windows, length, data, tokenizer):
    return cut_evaluation_windows(
        corpus, windows=windows, length=length, folders=Folders(data), tokenizer=tokenizer, tokenizer_id="id"
    )


@pytest.fixture
def data(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        source = tmp_path / f"{name}.txt"
        source.write_text("\n\n".join(name + text for text in DOCUMENTS))
        fetch_corpus(str(source), None, "text", folder)
    return tmp_path / "data"


def cut(data, split, corpora_names=("a",), windows=4, length=16, seed=0, tokenizer=None):
    names = corpora_names if isinstance(corpora_names, dict) else list(corpora_names)
    return cut_calibration_windows(
        split,
        corpora=names,
        windows=windows,
        length=length,
        seed=seed,
        folders=Folders(data),
        tokenizer=tokenizer or make_tokenizer(),
        tokenizer_id="id",
    )


def test_splits_share_no_document(data):
    tokenizer = make_tokenizer()
    numbers_of = {}
    for split in ("search", "train", "end_to_end", "validation"):
        text = tokenizer.decode(cut(data, split, windows=9, length=24).token_ids.flatten().tolist())
        numbers_of[split] = {word for word in text.split() if word.isdigit()}
    numbers_of["evaluation"] = {
        word
        for word in tokenizer.decode(
            cut_evaluation("a", None, 24, data, tokenizer).token_ids.flatten().tolist()
        ).split()
        if word.isdigit()
    }
    assert all(len(numbers) >= 3 for numbers in numbers_of.values())
    for first in numbers_of:
        for second in numbers_of:
            assert first == second or not numbers_of[first] & numbers_of[second]


def test_fingerprints_follow_everything_that_determines_windows(data):
    base = cut(data, "train")
    assert (cut(data, "train").token_ids == base.token_ids).all()
    assert cut(data, "train").header == base.header
    assert not (cut(data, "train", seed=1).token_ids == base.token_ids).all()
    others = [
        cut(data, "train", seed=1),
        cut(data, "search"),
        cut(data, "end_to_end"),
        cut(data, "train", windows=3),
        cut(data, "train", ("b",)),
    ]
    assert len({windows.header.fingerprint for windows in [base, *others]}) == 6


def test_more_windows_begin_with_the_same_ones(data):
    assert (cut(data, "train", windows=8).token_ids[:4] == cut(data, "train", windows=4).token_ids).all()


def test_two_corpora_take_turns(data):
    mixed = cut(data, "train", ("a", "b"), windows=5).token_ids
    assert (mixed[0::2] == cut(data, "train", ("a",), windows=3).token_ids).all()
    assert (mixed[1::2] == cut(data, "train", ("b",), windows=2).token_ids).all()


def test_corpora_in_proportion_are_spread_over_all_windows(data):
    mixed = cut(data, "train", {"a": 3, "b": 1}, windows=8).token_ids
    assert (mixed[[0, 1, 3, 4, 5, 7]] == cut(data, "train", ("a",), windows=6).token_ids).all()
    assert (mixed[[2, 6]] == cut(data, "train", ("b",), windows=2).token_ids).all()
    equal, fractions = cut(data, "train", ("a", "b"), windows=8), cut(data, "train", {"a": 0.5, "b": 0.5}, windows=8)
    assert (equal.token_ids == fractions.token_ids).all()
    others = cut(data, "train", {"a": 3, "b": 1}, windows=8), cut(data, "train", {"b": 3, "a": 1}, windows=8)
    assert len({windows.header.fingerprint for windows in (equal, *others)}) == 3


def test_evaluation_is_the_whole_test_split_joined_by_blank_lines(data):
    tokenizer = make_tokenizer()
    whole = tokenizer("\n\n".join(read_documents(data / "a" / "test.jsonl")), add_special_tokens=False).input_ids
    windows = cut_evaluation("a", None, 20, data, tokenizer).token_ids
    assert windows.flatten().tolist() == whole[: len(whole) // 20 * 20]
    first = cut_evaluation("a", 3, 20, data, tokenizer).token_ids
    assert (first == windows[:3]).all()


def test_no_special_tokens_are_added(data):
    assert not set(cut(data, "train").token_ids.flatten().tolist()) & {0, 1}


def test_too_small_corpus_names_its_size_and_the_need(data):
    with pytest.raises(
        WindowsError, match=r"validation from a: needs 50 windows of 64 = 3200 tokens, the corpus has \d+"
    ):
        cut(data, "validation", windows=50, length=64)
    with pytest.raises(WindowsError, match=r"evaluation from a: needs 1 windows of 100000"):
        cut_evaluation("a", None, 100000, data, make_tokenizer())


def test_overlapping_windows_are_counted_wherever_they_are_cut():
    text = torch.randint(0, 5000, (2000,), generator=torch.Generator().manual_seed(0))
    known, other = text[:800].view(4, 200), text[1000:1600].view(3, 200)
    assert count_overlapping_windows(other, known) == 0
    assert count_overlapping_windows(text[70:670].view(3, 200), known) == 3
    assert count_overlapping_windows(text[720:1320].view(3, 200), known) == 0  # 80 of the first window's 200
    assert count_overlapping_windows(text[670:1270].view(3, 200), known) == 1  # 130 of them


def test_conversations_go_through_the_tokenizers_chat_template(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in [CHAT] * 20 + DOCUMENTS))
    folder = tmp_path / "data/chat"
    folder.mkdir(parents=True)
    assert fetch_corpus(str(path), None, "text", folder)["conversations"] == 20
    assert Conversation(CHAT) in read_documents(folder / "train.jsonl")
    tokenizer = make_tokenizer()

    def cut_chat():
        return cut_evaluation("chat", None, 16, tmp_path / "data", tokenizer)

    with pytest.raises(WindowsError, match=r"evaluation from chat: holds conversations, .* has no chat template"):
        cut_chat()
    tokenizer.chat_template = TEMPLATE
    windows = cut_chat()
    rendered = "[user] Hello?\n[assistant] Yes.\n"
    assert tokenizer.decode(windows.token_ids.flatten()).startswith(rendered)
    assert render_documents([Conversation(CHAT), "plain"], tokenizer, "x") == [rendered, "plain"]
    tokenizer.chat_template = TEMPLATE + " "
    assert cut_chat().header != windows.header
    train = cut(tmp_path / "data", "train", ["chat"], windows=2, tokenizer=tokenizer).header
    tokenizer.chat_template = TEMPLATE
    assert cut(tmp_path / "data", "train", ["chat"], windows=2, tokenizer=tokenizer).header != train


def test_start_token_at_the_beginning_of_a_template_is_left_out(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    assert render_documents([Conversation(CHAT)], tokenizer, "x") == ["[user] Hello?\n[assistant] Yes.\n"]
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"  # here it marks turns
    assert render_documents([Conversation(CHAT)], tokenizer, "x") == ["<s>Hello?<s>Yes."]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(WindowsError, match=r"x: the chat template refuses conversation 1 \(roles must alternate\)"):
        render_documents([Conversation(CHAT)], tokenizer, "x")


def test_text_with_a_token_without_a_row_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    token_ids = cut_documents(["The house <image> and the hill. " * 9], 2, 16, tokenizer, "x")
    with pytest.raises(WindowsError, match=r"x: holds the special token '<image>' \(320\), .* no row \(320 rows\)"):
        check_token_ids(token_ids, 320, tokenizer, "x")
    check_token_ids(token_ids, 321, tokenizer, "x")

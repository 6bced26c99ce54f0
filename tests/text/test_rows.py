"""What rows of text may hold, in whatever file; none is lost or half read, and none of the test split is trained on."""

import gzip
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.text.calibration import WindowsError, cut_calibration_windows, cut_evaluation_windows, render_documents
from pipeline.text.corpora import SPLITS, CorpusError, fetch_corpus, read_documents, read_local_documents
from tests.conftest import make_tokenizer

TEXTS = [f"Document {number} speaks of the number {number} and of nothing else." for number in range(40)]
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def write_lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return path


def fetch(source, folder):
    folder.mkdir()
    counts = fetch_corpus(str(source), None, "text", folder)
    return counts, {split: read_documents(folder / f"{split}.jsonl") for split in SPLITS}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": 7}\n', r"x\.jsonl, row 2, holds 7 \(int\) where text is expected"),
        ("x.jsonl", '{"text": "a"}\n5\n', r"x\.jsonl, row 2, holds 5 \(int\)"),
        ("x.jsonl", '{"text": {"a": 1}}\n', r"row 1, holds \{'a': 1\} \(dict\)"),
        ("x.jsonl", '{"text": true}\n', r"row 1, holds True \(bool\)"),
        ("x.jsonl", '{"text": ["a", "b"]}\n', r"row 1, is a list, but its item 1 is no message with role and cont"),
        ("x.jsonl", '{"text": [{"role": "user"}]}\n', r"row 1, is a list, but its item 1 is no message"),
        ("x.jsonl", '{"text": "a"}\n{"other": "b"}\n', r"row 2, has no field 'text' \(it has: other\)"),
        ("x.jsonl", '{"text": "\\ud800"}\n', r"row 1, holds half of a character"),
        ("x.jsonl", "[" * 100_000 + "\n", r"row 1: cannot be read \(maximum recursion depth"),
        ("x.json", '{"rows": []}', r"row 1, has no field 'text'"),
        ("x.json", '"text"', r"expected a list of rows"),
        ("x.csv", 'text\n"a"\n"never closed\n', r"x\.csv, row 2: cannot be read \(unexpected end of data"),
        ("x.csv", "id,text\n1,Well, not quoted\n", r"row 1, has more fields than the first line names"),
        ("x.csv", "", r"nothing|no text|too few"),
        ("x.txt", b"\xff\xfe\x00", r"x\.txt, row 1: cannot be read \('utf-8' codec"),
        ("x.parquet", b"PAR1 and nothing else", r"x\.parquet, row 1: cannot be read"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20],
            r"x\.jsonl\.gz, row \d+: cannot be read",
        ),
        ("x.jsonl.gz", b"no gzip", r"x\.jsonl\.gz, row 1: cannot be read \(Not a gzipped file"),
        ("x.tar.gz", b"", r"x\.tar\.gz: nothing to read; allowed are files ending in \.txt, "),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_text_is_refused_by_file_and_row(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError, match=message):
        read_local_documents(path, "text")


def test_rows_with_nothing_in_them_are_skipped_and_counted(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [None, *TEXTS, "", " \n", []])
    counts, splits = fetch(path, tmp_path / "out")
    assert counts["skipped_rows"] == 4
    assert sorted(itertools.chain(*splits.values())) == sorted(TEXTS)
    assert "skipped_rows" not in fetch(write_lines(tmp_path / "y.jsonl", TEXTS), tmp_path / "none")[0]


def test_a_short_csv_row_is_null_and_a_long_field_is_whole(tmp_path):
    long = "word " * 40_000
    (tmp_path / "x.csv").write_text(f'id,text\n1\n2,"{long}"\n3,b\n')
    assert read_local_documents(tmp_path / "x.csv", "text") == [long, "b"]


def test_compressed_files_are_read_as_the_files_they_hold(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.output_stream(str(tmp_path / "y.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    (tmp_path / "z.TXT").write_text("\ufeff" + "\r\n\r\n".join(TEXTS))
    for name in ("x.jsonl.gz", "y.jsonl.zst", "z.TXT"):
        assert read_local_documents(tmp_path / name, "text") == TEXTS
    whole = (tmp_path / "y.jsonl.zst").read_bytes()
    (tmp_path / "y.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"y\.jsonl\.zst, row \d+: cannot be read \(Truncated"):
        read_local_documents(tmp_path / "y.jsonl.zst", "text")


def test_files_named_as_on_the_hub_keep_their_split_in_nested_folders(tmp_path):
    table = pyarrow.table({"text": TEXTS[:10]})
    (tmp_path / "in/data").mkdir(parents=True)
    pyarrow.parquet.write_table(table, tmp_path / "in/data/train-00000-of-00002.parquet")
    write_lines(tmp_path / "in/data/train-00001-of-00002.jsonl", TEXTS[10:20])
    write_lines(tmp_path / "in/data/test-00000-of-00001.jsonl", TEXTS[20:30])
    write_lines(tmp_path / "in/dev/part-1.jsonl", TEXTS[30:])
    (tmp_path / "in/dataset_info.json").write_text('{"description": "no rows"}')
    _, splits = fetch(tmp_path / "in", tmp_path / "out")
    assert splits == {"train": TEXTS[:20], "test": TEXTS[20:30], "validation": TEXTS[30:]}


@pytest.mark.parametrize("has", [["test"], ["validation", "test"], ["validation"], ["train", "test"]])
def test_no_document_goes_to_two_splits(has, tmp_path):
    for place, split in enumerate(has):
        write_lines(tmp_path / f"in/{split}-0.jsonl", TEXTS[20 * place : 20 * place + 10])
        write_lines(tmp_path / f"in/{split}-1.jsonl", TEXTS[20 * place + 10 : 20 * place + 20])
    _, splits = fetch(tmp_path / "in", tmp_path / "out")
    assert sorted(itertools.chain(*splits.values())) == sorted(TEXTS[: 20 * len(has)])
    assert all(splits.values())
    if len(has) > 1:
        assert splits["test"] == TEXTS[20:]


def test_conversations_go_through_the_tokenizers_chat_template(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [CHAT] * 20 + TEXTS)
    (tmp_path / "data").mkdir()
    counts, splits = fetch(path, tmp_path / "data/chat")
    assert counts["conversations"] == 20
    assert CHAT in splits["train"]
    tokenizer = make_tokenizer()
    arguments = ("chat", None, 16, tmp_path / "data", tokenizer, "id")
    with pytest.raises(WindowsError, match=r"evaluation from chat: holds conversations, .* has no chat template"):
        cut_evaluation_windows(*arguments)
    tokenizer.chat_template = TEMPLATE
    windows = cut_evaluation_windows(*arguments)
    rendered = "[user] Hello?\n[assistant] Yes.\n"
    assert tokenizer.decode(windows.token_ids.flatten()).startswith(rendered)
    assert render_documents([CHAT, "plain"], tokenizer, "x") == [rendered, "plain"]
    tokenizer.chat_template = TEMPLATE + " "
    assert cut_evaluation_windows(*arguments).header != windows.header
    train = cut_calibration_windows("train", ["chat"], 2, 16, 0, tmp_path / "data", tokenizer, "id").header
    tokenizer.chat_template = TEMPLATE
    assert cut_calibration_windows("train", ["chat"], 2, 16, 0, tmp_path / "data", tokenizer, "id").header != train


def test_a_start_token_of_the_template_alone_is_left_to_calibration(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    assert render_documents([CHAT], tokenizer, "x") == ["[user] Hello?\n[assistant] Yes.\n"]
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"  # here it marks turns
    assert render_documents([CHAT], tokenizer, "x") == ["<s>Hello?<s>Yes."]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(WindowsError, match=r"x: the chat template refuses conversation 1 \(roles must alternate\)"):
        render_documents([CHAT], tokenizer, "x")

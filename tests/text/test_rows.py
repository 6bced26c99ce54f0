"""Rows of text in files of every format. Each row is read whole, skipped or refused."""

import gzip
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.text.conversations import Conversation
from pipeline.text.corpora import SPLITS, CorpusError, fetch_corpus, read_documents, read_local_documents

TEXTS = [f"Document {number} speaks of the number {number} and of nothing else." for number in range(40)]
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]


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
        (
            "x.jsonl",
            '{"text": ["a", "b"]}\n',
            r"row 1, is a list, but its item 1 is not a message with role and content",
        ),
        ("x.jsonl", '{"text": [{"role": "user"}]}\n', r"row 1, is a list, but its item 1 is not a message"),
        ("x.jsonl", '{"text": "a"}\n{"other": "b"}\n', r"row 2, has no field 'text' \(it has: other\)"),
        ("x.jsonl", '{"text": "\\ud800"}\n', r"row 1, holds half of a character"),
        ("x.jsonl", "[" * 100_000 + "\n", r"row 1: cannot be read \(maximum recursion depth"),
        ("x.json", '{"rows": []}', r"row 1, has no field 'text'"),
        ("x.json", '"text"', r"expected a list of rows"),
        ("x.json", '{\n "a": [{"text": "b"}],\n "c": [{"text": "d"}]\n}', r"is one object with several lists \(a, c\)"),
        ("x.json", '{"text": ["a", "b"], "id": [1, 2]}', r"is one object that holds columns, 'text' among them"),
        ("x.json", '{"text": {"0": "a", "1": "b"}}', r"is one object that holds columns.*orient='records'"),
        ("x.json", '{\n "version": 2\n}', r"row 1, has no field 'text' \(it has: version\)"),
        ("x.json", '{\n "data": [\n {"text": "a"},', r"row 1: cannot be read"),
        (
            "x.jsonl",
            '{\n "data": [\n {"text": "a"}\n ]\n}\n',
            r"row 1, does not hold a whole JSON.*Rename it to end",
        ),
        ("x.ndjson", '[\n {"text": "a"}\n]', r"row 1, does not hold a whole JSON value, but the whole file does"),
        ("x.csv", 'text\n"a"\n"never closed\n', r"x\.csv, row 2: cannot be read \(unexpected end of data"),
        ("x.csv", "id,text\n1,Well, not quoted\n", r"row 1, has more fields than the first line names"),
        ("x.csv", "", r"nothing|no text|too few"),
        ("x.csv", "text,id,text\na,1,b\n", r"x\.csv, row 1, has the field 'text' 2 times. Keep one of them"),
        ("x.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', r"row 2, has the field 'text' 2 times"),
        ("x.jsonl", '{"text": [{"role": "user", "content": "a", "role": "system"}]}\n', r"the field 'role' 2 times"),
        ("x.json", '[{"text": "a", "text": "b"}]', r"row 1, has the field 'text' 2 times. Keep one of them"),
        ("x.txt", b"\xff\xfe\x00", r"x\.txt, row 1: cannot be read \('utf-8' codec"),
        ("x.parquet", b"PAR1 and nothing else", r"x\.parquet, row 1: cannot be read"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20],
            r"x\.jsonl\.gz, row \d+: cannot be read",
        ),
        ("x.jsonl.gz", b"no gzip", r"x\.jsonl\.gz, row 1: cannot be read \(Not a gzipped file"),
        ("x.tar.gz", b"", r"x\.tar\.gz: nothing to read. Allowed are files ending in \.txt, "),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_rows_without_text_are_refused_by_file_and_row(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError, match=message):
        read_local_documents(path, "text")


def test_empty_rows_are_skipped_and_counted(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [None, *TEXTS, "", " \n", []])
    counts, splits = fetch(path, tmp_path / "out")
    assert counts["skipped_rows"] == 4
    assert sorted(itertools.chain(*splits.values())) == sorted(TEXTS)
    assert "skipped_rows" not in fetch(write_lines(tmp_path / "y.jsonl", TEXTS), tmp_path / "none")[0]


def test_short_csv_rows_are_null_and_long_fields_whole(tmp_path):
    long = "word " * 40_000
    (tmp_path / "x.csv").write_text(f'id,text\n1\n2,"{long}"\n3,b\n')
    assert read_local_documents(tmp_path / "x.csv", "text") == [long, "b"]


def test_compressed_files_give_the_same_rows(tmp_path):
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", json.dumps({"version": "1.1", "data": [{"text": text} for text in TEXTS]}, indent=2)),
        ("x.json", json.dumps({"rows": [{"text": text} for text in TEXTS], "total": 40, "errors": []})),
        ("x.json", json.dumps({"data": TEXTS}, indent=1)),
        ("x.json", json.dumps([{"text": text} for text in TEXTS], indent=4)),
        ("x.json", "\n\n".join(json.dumps({"text": text}) for text in TEXTS)),
        ("x.json", "\n".join(map(json.dumps, TEXTS))),
    ],
)
def test_json_is_read_as_a_list_as_a_wrapped_list_or_as_lines(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert read_local_documents(tmp_path / name, "text") == TEXTS


def test_one_json_object_with_the_field_is_one_row(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"text": "a", "tags": ["b", "c"]}, indent=2))
    assert read_local_documents(tmp_path / "x.json", "text") == ["a"]


def test_null_fields_that_columns_fill_in_are_left_out(tmp_path):
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "a", "arguments": {"city": "x"}}}]},
        {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "c", "arguments": {"day": "y"}}}]},
    ]
    tools = [{"name": "a", "strict": True}, {"name": "c"}]
    table = pyarrow.table({"messages": [messages, CHAT], "tools": [tools, None]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert read_local_documents(tmp_path / "x.parquet", "messages") == [
        Conversation(messages, {"tools": tools}),
        Conversation(CHAT),
    ]


@pytest.mark.parametrize(
    "text", ["A\nb\n\n  C", "A\nb\n\n  C\n", "\nA\nb\n \t\n  C\n  ", " \nA\r\nb\r\n\r\n  C\r\n\r\n"]
)
def test_documents_of_a_text_file_end_without_a_line_end(text, tmp_path):
    """Almost every file ends with one. Documents joined by blank lines would have a line end too many there."""
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode())
    assert read_local_documents(path, "text") == ["A\nb", "  C"]

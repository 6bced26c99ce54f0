"""Read the rows of text files in many formats. One rule judges each row, whatever file it is from.

    a string                                   a document
    null, an empty or blank string or list     nothing: skipped and counted
    [{"role": "user", "content": "Hi"}, …]     a conversation (`conversations.py` lists the forms). It is kept as
                                               messages, because corpora know no tokenizer: `calibration.py` puts it
                                               through the tokenizer's chat template
    anything else                              an error that names file and row

Formats: text (documents separated by blank lines), JSON lines, JSON, CSV, parquet; all but the last also compressed
(.gz, .bz2, .zst).
"""

import bz2
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from pipeline.runtime.errors import PipelineError, reading
from pipeline.text.conversations import (
    TEMPLATE_INPUTS,
    Conversation,
    RowError,
    parse_messages,
    read_conversation,
    show_value,
)

Document = str | Conversation
Reader = Callable[[Path, str], Iterator[Any]]
PLAIN_TEXT = (".txt", ".raw")


class CorpusError(PipelineError):
    """A corpus cannot be read. The message names the corpus and says what to do."""


def read_file(source: str, path: Path, text_field: str) -> Iterator[Document | None]:
    """Yield the document of each row of a file, None for a row that holds nothing.

    Args:
        source: the corpus as params.yaml or the command line names it, for messages.
        text_field: the field that holds the text, where rows have fields.

    Raises:
        CorpusError: names file and row.
    """
    reader = find_reader(path)
    if reader is None:
        raise CorpusError(f"corpus {source!r}: {path.name}: cannot be read. Allowed are files ending in {FORMATS}")
    row = 1
    with reading(lambda reason: CorpusError(f"corpus {source!r}: {path.name}, row {row}: cannot be read ({reason}).")):
        try:
            for value in reader(path, text_field):
                yield judge_row(value, text_field)
                row += 1
        except RowError as error:
            raise CorpusError(f"corpus {source!r}: {path.name}, row {row}, {error}") from None


def judge_row(row: object, text_field: str) -> Document | None:
    """Return the document that a row holds, None where it holds nothing.

    Raises:
        RowError: the row is neither; see the module's docstring.
    """
    fields: Mapping[str, Any] = {}
    if isinstance(row, dict):
        if text_field not in row:
            names = ", ".join(map(str, row)) or "none"
            raise RowError(f"has no field {text_field!r} (it has: {names}). Set text_field.")
        fields, row = row, row[text_field]
    if isinstance(row, str):
        _check_encoding([row])
        if (parsed := parse_messages(row)) is not None:
            messages, more = parsed
            row, fields = messages, {**fields, **more}
        else:
            return row if row.strip() else None
    if row is None or row == []:
        return None
    if not isinstance(row, list):
        raise RowError(
            f"holds {show_value(row)} ({type(row).__name__}) where text is expected. Use strings, or lists of "
            "messages with role and content."
        )
    conversation = read_conversation(row, fields)
    _check_encoding(conversation.list_strings())
    return None if conversation.is_empty else conversation


def count_characters(document: Document) -> int:
    """Return the length of a document, or of the contents of a conversation's messages."""
    return len(document) if isinstance(document, str) else sum(map(len, document.texts))


def _check_encoding(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError("holds half of a character (a lone surrogate). Correct its source.") from None


@contextmanager
def _open_text(path: Path) -> Iterator[io.TextIOBase]:
    open_file = _COMPRESSIONS.get(path.suffix.lower(), lambda path: path.open("rb"))
    with open_file(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        yield text


def _open_zstd(path: Path) -> Any:
    # pyarrow comes with `datasets`, and it notices where a compressed file is cut off.
    return pyarrow.input_stream(str(path), compression="zstd")


def _read_text(path: Path, text_field: str) -> Iterator[str]:
    with _open_text(path) as file:
        text = file.read().replace("\r\n", "\n").replace("\r", "\n")
    # Line ends around the text, so that blank lines at its ends separate too.
    yield from (part.strip("\n") for part in re.split(r"\n\s*\n", f"\n{text}\n") if part.strip())


def _read_lines(path: Path, text_field: str) -> Iterator[Any]:
    with _open_text(path) as file:
        lines = (line for line in file if line.strip())
        first = next(lines, None)
        if first is None:
            return
        try:
            yield _parse_json(first)
        except json.JSONDecodeError:
            if _is_json(first + file.read()):
                raise RowError(
                    "does not hold a whole JSON value, but the whole file does. Rename it to end in .json, or write "
                    "one value per line."
                ) from None
            raise
        yield from map(_parse_json, lines)


def _read_json(path: Path, text_field: str) -> Iterator[Any]:
    """Yield the rows of a list, of an object that wraps one list, or of JSON lines under another name."""
    with _open_text(path) as file:
        text = file.read()
    try:
        value = _parse_json(text)
    except ValueError:
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines or not _is_json(lines[0]):
            raise
        yield from map(_parse_json, lines)
        return
    if isinstance(value, dict):
        yield from _unwrap_rows(value, text_field)
    elif isinstance(value, list):
        yield from value
    else:
        raise ValueError("expected a list of rows")


def _unwrap_rows(value: dict[str, Any], text_field: str) -> list[Any]:
    """Return the rows of a JSON file that is one object: the object itself, or the only list in it."""
    texts = value.get(text_field)
    columns = list(texts.values()) if isinstance(texts, dict) else texts
    if isinstance(columns, list) and columns and all(isinstance(text, str) for text in columns):
        raise RowError(
            f"is one object that holds columns, {text_field!r} among them. Write one object for each row (in pandas: "
            "orient='records')."
        )
    lists = [name for name, rows in value.items() if isinstance(rows, list) and rows]
    if text_field in value or not lists:
        return [value]
    if len(lists) > 1:
        raise RowError(
            f"is one object with several lists ({', '.join(lists)}). Write a file for each of them that is text, with "
            "the list alone."
        )
    return value[lists[0]]


def _parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises RowError where an object has a field twice: json keeps the last one."""
    return json.loads(text, object_pairs_hook=_make_object)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"has the field {twice!r} {names.count(twice)} times. Keep one of them.")
    return values


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_csv(path: Path, text_field: str) -> Iterator[Any]:
    limit = csv.field_size_limit(sys.maxsize)  # 131,072 characters by default, fewer than an article may have
    try:
        with _open_text(path) as file:
            reader = csv.DictReader(file, strict=True)
            names = list(reader.fieldnames or ())
            if text_field in names and names.count(text_field) > 1:
                raise RowError(f"has the field {text_field!r} {names.count(text_field)} times. Keep one of them.")
            for row in reader:
                if any(row.pop(None, None) or ()):
                    raise RowError("has more fields than the first line names. Put texts with commas in quotes.")
                yield row
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, text_field: str) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if text_field not in columns:
            yield dict.fromkeys(columns)
            return
        names = [text_field, *(name for name in TEMPLATE_INPUTS if name in columns and name != text_field)]
        for batch in file.iter_batches(columns=names):
            for row in batch.to_pylist():
                yield {name: _drop_nulls(value) for name, value in row.items()}


def _drop_nulls(value: Any) -> Any:
    """Return a value without the null fields of its structs: columns have every field that any row has.

    A null `content` is kept: it is usual in messages that call tools.
    """
    if isinstance(value, dict):
        return {name: _drop_nulls(item) for name, item in value.items() if item is not None or name == "content"}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".zst": _open_zstd}
_READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".raw": _read_text,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
FORMATS = f"{', '.join(_READERS)}, all but the last also with {', '.join(_COMPRESSIONS)}"


def find_reader(path: Path) -> Reader | None:
    """Return the reader for the ending of a file's name, in upper or lower case; None where there is none."""
    compressed = path.suffix.lower() in _COMPRESSIONS
    ending = find_ending(path)
    return None if compressed and ending == ".parquet" else _READERS.get(ending)


def find_ending(path: Path) -> str:
    """Return the ending that tells a file's format, in lower case and without the ending of a compression.

    x.jsonl.gz -> .jsonl
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""

"""Rows of text in files of many formats, each judged by one rule, whatever held it.

    a string                                   a document
    null, an empty or blank string or list     nothing: skipped and counted
    [{"role": "user", "content": "Hi"}, …]     a conversation, kept as messages; `calibration.py` puts it through the
                                               tokenizer's chat template, since corpora know no model
    anything else                              an error that names file and row

Formats: text (documents separated by blank lines), JSON lines, JSON, CSV, parquet; all but the last also compressed
(.gz, .bz2, .zst). Files of a folder may lie in folders of their own, and keep the split that their name, or their
folder's, says, as on the Hugging Face Hub.
"""

import bz2
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from pipeline.runtime.errors import PipelineError, reading

Document = str | list[dict[str, str]]

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_WORDS = "|".join(sorted(_SPLIT_OF, key=len, reverse=True))
_AT_THE_START = re.compile(rf"({_WORDS})(?![a-z])")
_OF_A_SHARD = re.compile(rf"(?<![a-z])({_WORDS})[-._ ]?\d+-of-\d+")  # c4-train.00000-of-01024
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of `datasets`, no rows


class CorpusError(PipelineError):
    """A corpus cannot be had; one line saying what was asked for and what to do."""


class RowError(PipelineError):
    """A row holds no text; without saying where it stands."""


def list_files(path: Path) -> list[Path]:
    """The readable files of a folder and all folders below it, sorted; what is hidden does not count."""
    found = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if not hidden and find_reader(file) and file.name not in _DESCRIPTIONS and file.is_file():
            found.append(file)
    return found


def find_split(name: Path) -> str | None:
    """Which split a file says it is of, by its name, else by a folder's; None where nothing does.

    train-00000-of-00002.parquet, test.txt, dev/part-1.jsonl -> train, test, validation
    """
    stem = name.name.lower()
    match = _AT_THE_START.match(stem) or _OF_A_SHARD.search(stem)
    if match is not None:
        return _SPLIT_OF[match[1]]
    return next((_SPLIT_OF[part.lower()] for part in reversed(name.parent.parts) if part.lower() in _SPLIT_OF), None)


def read_file(source: str, path: Path, text_field: str) -> Iterator[Document | None]:
    """The document of each row, None for one with nothing in it. Raises CorpusError, naming file and row.

    Args:
        source: what params.yaml or the command line names, for messages.
        text_field: the field that holds the text, where rows have fields.
    """
    row = 1
    with reading(lambda why: CorpusError(f"corpus {source!r}: {path.name}, row {row}: cannot be read ({why})")):
        try:
            for value in find_reader(path)(path, text_field):
                yield judge_row(value, text_field)
                row += 1
        except RowError as error:
            raise CorpusError(f"corpus {source!r}: {path.name}, row {row}, {error}") from None


def judge_row(row: Any, text_field: str) -> Document | None:
    """See the module's docstring. Raises RowError."""
    if isinstance(row, dict):
        if text_field not in row:
            fields = ", ".join(map(str, row)) or "none"
            raise RowError(f"has no field {text_field!r} (it has: {fields}); set text_field")
        row = row[text_field]
    if row is None or (isinstance(row, list) and not row):
        return None
    document = _read_messages(row) if isinstance(row, list) else row
    if not isinstance(document, str | list):
        raise RowError(
            f"holds {_show(row)} ({type(row).__name__}) where text is expected; texts are strings, or lists of "
            "messages with role and content"
        )
    texts = [document] if isinstance(document, str) else [text for message in document for text in message.values()]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError("holds half of a character (a lone surrogate), which no file can; mend its source") from None
    empty = not document.strip() if isinstance(document, str) else not any(m["content"].strip() for m in document)
    return None if empty else document


def count_characters(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(len(message["content"]) for message in document)


def _read_messages(row: list[Any]) -> list[dict[str, str]]:
    messages = []
    for number, message in enumerate(row, start=1):
        values = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else []
        if not values or not all(isinstance(value, str) for value in values):
            raise RowError(f"is a list, but its item {number} is no message with role and content: {_show(message)}")
        messages.append(dict(zip(("role", "content"), values, strict=True)))
    return messages


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def _open_text(path: Path) -> Iterator[io.TextIOBase]:
    opened = _COMPRESSIONS.get(path.suffix.lower(), lambda path: path.open("rb"))(path)
    with opened as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        yield text


def _open_zstd(path: Path) -> Any:
    return pyarrow.input_stream(str(path), compression="zstd")  # which `datasets` brings; it minds where a file ends


def _read_text(path: Path, text_field: str) -> Iterator[str]:
    with _open_text(path) as file:
        text = file.read().replace("\r\n", "\n").replace("\r", "\n")
    yield from (part for part in re.split(r"\n\s*\n", text) if part.strip())


def _read_lines(path: Path, text_field: str) -> Iterator[Any]:
    with _open_text(path) as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _read_json(path: Path, text_field: str) -> Iterator[Any]:
    with _open_text(path) as file:
        text = file.read()
    if text.lstrip().startswith("{"):  # JSON lines by another name, as many on the hub are
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
        return
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError("expected a list of rows")
    yield from rows


def _read_csv(path: Path, text_field: str) -> Iterator[Any]:
    limit = csv.field_size_limit(sys.maxsize)  # 131,072 characters by default, fewer than an article may have
    try:
        with _open_text(path) as file:
            for row in csv.DictReader(file, strict=True):
                if any(row.pop(None, None) or ()):
                    raise RowError("has more fields than the first line names; quote texts that have commas")
                yield row
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, text_field: str) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if text_field not in columns:
            yield dict.fromkeys(columns)
            return
        for batch in file.iter_batches(columns=[text_field]):
            yield from batch.to_pylist()


_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".zst": _open_zstd}
_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".txt": _read_text,
    ".raw": _read_text,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
FORMATS = f"{', '.join(_READERS)}, all but the last also with {', '.join(_COMPRESSIONS)}"


def find_reader(path: Path) -> Callable[[Path, str], Iterator[Any]] | None:
    """By the end of a file's name, in whatever case."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        return None if suffixes[:-1] in ([], [".parquet"]) else _READERS.get(suffixes[-2])
    return _READERS.get(suffixes[-1]) if suffixes else None

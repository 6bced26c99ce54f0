"""Damaged corpora, compared with pyarrow's reading of the same files.

Rows are drawn from `ROWS`, which gives the outcome of each: kept, skipped or refused.
"""

import bz2
import csv
import functools
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from benchmarks.robustness.bases import Bases
from benchmarks.robustness.mutations import break_bytes, draw_disk
from benchmarks.robustness.trial import Trial
from pipeline.runtime.artifacts import replacing_folder
from pipeline.text.corpora import SPLITS, fetch_corpus, read_documents

ROWS: list[tuple[Any, str]] = [  # the text of a row, and its outcome
    *((value, "skipped") for value in (None, "", "  \n", [])),
    *((value, "refused") for value in (7, -0.5, True, {}, {"a": 1}, ["x"], [{"role": "user"}], "\ud800", [[]], [None])),
    *(([{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}], "kept") for text in ("Hi", "é")),
    *(
        (text, "kept")
        for text in ("a", "x" * 200_000, 'quo"te, and comma', "two\n\nparagraphs", "a\u2028\x85", "\ufeffx")
    ),
]


def break_corpus(rng: random.Random, bases: Bases, folder: Path) -> Trial:
    """Write a corpus in one of the formats, with odd rows or damaged bytes."""
    suffix = rng.choice([".jsonl", ".json", ".csv", ".parquet", ".txt"])
    rows: list[Any] = [f"Document {number} says {rng.random()}." for number in range(rng.choice([0, 1, 5, 30, 60]))]
    fate, what = "kept", "whole"
    if rows and rng.random() < 0.6 and suffix in (".jsonl", ".json"):
        value, fate = rng.choice(ROWS)
        place = rng.randrange(len(rows))
        rows[place], what = value, f"row {place} is {str(value)[:30]!r}"
    data = write_rows(rows, suffix)
    damaged = fate == "kept" and rng.random() < 0.5
    if damaged:
        data, what = break_bytes(rng, data)
    compression = rng.choice(["", "", ".gz", ".bz2", ".zst"]) if suffix != ".parquet" else ""
    data = compress(data, compression)
    if compression and rng.random() < 0.3:
        data, more = break_bytes(rng, data)
        what, damaged = f"{what}, {compression} {more}", True
    source = folder / "in"
    nested = rng.random() < 0.3
    path = (
        source / rng.choice(["", "a/b"]) / f"{rng.choice(['x', 'train', 'test-00000-of-00001'])}{suffix}{compression}"
    )
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    disk, full = draw_disk(rng)
    out, field = folder / "out", rng.choice(["text"] * 9 + ["body"])

    def act() -> None:
        with replacing_folder(out) as partial:
            fetch_corpus(str(source if nested else path), None, field, partial)

    def judge() -> str | None:
        documents = [document for split in SPLITS for document in read_documents(out / f"{split}.jsonl")]
        read = [document if isinstance(document, str) else document.messages for document in documents]
        expected = read_reference(path, suffix, compression) if damaged else keep_texts(rows)
        if expected is None:
            return None  # the reference cannot read the file
        if fate == "refused" or (field == "body" and suffix != ".txt"):
            return "rows that hold no text were accepted"
        return (
            None
            if sorted(map(str, read)) == sorted(map(str, expected))
            else f"{len(read)} of {len(expected)} documents"
        )

    return Trial(f"{full}{path.name}: {what}", act, judge, (out,), source, disk)


def write_rows(rows: list[Any], suffix: str) -> bytes:
    """Return the bytes of a file with these rows."""
    if suffix == ".jsonl":
        return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps([{"text": row} for row in rows]).encode()
    if suffix == ".txt":
        return "\n\n".join(rows).encode()
    if suffix == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text).writerows([["text", "id"], *([row, "1"] for row in rows)])
        return text.getvalue().encode()
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())}), sink)
    return sink.getvalue()


def compress(data: bytes, compression: str) -> bytes:
    """Return compressed bytes: "", ".gz", ".bz2" or ".zst"."""
    if compression == ".zst":
        return pyarrow.compress(data, codec="zstd", asbytes=True)
    return {"": bytes, ".gz": functools.partial(gzip.compress, mtime=0), ".bz2": bz2.compress}[compression](data)


def keep_texts(rows: list[Any]) -> list[Any]:
    """Return the rows that are kept, according to `ROWS`."""
    fates = [next((fate for value, fate in ROWS if value is row), "kept") for row in rows]
    return [row for row, fate in zip(rows, fates, strict=True) if fate == "kept"]


def read_reference(path: Path, suffix: str, compression: str) -> list[str] | None:
    """Return the texts that pyarrow reads, or the texts of a .txt file; None if that fails."""
    try:
        data = path.read_bytes()
        data = {"": bytes, ".gz": gzip.decompress, ".bz2": bz2.decompress}.get(compression, read_zstd)(data)
        if suffix == ".txt":
            text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            parts, part = [], []
            for line in [*text.split("\n"), ""]:
                if line.strip():
                    part.append(line)
                elif part:
                    parts.append("\n".join(part))
                    part = []
            return parts
        if suffix == ".json":
            values = [row["text"] for row in json.loads(data)]
        elif suffix == ".parquet":
            values = pyarrow.parquet.read_table(io.BytesIO(data))["text"].to_pylist()
        elif suffix == ".csv":
            convert = pyarrow.csv.ConvertOptions(column_types={"text": pyarrow.string()}, strings_can_be_null=False)
            parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
            values = pyarrow.csv.read_csv(io.BytesIO(data), parse_options=parse, convert_options=convert)[
                "text"
            ].to_pylist()
        else:
            schema = pyarrow.schema({"text": pyarrow.string()})
            values = pyarrow.json.read_json(
                io.BytesIO(data), parse_options=pyarrow.json.ParseOptions(explicit_schema=schema)
            )["text"].to_pylist()
        return [value for value in values if value and value.strip()]
    except Exception:
        return None


def read_zstd(data: bytes) -> bytes:
    """Return decompressed bytes."""
    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()

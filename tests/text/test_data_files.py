"""The files of a folder that are data, and the split of each. No document goes to two splits."""

import gzip
import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.text.corpora import CorpusError, read_local_documents
from pipeline.text.data_files import find_split, list_data_files
from tests.text.test_rows import TEXTS, fetch, write_lines


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


def write_rows(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json.dumps([{"text": text} for text in TEXTS]).encode()))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(TEXTS))
    else:
        write_lines(path, TEXTS)


@pytest.mark.parametrize("data", ["x.jsonl", "train.parquet", "x.json.gz", "x.csv", "book.txt", "deep/train.txt"])
@pytest.mark.parametrize(
    "name", ["LICENSE.txt", "readme.TXT", "LICENSE-APACHE.txt", "README_en.txt.gz", "docs/NOTICE.txt"]
)
def test_files_about_the_data_are_skipped_and_named(data, name, tmp_path, caplog):
    folder = tmp_path / "in"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"Permission is hereby granted.")
    if data == "x.csv":
        (folder / data).write_text("text\n" + "".join(f'"{text}"\n' for text in TEXTS))
    else:
        write_rows(folder / data)
    _, splits = fetch(folder, tmp_path / "out")
    assert sorted(itertools.chain(*splits.values())) == sorted(TEXTS)
    assert f"skipped, as files about the data: {name}" in caplog.text
    assert read_local_documents(folder, "text") == TEXTS


@pytest.mark.parametrize("name", ["notes.txt", "urls.txt", "data/sources.raw", "train/stopwords.txt"])
def test_a_text_file_next_to_files_with_fields_is_refused_by_name(name, tmp_path):
    write_rows(tmp_path / "in/train/x.jsonl")
    write_rows(tmp_path / "in" / name.replace(".raw", ".txt"))
    (tmp_path / "in" / name.replace(".raw", ".txt")).rename(tmp_path / "in" / name)
    with pytest.raises(CorpusError, match=rf"{name} next to files with fields: is it data, or about the data\? M"):
        fetch(tmp_path / "in", tmp_path / "out")


def test_names_of_splits_allow_text_next_to_files_with_fields(tmp_path):
    write_lines(tmp_path / "in/train/x.jsonl", TEXTS[:30])
    (tmp_path / "in/test").mkdir()
    (tmp_path / "in/test/part.txt").write_text("\n\n".join(TEXTS[30:35]))
    (tmp_path / "in/validation.txt").write_text("\n\n".join(TEXTS[35:]))
    _, splits = fetch(tmp_path / "in", tmp_path / "out")
    assert splits == {"train": TEXTS[:30], "test": TEXTS[30:35], "validation": TEXTS[35:]}


def test_a_file_about_the_data_is_read_where_it_is_the_source(tmp_path):
    write_rows(tmp_path / "in/LICENSE.txt")
    assert read_local_documents(tmp_path / "in/LICENSE.txt", "text") == TEXTS
    with pytest.raises(CorpusError, match=r"only files about the data \(LICENSE\.txt\)"):
        read_local_documents(tmp_path / "in", "text")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("Test.txt", "test"),
        ("dev/part-1.jsonl", "validation"),
        ("en/c4-train.00000-of-01024.json.gz", "train"),
        ("test/train.txt", "train"),
        ("trainer.txt", None),
        ("latest.txt", None),
    ],
)
def test_names_tell_the_split(name, split):
    assert find_split(Path(name)) == split


@pytest.mark.parametrize(
    "name", ["licenses/MIT.txt", "mit-license.txt", "third_party/README.txt", "TERMS_OF_USE.txt", "data_readme.txt"]
)
def test_folders_and_other_names_about_the_data_are_skipped(name, tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("terms")
    files = list_data_files(tmp_path)
    assert [files.data, files.skipped] == [[tmp_path / "a.txt"], [tmp_path / name]]


def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    """A file that is read twice would be dealt into training and test."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "corpus"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "b.txt").write_text("two")
    (folder / "a.txt").write_text("one")
    (folder / "again.txt").symlink_to(folder / "a.txt")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert list_data_files(folder).data == [folder / "a.txt", folder / "linked/b.txt"]

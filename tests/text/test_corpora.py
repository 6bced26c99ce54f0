"""Corpora: local files and folders, hub data sets and packaged text, dealt to three splits."""

import itertools
import json

import datasets
import pytest

from pipeline.text import corpora
from pipeline.text.corpora import CorpusError, fetch_corpus, read_documents

DOCUMENTS = [f"Document {number} speaks of the number {number} and of nothing else." for number in range(60)]


def fetch(source, folder, max_documents=None, text_field="text"):
    folder.mkdir(exist_ok=True)
    counts = fetch_corpus(str(source), max_documents, text_field, folder)
    return counts, {split: read_documents(folder / f"{split}.jsonl") for split in corpora.SPLITS}


def write(path, rows):
    if path.suffix == ".txt":
        path.write_text("\n\n".join(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"body": row} for row in rows]))
    elif path.suffix == ".csv":
        path.write_text("id,body\n" + "".join(f'{number},"{row}"\n' for number, row in enumerate(rows)))
    else:
        datasets.Dataset.from_dict({"body": rows}).to_parquet(str(path))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_local_files_are_dealt_whole_and_none_is_lost(suffix, tmp_path):
    counts, splits = fetch(write(tmp_path / f"x{suffix}", DOCUMENTS), tmp_path / "out", text_field="body")
    assert sorted(itertools.chain(*splits.values())) == sorted(DOCUMENTS)
    assert {split: len(texts) for split, texts in splits.items()} == {"train": 39, "validation": 6, "test": 15}
    assert counts["test"] == {"documents": 15, "characters": sum(map(len, splits["test"]))}
    for texts in splits.values():
        assert texts == sorted(texts, key=DOCUMENTS.index)


def test_a_folder_with_files_named_after_splits_keeps_them(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write(source / "train.txt", DOCUMENTS[:30])
    write(source / "test.jsonl", DOCUMENTS[30:33])
    _, splits = fetch(source, tmp_path / "out", text_field="body")
    assert splits["test"] == DOCUMENTS[30:33]
    assert sorted(splits["train"] + splits["validation"]) == sorted(DOCUMENTS[:30])
    assert len(splits["validation"]) == 3


def test_folder_below_home_is_read_without_hidden_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = tmp_path / "in"
    source.mkdir()
    write(source / "prose.txt", DOCUMENTS[:30])
    write(source / ".old.txt", DOCUMENTS[30:])
    _, splits = fetch("~/in", tmp_path / "out")
    assert sorted(itertools.chain(*splits.values())) == sorted(DOCUMENTS[:30])


def test_max_documents_limits_each_split(tmp_path):
    _, splits = fetch(write(tmp_path / "x.txt", DOCUMENTS), tmp_path / "out", max_documents=20)
    assert sorted(itertools.chain(*splits.values())) == sorted(DOCUMENTS[:20])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: folder / "missing",
            r"no such file or folder. Correct the path, or use one of wikitext2, ptb, c4",
        ),
        (lambda folder: write(folder / "x.txt", DOCUMENTS[:2]), "2 documents are too few"),
        (
            lambda folder: write(folder / "x.jsonl", DOCUMENTS),
            r"row 1, has no field 'text' \(it has: body\)\. Set text",
        ),
        (lambda folder: (folder / "x.pdf").write_text("") or folder / "x.pdf", r"x\.pdf: nothing to read. Allowed are"),
        (lambda folder: (folder / "x.jsonl").write_text("{") and folder / "x.jsonl", r"x\.jsonl, row 1: cannot"),
    ],
)
def test_unusable_sources_are_refused_with_the_reason(make, message, tmp_path):
    with pytest.raises(CorpusError, match=message):
        fetch(make(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("name", corpora.HUB_CORPORA)
def test_hub_corpora_are_requested_as_in_the_field(name, tmp_path, monkeypatch):
    asked = []

    def load(repository, config, **options):
        asked.append((repository, config, options["split"], options["revision"]))
        field = corpora.HUB_CORPORA[name].text_field
        return [{field: f"{options['split']} row {number}"} for number in range(1200)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    _, splits = fetch(name, tmp_path / "out")
    expected = {
        "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "main"),
        "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "refs/convert/parquet"),
        "c4": ("allenai/c4", None, "validation", "main"),
        "pile": ("mit-han-lab/pile-val-backup", None, "validation", "main"),
        "redpajama": ("togethercomputer/RedPajama-Data-1T-Sample", "plain_text", "train", "refs/convert/parquet"),
    }
    assert expected[name] in asked
    assert all(splits.values())
    assert "trust_remote_code" not in str(asked)


def test_wikitext_rows_become_articles_that_join_to_the_same_text(tmp_path, monkeypatch):
    rows = ["", " = One = \n", "", " text \n", " = = Part = = \n", " more \n", " = Two = \n", " end \n"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: [{"text": row} for row in rows])
    _, splits = fetch("wikitext2", tmp_path / "out")
    assert [text.strip().split("\n")[0].strip() for text in splits["test"]] == ["", "= One =", "= Two ="]
    assert "\n\n".join(splits["test"]) == "\n\n".join(rows)


def test_unreachable_hub_names_the_request(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(CorpusError, match=r"cannot fetch Salesforce/wikitext .*'train' \(no route to the hub\)\.$"):
        fetch("wikitext2", tmp_path / "out")


def test_wikipedia_markup_is_stripped():
    text = corpora._strip_markup(
        "'''Stone''' is [[rock (geology)|hard]]<ref name=a>A {{cite|x}} book</ref>.<ref name=a/>\n"
        "{| class=x\n| a table\n|}\n[[File:a.png|thumb|A [[picture]]]]{{box|y=1}}<!-- note -->[[Category:A]] End."
    )
    assert text.replace("\n", " ").split() == ["Stone", "is", "hard.", "End."]

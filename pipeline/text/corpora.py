"""Fetch raw documents: data sets of the hub, local files, or text inside PyPI packages.

Every corpus ends up as three JSONL files, one per split, so that calibration need not know where it came from: `train`
(calibration windows), `validation` (early stopping) and `test` (held-out evaluation, cut the field's way). A source
that lacks a split has its documents dealt out, whole documents at a time, by a fixed pattern. Documents are written as
fetched, in their order. Nothing here depends on a model. `rows.py` says what a row of a file may hold, `data_files.py`
which files of a folder are read.
"""

import bz2
import importlib.util
import itertools
import json
import logging
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import mwparserfromhell
from mwparserfromhell.nodes import Node
from mwparserfromhell.wikicode import Wikicode

from pipeline.runtime.errors import reading
from pipeline.runtime.sources import as_path
from pipeline.text.conversations import Conversation
from pipeline.text.data_files import find_split, list_data_files
from pipeline.text.hub import HUB_CORPORA, HubCorpus
from pipeline.text.params import GENERATED
from pipeline.text.rows import FORMATS, CorpusError, Document, count_characters, find_reader, read_file

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

# The split of each of 20 documents in turn: 13 train, 2 validation, 5 test. The pattern is fixed, so a document keeps
# its split when `max_documents` changes.
_DEALING: tuple[str, ...] = ("train",) * 4 + ("test", "validation") + ("train",) * 3 + ("test",) + ("train",) * 3
_DEALING += ("test", "validation", "test") + ("train",) * 3 + ("test",)
# An article has thousands of references. Removing them before the parser builds its tree is far faster.
_REFERENCE = re.compile(r"<ref\b[^>]*/>|<ref\b.*?</ref>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_LEFT_OUT = re.compile(r"\s*(file|image|category):", re.IGNORECASE)  # links
_GENERATED_NOTE = "The stage `generation` writes the documents of this corpus: artifacts/generation/NAME/.\n"
_MINIMUM_ARTICLE = 200  # characters; shorter ones are stubs that hold only markup


def fetch_corpus(source: str, max_documents: int | None, text_field: str, folder: Path) -> dict[str, Any]:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` into `folder`, which must exist.

    Args:
        source: a name in `HUB_CORPORA`, `packaged:wikipedia`, `packaged:news`, `generated`, or a path: a .txt
            (documents separated by blank lines), .jsonl, .json, .csv or .parquet file, or a folder of such files and
            folders. A folder whose files are named after splits (`train-00000-of-00002.parquet`, `test.txt`) keeps
            those splits.
        max_documents: the maximum number of documents taken from each split of the source; None takes all.
        text_field: the field that holds the text, in local files with fields.

    Returns:
        {split: {"documents": count, "characters": count}}; {} for `generated`, which the stage `generation` samples
        with the model. Where there are any, also `skipped_rows`, which hold nothing, and `conversations`, documents
        that are lists of messages.

    Raises:
        CorpusError: the source does not exist or cannot be read or reached, lacks the field, or has too few documents.
    """
    if source == GENERATED:
        (folder / "README.txt").write_text(_GENERATED_NOTE, encoding="utf-8")
        return {}
    skipped = 0
    if source in HUB_CORPORA:
        fetched = _read_hub(source, max_documents)
    elif source.startswith("packaged:"):
        fetched = {"train": _cap(_read_packaged(source), max_documents)}
    else:
        fetched, skipped = _read_path(source, text_field, max_documents)
    splits = _deal(source, fetched)
    counts: dict[str, Any] = write_splits(splits, folder)
    conversations = sum(not isinstance(document, str) for documents in splits.values() for document in documents)
    more = {"skipped_rows": skipped, "conversations": conversations}
    return counts | {name: count for name, count in more.items() if count}


def deal_documents(source: str, documents: list[Document]) -> dict[str, list[Document]]:
    """Return the documents of each split, dealt from one list by the fixed pattern.

    Raises:
        CorpusError: they are too few; names `source`.
    """
    return _deal(source, {"train": documents})


def write_splits(splits: dict[str, list[Document]], folder: Path) -> dict[str, Any]:
    """Write SPLIT.jsonl for each split into `folder`; return {split: {"documents": count, "characters": count}}."""
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for document in splits[split]:
                row = {"text": document} if isinstance(document, str) else document.to_row()
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        split: {"documents": len(documents), "characters": sum(map(count_characters, documents))}
        for split, documents in sorted(splits.items())
    }


def find_corpus(name: str, data: Path, generated: Path) -> Path:
    """Return the folder with the splits of corpus `name`: below `generated` where the model wrote it, else `data`."""
    return generated / name if (generated / name).is_dir() else data / name


def read_documents(path: Path) -> list[Document]:
    """Return the documents of one split's JSONL file, in order.

    Raises:
        CorpusError: the file is missing or damaged.
    """
    is_generated = path.parent.parent.name == "generation"
    stage = "generation" if is_generated else f"corpora@{path.parent.name}"
    remedy = f"Rerun the stage that makes it: dvc repro {stage}"
    if not path.is_file():
        raise CorpusError(f"{path} is missing. {remedy}")
    with (
        reading(lambda reason: CorpusError(f"{path} is damaged ({reason}). {remedy}")),
        open(path, encoding="utf-8") as file,
    ):
        rows = map(json.loads, file)
        return [Conversation.from_row(row) if "messages" in row else row["text"] for row in rows]


def read_local_documents(source: Path, text_field: str) -> list[Document]:
    """Return all documents of a local file or folder, whatever split they belong to.

    Raises:
        CorpusError: there are none, or they cannot be read.
    """
    documents = list(itertools.chain(*_read_path(str(source), text_field, None)[0].values()))
    if not documents:
        raise CorpusError(f"corpus {str(source)!r}: has no text. Give a file or folder with at least one document.")
    return documents


def read_packaged_split(source: str, split: str) -> Iterator[str]:
    """Yield the documents that `fetch_corpus` deals to `split` of `packaged:…`, each parsed when it is asked for."""
    dealt = zip(_read_packaged(source), itertools.cycle(_DEALING))
    return (text for text, text_split in dealt if text_split == split)


def find_packaged_file(name: str) -> Path:
    """Return the path of a data file in the package gensim.

    Raises:
        CorpusError: the package is not installed.
    """
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(
            f"{name!r}: needs the package gensim. Run: pip install --no-deps -r requirements-packaged.txt"
        )
    return Path(spec.submodule_search_locations[0]) / "test" / "test_data" / name


def _deal(source: str, fetched: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Give each split that the source lacks a part of another split's documents, by `_DEALING`.

    The giver is `train`, or the first split that the source has. No document goes to two splits.
    """
    lacking = {split for split in SPLITS if not fetched.get(split)}
    if not lacking:
        return fetched
    giver = next((split for split in SPLITS if split not in lacking), "train")
    dealt = fetched.get(giver, [])
    splits: dict[str, list[Document]] = {split: fetched.get(split, []) for split in SPLITS} | {giver: []}
    for document, split in zip(dealt, itertools.cycle(_DEALING)):
        splits[split if split in lacking else giver].append(document)
    empty = [split for split in SPLITS if not splits[split]]
    if empty:
        raise CorpusError(
            f"corpus {source!r}: {len(dealt)} documents are too few to give {', '.join(empty)} a share "
            f"(at least {1 + _DEALING.index('validation')} are needed). In a .txt, blank lines separate documents."
        )
    return splits


def _cap(documents: Iterable[Document], maximum: int | None) -> list[Document]:
    return list(itertools.islice(documents, maximum))


def _read_hub(name: str, max_documents: int | None) -> dict[str, list[Document]]:
    corpus = HUB_CORPORA[name]
    request = f"{corpus.repository} ({corpus.config or 'default'}, revision {corpus.revision})"
    fetched = {}
    for split, hub_split in corpus.splits.items():
        try:
            rows = datasets.load_dataset(
                corpus.repository,
                corpus.config if corpus.data_files is None else None,
                revision=corpus.revision,
                data_files=corpus.data_files,
                split=hub_split,
                streaming=max_documents is not None,
            )
            fetched[split] = _cap(_join_rows(rows, corpus), max_documents)
        except Exception as error:  # the hub's client raises errors of many libraries
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CorpusError(f"corpus {name!r}: cannot fetch {request}, split {hub_split!r} ({reason}).") from error
    return fetched


def _join_rows(rows: datasets.Dataset | datasets.IterableDataset, corpus: HubCorpus) -> Iterator[str]:
    """Yield documents made of rows. Joining them by blank lines gives the same text as joining the rows."""
    document: list[str] = []
    for row in rows:
        assert isinstance(row, dict), "a data set yields its rows as dicts"
        text = row[corpus.text_field]
        starts = re.match(corpus.heading, text) if corpus.heading else len(document) >= corpus.rows_per_document
        if starts and document:
            yield "\n\n".join(document)
            document = []
        document.append(text)
    if document:
        yield "\n\n".join(document)


def _read_path(source: str, text_field: str, max_documents: int | None) -> tuple[dict[str, list[Document]], int]:
    """Return the documents of each split that a file or folder has, and the number of rows that hold nothing."""
    path = as_path(source)
    if path.is_dir():
        files = _choose_files(source, path)
    elif path.exists():
        files = [path] if find_reader(path) else []
    else:
        known = ", ".join([*HUB_CORPORA, "packaged:wikipedia", "packaged:news", GENERATED])
        raise CorpusError(f"corpus {source!r}: no such file or folder. Correct the path, or use one of {known}.")
    if not files:
        raise CorpusError(f"corpus {source!r}: {path.name}: nothing to read. Allowed are files ending in {FORMATS}")
    splits: dict[str, list[Document]] = {}
    skipped = 0
    for file in files:
        split = find_split(file.relative_to(path)) if len(files) > 1 else None
        documents = splits.setdefault(split or "train", [])
        for document in read_file(source, file, text_field):
            if document is None:
                skipped += 1
            else:
                documents.append(document)
    return {split: _cap(documents, max_documents) for split, documents in splits.items()}, skipped


def _choose_files(source: str, folder: Path) -> list[Path]:
    """Return the data files of a folder, and log the names of those that are left out.

    Raises:
        CorpusError: it is not clear whether a file is data, or none is.
    """
    files = list_data_files(folder)
    doubtful, skipped = (
        ", ".join(str(path.relative_to(folder)) for path in paths) for paths in (files.doubtful, files.skipped)
    )
    if doubtful:
        raise CorpusError(
            f"corpus {source!r}: {doubtful} next to files with fields: is it data, or about the data? Move it away, or "
            "name it after a split (train.txt)."
        )
    if skipped and not files.data:
        raise CorpusError(
            f"corpus {source!r}: holds only files about the data ({skipped}). To read one, name that file."
        )
    if skipped:
        logger.warning("corpus %r: skipped, as files about the data: %s", source, skipped)
    return files.data


def _read_packaged(source: str) -> Iterator[str]:
    if source == "packaged:news":
        return iter(find_packaged_file("lee_background.cor").read_text(encoding="utf-8").splitlines())
    return _read_wikipedia(find_packaged_file("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"))


def _read_wikipedia(path: Path) -> Iterator[str]:
    """Yield the articles of a MediaWiki dump as plain text, without redirects and other namespaces."""
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
    """Return an article's text without references, tables, pictures, categories and templates."""
    code = mwparserfromhell.parse(_REFERENCE.sub("", wikitext))
    for node in code.filter_tags(matches=lambda tag: str(tag.tag).lower() in {"table", "gallery", "math"}):
        _remove(code, node)
    for link in code.filter_wikilinks(matches=lambda link: bool(_LEFT_OUT.match(str(link.title)))):
        _remove(code, link)
    text = code.strip_code(normalize=True, collapse=True)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def _remove(code: Wikicode, node: Node) -> None:
    # A node inside another one that was removed before is no longer there.
    if code.contains(node):
        code.remove(node)

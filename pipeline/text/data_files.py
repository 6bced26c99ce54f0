"""The data files of a folder, and the split that each belongs to.

Files may lie in folders of their own. Their names, or the names of their folders, tell the split, as on the Hugging
Face Hub:

    train-00000-of-00002.parquet, test.txt, dev/part-1.jsonl     train, test, validation

Not every readable file is data. Hidden files and the descriptions that `datasets` writes never are. A text file whose
name or folder says that it is about the data (LICENSE.txt, README_en.txt, licenses/MIT.txt) is skipped and reported.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from pipeline.runtime.files import list_files
from pipeline.text.rows import PLAIN_TEXT, find_ending, find_reader

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_WORDS = "|".join(sorted(_SPLIT_OF, key=len, reverse=True))
_AT_THE_START = re.compile(rf"({_WORDS})(?![a-z])")
_OF_A_SHARD = re.compile(rf"(?<![a-z])({_WORDS})[-._ ]?\d+-of-\d+")  # c4-train.00000-of-01024
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # by `datasets`
_ABOUT_DATA = re.compile(
    r"(un)?(licen[cs]es?|read[-_]?me|notices?|copying|copyright|change[-_]?log|citations?|cite|authors|credits|contributors"
    r"|contributing|attributions?|acknowledge?ments?|requirements|manifest|check[-_]?sums?|md5(sums?)?|sha\d*(sums?)?"
    r"|code_of_conduct|security|version|(data|dataset)[-_]?(card|sheet)|terms([-_]of[-_](use|service))?|disclaimers?"
    r"|robots|(acceptable[-_])?use[-_]policy|privacy[-_]policy)(?![a-z])"
)
_LEGAL = re.compile(
    r"(?<![a-z])(licen[cs]es?|read[-_]?me|copying|copyright|change[-_]?log)(?![a-z])"
)  # mit-license.txt


class DataFiles(NamedTuple):
    """The readable files of a folder and all folders below it, sorted.

    Attributes:
        data: those that are read.
        skipped: text files whose names say that they are about the data.
        doubtful: text files next to files with fields (JSON, CSV, parquet), whose names do not tell a split. They may
            be data or notes.
    """

    data: list[Path]
    skipped: list[Path]
    doubtful: list[Path]


def list_data_files(folder: Path) -> DataFiles:
    """Return the files of a folder, and of all folders below it, whose format can be read."""
    readable = [path for path in list_files(folder) if path.name not in _DESCRIPTIONS and find_reader(path)]
    targets = {path.resolve() for path in readable if not path.is_symlink()}
    files = [  # a link to a file that is in the folder itself is not read a second time
        (path, find_ending(path) in PLAIN_TEXT)
        for path in readable
        if not path.is_symlink() or path.resolve() not in targets
    ]
    skipped = [path for path, is_text in files if is_text and _is_about_data(path.relative_to(folder))]
    with_fields = {path.parent for path, is_text in files if not is_text}
    doubtful = [
        path
        for path, is_text in files
        if is_text and with_fields and path not in skipped and not _tells_split(path, folder, with_fields)
    ]
    return DataFiles([path for path, _ in files if path not in {*skipped, *doubtful}], skipped, doubtful)


def _is_about_data(name: Path) -> bool:
    """Whether the name of a text file, or of a folder above it, says that it is about the data."""
    return any(_ABOUT_DATA.match(part.lower()) or _LEGAL.search(part.lower()) for part in name.parts)


def find_split(name: Path) -> str | None:
    """Return the split that a file's path below its source tells, by its name, else by a folder's; None if neither."""
    split = _find_split_of_name(name.name)
    if split is not None:
        return split
    return next((_SPLIT_OF[part.lower()] for part in reversed(name.parent.parts) if part.lower() in _SPLIT_OF), None)


def _find_split_of_name(name: str) -> str | None:
    match = _AT_THE_START.match(name.lower()) or _OF_A_SHARD.search(name.lower())
    return None if match is None else _SPLIT_OF[match[1]]


def _tells_split(path: Path, folder: Path, with_fields: Collection[Path]) -> bool:
    """Return whether a text file's or its folder's name tells a split, and no file with fields is in that folder."""
    if _find_split_of_name(path.name) is not None:
        return True
    return path.parent not in with_fields and find_split(path.relative_to(folder)) is not None

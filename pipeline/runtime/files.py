"""Write files whole or not at all. This module imports no torch, so that commands which must start fast can use it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHAT_TEMPLATES = "additional_chat_templates"  # a folder of a model, as transformers names it


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, replacing `path` in one step.

    Raises:
        ValueError: `value` holds NaN or an infinity.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; make its folder. On success the file takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        # Sync before the rename: after a power cut, the name must not refer to a file whose content never arrived.
        with open(temporary, "r+b") as file:  # Windows syncs only files that are open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def list_files(folder: Path) -> list[Path]:
    """Return all files of a folder and of all folders below it, sorted, without hidden ones and `__pycache__`.

    Links to folders are followed, each folder once.
    """
    files, visited = [], set[str]()
    for place, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__pycache__")
        files += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.is_file())

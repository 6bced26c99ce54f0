"""Artifacts are safetensors and JSON files, written whole or not at all. A header says where each one comes from.

Every safetensors file carries one metadata key, `prefixquant`. It holds canonical JSON (sorted keys; no time, host or
path): the stage that wrote the file, the format version, a fingerprint of the values that determine the tensors, the
fingerprints of the artifacts it was made from, and the versions of the packages that computed it. There is only one key
because safetensors writes several keys in random order, which would change the file's hash. A folder that other tools
read too (a checkpoint) has the same header once more in `artifact.json`.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.runtime.errors import PipelineError, reading
from pipeline.runtime.files import replacing, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
METADATA_KEY = "prefixquant"
FOLDER_HEADER = "artifact.json"
# Bytes. Files are mapped into memory, and torch's product of a single row with a matrix (GEMV) rounds differently where
# the matrix is not aligned to 16 bytes. Without a fixed alignment, results would depend on the length of the header.
ALIGNMENT = 64
# Packages that determine results: they compute, tokenize, or read models and texts.
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "gguf",
    "datasets",
    "mwparserfromhell",
    "lm-eval",
    "fast-hadamard-transform",
)


class ArtifactError(PipelineError):
    """An artifact is missing, damaged, of another format or made from other inputs. The message names the stage."""


@dataclass(frozen=True)
class Header:
    """The origin of an artifact.

    Attributes:
        stage: the stage that wrote it.
        fingerprint: a hash of the values that determine its tensors; see `fingerprint`.
        inputs: name of each artifact it was made from -> that artifact's fingerprint.
        format_version: the version of the layout, raised whenever the layout changes.
        versions: name of each package that determines results -> its version. Information only: two headers that differ
            in nothing else are equal. Empty in artifacts of older versions of this project.
    """

    stage: str
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    versions: dict[str, str] = field(default_factory=dict, compare=False)


def make_header(stage: str, values: dict[str, Any], inputs: dict[str, "Header"] | None = None) -> Header:
    """Return the header of an artifact that is determined by `values` (params) and by the artifacts `inputs`."""
    fingerprints = {name: header.fingerprint for name, header in (inputs or {}).items()}
    content = {"stage": stage, "format": FORMAT_VERSION, "values": values, "inputs": fingerprints}
    return Header(stage, fingerprint(content), fingerprints, versions=list_versions())


def make_content_header(stage: str, tensors: dict[str, torch.Tensor]) -> Header:
    """Return the header of an artifact that is identified by its tensors alone, such as an imported model."""
    return Header(stage, fingerprint_tensors(tensors), versions=list_versions())


def list_versions() -> dict[str, str]:
    """Return the versions of the installed packages that determine results: {"torch": "2.13.0", …}."""
    return dict(_read_versions())


@functools.cache
def _read_versions() -> dict[str, str]:
    """Read the versions from the packages' metadata, which imports none of them."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        # Damaged metadata has no version, or cannot be read.
        with suppress(importlib.metadata.PackageNotFoundError, KeyError, OSError, ValueError):
            if version := importlib.metadata.version(package):
                versions[package] = version
    return versions


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def fingerprint_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Return the first 16 hex digits of a SHA-256 of CPU tensors: names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprint_file(path: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table for `dvc plots` as JSON, with 6 significant digits; make its folder.

    Every row gets every column. A value that is missing or not finite becomes null, and is not drawn.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    write_json(path, [{name: _round(row.get(name)) for name in columns} for row in rows])


def _round(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], header: Header) -> None:
    """Write tensors of any device with their header, replacing `path` in one step.

    They are stored contiguous, and begin at a multiple of `ALIGNMENT` bytes in the file.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = canonical_json(asdict(header))
    with replacing(Path(path)) as temporary:
        save_file(stored, temporary, metadata={METADATA_KEY: text})
        if excess := _find_data(temporary) % ALIGNMENT:
            save_file(stored, temporary, metadata={METADATA_KEY: text + " " * (ALIGNMENT - excess)})
        temporary.chmod(0o644)  # safetensors lets only the owner read its files


def _find_data(path: Path) -> int:
    """Return where the first tensor of a safetensors file begins: after the header, whose length is in 8 bytes."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def load_tensors(path: Path, stage: str) -> tuple[dict[str, torch.Tensor], Header]:
    """Return all tensors and the header of an artifact file that `stage` wrote. Raises as `open_tensors`."""
    with open_tensors(path, stage) as (file, header):
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a dict)


def load_json(path: Path, stage: str) -> Any:
    """Return the content of a JSON file that `stage` wrote.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing. {_remedy(stage)}")
    with reading(lambda reason: ArtifactError(f"{path} is damaged ({reason}). {_remedy(stage)}")):
        return json.loads(path.read_text(encoding="utf-8"))


def load_unfinished(path: Path, header: Header) -> dict[str, torch.Tensor] | None:
    """Return the tensors that an unfinished run with an equal header left in `path`, or None where there are none.

    A file that cannot be used is reported: it is damaged, or its run had other settings or inputs.
    """
    if not path.is_file():
        return None
    try:
        tensors, stored_header = load_tensors(path, header.stage)
    except ArtifactError as error:
        logger.warning("starting over: %s", error)
        return None
    if stored_header != header:
        logger.warning("starting over: the unfinished run in %s had other settings or inputs", path.parent)
        return None
    return tensors


def write_folder_header(folder: Path, header: Header) -> None:
    """Write a header into a folder, as `artifact.json`."""
    write_json(folder / FOLDER_HEADER, asdict(header))


def read_header(path: Path, stage: str) -> Header:
    """Return the header of an artifact file, or of a folder that holds `artifact.json`. Raises as `open_tensors`."""
    path = Path(path)
    if path.is_dir():
        return _read_folder_header(path, stage)
    with open_tensors(path, stage) as (_, header):
        return header


@contextmanager
def open_tensors(path: Path, stage: str) -> Iterator[tuple[Any, Header]]:
    """Open an artifact file to read it tensor by tensor. Yields (the safetensors handle, the header).

    Raises:
        ArtifactError: the file is missing, cut off or not safetensors, has no header of this project, was written by
            another stage, or has another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} is missing. {_remedy(stage)}")
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). {_remedy(stage)}") from None
    with file as handle:
        header = _check_header((handle.metadata() or {}).get(METADATA_KEY), path, stage)
        try:
            yield handle, header
        except SafetensorError as error:  # a tensor that is not there
            raise ArtifactError(f"{path} is incomplete ({error}). {_remedy(stage)}") from error


def check_input(header: Header, name: str, expected: Header, path: Path) -> None:
    """Check that the artifact with `header`, at `path`, was made from the artifact `expected`.

    Raises:
        ArtifactError: it was made from another one. The message names the stage to rerun.
    """
    if header.inputs.get(name) != expected.fingerprint:
        raise ArtifactError(
            f"{path} was made from another {name} than the one at hand "
            f"({header.inputs.get(name)} instead of {expected.fingerprint}). {_remedy(header.stage)}"
        )


def check_same_origin(first: Header, second: Header, name: str) -> None:
    """Check that two artifacts were made from the same artifact `name`, for example the model.

    Raises:
        ArtifactError: they were not. The message names both stages.
    """
    if first.inputs.get(name) != second.inputs.get(name):
        raise ArtifactError(
            f"the artifacts of {first.stage} and {second.stage} were made from different {name}s "
            f"({first.inputs.get(name)}, {second.inputs.get(name)}). Rerun both: "
            f"dvc repro --force --single-item {first.stage} {second.stage}"
        )


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. On success it takes the place of `folder`; on failure it is removed."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        move_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def move_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing a folder that exists there."""
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _remedy(stage: str) -> str:
    return f"Rerun the stage that makes it: dvc repro --force --single-item {stage}"


def _read_folder_header(folder: Path, stage: str) -> Header:
    path = folder / FOLDER_HEADER
    if not path.is_file():
        raise ArtifactError(f"{path} is missing. {_remedy(stage)}")
    return _check_header(path.read_text(encoding="utf-8", errors="replace"), path, stage)


def _check_header(text: str | None, path: Path, stage: str) -> Header:
    try:
        header = Header(**json.loads(text or ""))
    except (ValueError, TypeError):
        raise ArtifactError(f"{path} was not written by this project (no header). {_remedy(stage)}") from None
    if header.stage != stage:
        raise ArtifactError(f"{path} was written by the stage {header.stage}, not {stage}. {_remedy(stage)}")
    if header.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {header.format_version}, this code reads {FORMAT_VERSION}. {_remedy(stage)}"
        )
    return header

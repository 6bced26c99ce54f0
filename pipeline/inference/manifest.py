"""The manifest of an exported folder: every file with its size and SHA-256, and which of them must not change.

Weights, config and tokenizer must be as they were exported. The model card, the generation config, a chat template and
any other file belong to the user, who may change or delete them. A chat template may also be inside
tokenizer_config.json. So the manifest has a second hash of that file, without the template.

A folder that a user wrote with `save_pretrained` has a manifest too. It leaves the tokenizer out, because transformers
saves the tokenizer separately, before the model or after it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import PipelineError, reading
from pipeline.runtime.files import CHAT_TEMPLATES, write_json

METHOD = "prefixquant"
FORMAT_VERSION = 2
_READERS: dict[object, str] = {1: "before 0.2.0"}  # formats that are no longer read -> versions that read them
MANIFEST = "manifest.json"
GENERATION = "generation_config.json"
_FREE_NAMES = {GENERATION, ".gitattributes"}
_FREE_ENDINGS = {".md", ".jinja"}
_TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        _TOKENIZER_CONFIG,
    }
)
_READ = TOKENIZER_FILES | {"adapter_config.json"}  # transformers reads these wherever it finds them


class ExportError(PipelineError):
    """An exported folder is damaged, incomplete, foreign, or of a newer format, or is loaded with other sizes."""


def check_format(where: object, version: object) -> None:
    """Raise ExportError unless `version` is the layout that this project reads and writes."""
    if version != FORMAT_VERSION:
        remedy = f"Use a version {_READERS[version]}" if version in _READERS else "Update it"
        raise ExportError(
            f"{where}: format_version={version!r}: this version of the project reads {FORMAT_VERSION}. {remedy}, or "
            "export the model again."
        )


def write_manifest(folder: Path, left_out: frozenset[str] = frozenset()) -> None:
    """Write the manifest of all files in a folder and in its folder of chat templates. It is written last.

    Args:
        left_out: names of files that may be added or changed later.
    """
    present = [*folder.iterdir(), *(folder / CHAT_TEMPLATES).glob("*")]
    paths = [path for path in sorted(present) if path.is_file() and path.name not in left_out | {MANIFEST}]
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in paths}
    manifest = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "files": files}
    write_json(folder / MANIFEST, manifest | {"fingerprint": fingerprint_files(files)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the files that an exported folder lists, name -> size and hashes, without reading any of them.

    Raises:
        ExportError: there is no such folder, it is not an exported one, its manifest is damaged, or of another format.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder}: there is no such folder. Correct the path.")
    manifest = _read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("quant_method") != METHOD:
        raise ExportError(f"{folder / MANIFEST}: this project did not export the folder. Give one that it exported.")
    check_format(folder, manifest.get("format_version"))
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("fingerprint") != fingerprint_files(files):
        raise ExportError(f"{folder / MANIFEST} is damaged. Get an intact copy.")
    return files


def check_folder(folder: Path) -> None:
    """Raise ExportError unless all files of an exported folder that must not change are as they were exported."""
    files = read_manifest(folder)
    for name, entry in files.items():
        path = folder / name
        if name in _FREE_NAMES or path.suffix in _FREE_ENDINGS:
            continue
        if not path.is_file():
            raise ExportError(f"{path} is missing. Get a complete copy.")
        if not _is_intact(path, entry):
            saved = " If you saved a tokenizer here, save the model here too." if name in TOKENIZER_FILES else ""
            raise ExportError(f"{path} is damaged or was changed. Get an intact copy.{saved}")
    free_tokenizer = frozenset() if "tokenizer.json" in files else TOKENIZER_FILES  # saved by a user
    present = {path.name for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in _READ}
    if extra := present - set(files) - free_tokenizer:
        raise ExportError(f"{folder}: files that do not belong there: {', '.join(sorted(extra))}. Remove them.")


def fingerprint_files(files: dict[str, Any]) -> str:
    """Return the SHA-256 of the manifest's list of files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    described = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    if path.name == _TOKENIZER_CONFIG:
        described["sha256_without_template"] = _hash_without_template(path)
    return described


def _is_intact(path: Path, entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    if path.stat().st_size == entry.get("bytes") and hash_file(path) == entry.get("sha256"):
        return True
    known = entry.get("sha256_without_template")
    return known is not None and known == _hash_without_template(path)


def _hash_without_template(path: Path) -> str:
    values = _read_json(path)
    if isinstance(values, dict):
        values.pop("chat_template", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ExportError(f"{path} is missing. Give a folder that this project exported.")
    with reading(lambda why: ExportError(f"{path} is damaged ({why}). Get an intact copy.")):
        return json.loads(path.read_text(encoding="utf-8"))

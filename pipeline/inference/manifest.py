"""The manifest of an exported folder: every file with its size and SHA-256, and which of them must be as written.

Weights, config and tokenizer must be as they were written. The model card, the generation config, a chat template and
whatever else lies there may change, or be gone: they are the user's. A chat template may also stand inside of
tokenizer_config.json, of which the manifest therefore knows a second hash, without it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import PipelineError, reading
from pipeline.runtime.files import write_json

METHOD = "prefixquant"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
GENERATION = "generation_config.json"
_FREE_NAMES = {GENERATION, ".gitattributes"}
_FREE_ENDINGS = {".md", ".jinja"}
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER = {"tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"}
_TOKENIZER |= {_TOKENIZER_CONFIG, "tokenizer.model"}
_READ = _TOKENIZER | {"adapter_config.json"}  # by transformers, wherever it finds them


class ExportError(PipelineError):
    """An exported folder is damaged, incomplete, foreign, or of a newer format."""


def check_format(where: object, version: object) -> None:
    """Raises ExportError unless `version` is the layout this project reads and writes."""
    if version != FORMAT_VERSION:
        raise ExportError(
            f"{where}: format_version={version!r}; this version of the project reads {FORMAT_VERSION}: update it, or "
            "export the model again"
        )


def write_manifest(folder: Path) -> None:
    """Of all files that are there, the last one to be written."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir()) if path.is_file()}
    files.pop(MANIFEST, None)
    manifest = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "files": files}
    write_json(folder / MANIFEST, manifest | {"fingerprint": fingerprint_files(files)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the files that an exported folder lists, name -> size and hashes, without reading any of them.

    Raises:
        ExportError: there is no such folder, it is not an exported one, its manifest is damaged, or of another format.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder}: there is no such folder")
    manifest = _read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("quant_method") != METHOD:
        raise ExportError(f"{folder / MANIFEST}: not of a folder that this project exported")
    check_format(folder, manifest.get("format_version"))
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("fingerprint") != fingerprint_files(files):
        raise ExportError(f"{folder / MANIFEST} is damaged; get an intact copy")
    return files


def check_folder(folder: Path) -> None:
    """Raises ExportError unless every file of an exported folder that counts is there and as it was written."""
    files = read_manifest(folder)
    for name, entry in files.items():
        path = folder / name
        if name in _FREE_NAMES or path.suffix in _FREE_ENDINGS:
            continue
        if not path.is_file():
            raise ExportError(f"{path} is missing; get a complete copy")
        if not _is_intact(path, entry):
            raise ExportError(f"{path} is damaged or was changed; get an intact copy")
    own_tokenizer = (
        set() if "tokenizer.json" in files else _TOKENIZER
    )  # one that was saved behind the model is its user's
    extra = {path.name for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in _READ} - set(files)
    extra -= own_tokenizer
    if extra:
        raise ExportError(f"{folder}: files that do not belong there: {', '.join(sorted(extra))}; remove them")


def fingerprint_files(files: dict[str, Any]) -> str:
    """SHA-256 of the manifest's list of files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
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
        raise ExportError(f"{path} is missing; is it a folder that this project exported?")
    with reading(lambda why: ExportError(f"{path} is damaged ({why}); get an intact copy")):
        return json.loads(path.read_text(encoding="utf-8"))

"""Load an exported folder in one call.

    model, tokenizer = load(Path("artifacts/export"))
    model.generate(**tokenizer(["Once upon"], return_tensors="pt"))

The folder is checked whole before anything is built: its manifest lists every file with size and SHA-256. What is then
loaded is what `AutoModelForCausalLM.from_pretrained` gives after `import pipeline.hf`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.export.packed_block import multiply_integers_
from pipeline.export.transformers_quantizer import METHOD, ExportError, check_format
from pipeline.models.architectures import find_architecture

MANIFEST = "manifest.json"
Arithmetic = Literal["float", "integer"]


def load(
    folder: Path, device: torch.device | str | None = None, arithmetic: Arithmetic = "float", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An exported model and its tokenizer.

    Args:
        device: where to put the model; None: the CPU, or what `device_map` in `options` says.
        arithmetic: float computes what the pipeline evaluated; integer multiplies int8 by int8, see `packed_block.py`
            (CPU).
        options: passed to `from_pretrained` (device_map, dtype, …).

    Raises:
        ExportError: the folder is not an exported one, is damaged or incomplete, or of a newer format.
    """
    folder = Path(folder)
    check_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if device is not None:
        model.to(device)
    if arithmetic == "integer":
        use_integers_(model)
    return model, AutoTokenizer.from_pretrained(folder)


def use_integers_(model: PreTrainedModel) -> None:
    """Have a loaded model multiply integers wherever its settings allow it."""
    architecture = find_architecture(model.config)
    # What was loaded are views of the mapped file, which stays resident until the last one is gone.
    for block in model.model.layers:
        _copy_tensors_(block)
    _copy_tensors_(model.model.norm)
    if model.prefix_kv is not None:
        model.prefix_kv = model.prefix_kv.clone()
    for block in model.model.layers:
        multiply_integers_(block, architecture)


def _copy_tensors_(module: nn.Module) -> None:
    for own in module.modules():
        for name, buffer in own.named_buffers(recurse=False):
            setattr(own, name, buffer.clone())
        for name, parameter in own.named_parameters(recurse=False):
            setattr(own, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def check_folder(folder: Path) -> None:
    """Raises ExportError unless every file of an exported folder is there and as it was written."""
    if not folder.is_dir():
        raise ExportError(f"{folder}: there is no such folder")
    manifest = _read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("quant_method") != METHOD:
        raise ExportError(f"{folder / MANIFEST}: not of a folder that this project exported")
    check_format(folder, manifest.get("format_version"))
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("fingerprint") != fingerprint_files(files):
        raise ExportError(f"{folder / MANIFEST} is damaged; get an intact copy")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ExportError(f"{path} is missing; get a complete copy")
        if path.stat().st_size != entry["bytes"] or hash_file(path) != entry["sha256"]:
            raise ExportError(f"{path} is damaged or was changed; get an intact copy")
    extra = {path.name for path in folder.glob("*.safetensors")} - set(files)
    if extra:
        raise ExportError(f"{folder}: files that do not belong there: {', '.join(sorted(extra))}; remove them")


def fingerprint_files(files: dict[str, Any]) -> str:
    """SHA-256 of the manifest's list of files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ExportError(f"{path} is missing; is it a folder that this project exported?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is damaged ({error}); get an intact copy") from None

"""What a model is imported from, whatever its form: its config, its tensors one by one, transformers' own reading."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.runtime.errors import PipelineError, reading

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class ModelImportError(PipelineError):
    """The model cannot be imported; one line saying what was asked for and what to do."""


@dataclass
class Source:
    """An opened source: its config, names and shapes are known, tensors are read on demand.

    Attributes:
        config: of the family it is stored as.
        names, read: of its tensors, as that family names them; each is read anew, on the CPU.
        companions: a folder with its tokenizer and generation config.
        load_whole: `dtype` -> the whole model, loaded by transformers itself; None where it always takes too much.
        load_block: `(index, token_ids [K], dtype)` -> transformers' own model of block `index` alone, whose embedding
            and lm_head hold the rows of these tokens alone.
    """

    config: Any
    names: set[str]
    read: Callable[[str], torch.Tensor]
    companions: Path
    load_whole: Callable[[torch.dtype], nn.Module] | None
    load_block: Callable[[int, torch.Tensor, torch.dtype], nn.Module]


def check_file(source: str, path: Path) -> None:
    """Raises ModelImportError where `path` is what Git LFS leaves in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelImportError(
                f"model.source={source!r}: {path.name} is a Git LFS pointer, not the file itself; run: git lfs pull"
            )


def read_json_object(source: str, path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelImportError where it is cut off, or something else."""
    check_file(source, path)
    damaged = f"model.source={source!r}: {path.name} is damaged"
    with reading(lambda why: ModelImportError(f"{damaged} ({why}); get it again")):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ModelImportError(f"model.source={source!r}: {path.name} is not a JSON object; get it again")
    return value


_LARGEST = {"num_hidden_layers": 10_000, "vocab_size": 10**8}
_LARGEST |= dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 10**7)


def check_sizes(source: str, values: dict[str, Any]) -> None:
    """Raises ModelImportError where a size in config.json is none: transformers would build a model of it for ever."""
    for key, largest in _LARGEST.items():
        value = values.get(key, 1)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest):
            raise ModelImportError(f"model.source={source!r}: {key}={str(value)[:40]} in its config is no size")


def make_block_config(config: Any, index: int, vocabulary: int) -> Any:
    """The config of a model of block `index` alone with a `vocabulary` of so many tokens."""
    values = config.to_dict() | {"num_hidden_layers": 1, "vocab_size": vocabulary}
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][index]]
    # Ids of special tokens may lie beyond the vocabulary that is left.
    return type(config).from_dict(values | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None})


@contextmanager
def loading(source: str, form: str) -> Iterator[None]:
    """Around what transformers does: its errors become one line, and it shows no bars, block after block.

    Args:
        form: what it is given, "this GGUF file", for the message.
    """
    refused = f"model.source={source!r}: transformers cannot read {form}"
    with reading(lambda why: ModelImportError(f"{refused} ({why})")), contextlib.redirect_stderr(io.StringIO()):
        yield


def check_complete(source: str, model: nn.Module, report: dict[str, Any]) -> nn.Module:
    """What `from_pretrained(…, output_loading_info=True)` gave. Raises ModelImportError if it filled anything in."""
    filled = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if filled:
        raise ModelImportError(f"model.source={source!r}: transformers finds no values for {', '.join(filled[:3])}")
    return model.eval().requires_grad_(False)

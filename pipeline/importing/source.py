"""The source of a model, in whatever form: its config, its tensors one by one, and transformers' own reading of it."""

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.models.architectures import UnsupportedModelError
from pipeline.models.checkpoint import build_skeleton
from pipeline.models.layers import CausalModel, as_causal_model
from pipeline.runtime.errors import PipelineError, reading

Read = Callable[[str], torch.Tensor]
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST = {"num_hidden_layers": 10_000, "vocab_size": 10**8}
_LARGEST |= dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 10**7)
_TOKEN_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


class ModelImportError(PipelineError):
    """A model cannot be imported. The message names `model.source` and says what to do."""


@dataclass
class Dropped:
    """Tensors of a source that the imported model has no place for.

    Attributes:
        tensors: how many.
        bytes: as stored.
    """

    tensors: int = 0
    bytes: int = 0

    def add_(self, size: int) -> None:
        """Count one more tensor of `size` bytes."""
        self.tensors += 1
        self.bytes += size


@dataclass
class Source:
    """An opened source. Its config, names and shapes are known; tensors are read on demand.

    Attributes:
        config: the config of the family that the source stores.
        names: the names of its tensors, as that family has them.
        read: name -> the tensor, on the CPU; each call reads it again.
        companions: a folder with its tokenizer and generation config.
        load_whole: `dtype` -> the whole model, loaded by transformers itself; None where that takes too much memory.
        load_block: `(index, token_ids [K], dtype)` -> a model of block `index` alone, loaded by transformers itself.
            Its embedding and lm_head have only the rows of these tokens.
        wrapper: the model_type of the multimodal model that the source wraps around its text model, or None.
        dropped: parts that the imported model lacks -> their tensors. `names` does not have them.
        count_bytes: name -> bytes of the tensor as stored.
        quantization: the format of its quantized weights, which `read` dequantizes to float32, or None.
        quantized: the names of these weights.
    """

    config: PreTrainedConfig
    names: set[str]
    read: Read
    companions: Path
    load_whole: Callable[[torch.dtype], CausalModel] | None
    load_block: Callable[[int, torch.Tensor, torch.dtype], CausalModel]
    wrapper: str | None = None
    dropped: dict[str, Dropped] = field(default_factory=dict)
    count_bytes: Callable[[str], int] = lambda name: 0
    quantization: str | None = None
    quantized: set[str] = field(default_factory=set)


def check_file(source: str, path: Path) -> None:
    """Raise ModelImportError if `path` is a Git LFS pointer: the placeholder of a large file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelImportError(
                f"model.source={source!r}: {path.name} is a Git LFS pointer, not the file itself. Run: git lfs pull"
            )


def read_json_object(source: str, path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ModelImportError: the file is damaged, has a key twice, or holds another JSON value.
    """
    check_file(source, path)
    damaged = f"model.source={source!r}: {path.name} is damaged"
    repeated: list[str] = []

    def list_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(name for name in set(names) if names.count(name) > 1)
        return dict(pairs)

    with reading(lambda reason: ModelImportError(f"{damaged} ({reason}). Get it again.")):
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list_repeated)
    if repeated:
        raise ModelImportError(
            f"model.source={source!r}: {path.name} has {repeated[0]!r} twice in one object. Remove one of them."
        )
    if not isinstance(value, dict):
        raise ModelImportError(f"model.source={source!r}: {path.name} is not a JSON object. Get it again.")
    return value


def check_sizes(source: str, values: dict[str, Any]) -> None:
    """Raise ModelImportError for a size in config.json from which transformers would try to build a model for ever."""
    for key, largest in _LARGEST.items():
        value = values.get(key, 1)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest):
            raise ModelImportError(
                f"model.source={source!r}: {key}={str(value)[:40]} in its config is not a size. Expected is an integer "
                f"from 1 to {largest}"
            )


def check_causal(source: str, values: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for a config whose attention reads later positions, as in encoders."""
    wrong = [key for key in ("use_bidirectional_attention", "bidirectional") if values.get(key)]
    if not values.get("is_causal", True):
        wrong.append("is_causal")
    if wrong:
        setting = f"{wrong[0]}={values[wrong[0]]!r}"
        raise UnsupportedModelError(
            f"model.source={source!r}: {setting} in its config: attention reads later positions, as in encoders and "
            "embedding models. Only causal language models are supported. Use the model that this one was made from."
        )


def check_special_ids(source: str, name: str, values: dict[str, Any], rows: int) -> None:
    """Raise ModelImportError for special tokens without a row in the embedding.

    Args:
        name: name of the file that says them.
        values: its content. An id may be a list of ids.
        rows: number of rows of the embedding.
    """
    for key in _TOKEN_IDS:
        ids = values.get(key)
        if any(isinstance(index, int) and index >= rows for index in (ids if isinstance(ids, list) else [ids])):
            raise ModelImportError(
                f"model.source={source!r}: {key}={ids} is beyond vocab_size={rows}. Correct it in {name}"
            )


def make_block_config(config: PreTrainedConfig, index: int, vocab_size: int) -> PreTrainedConfig:
    """Return the config of a model of block `index` alone, with `vocab_size` tokens."""
    values: dict[str, Any] = config.to_dict() | {"num_hidden_layers": 1, "vocab_size": vocab_size}
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][index]]
    if "mlp_only_layers" in values:  # blocks with and without experts
        step = values.get("decoder_sparse_step") or 1
        is_sparse = index not in (values["mlp_only_layers"] or []) and (index + 1) % step == 0
        values |= {"mlp_only_layers": [] if is_sparse else [0], "decoder_sparse_step": 1}
    # Ids of special tokens may lie beyond the smaller vocabulary.
    return type(config).from_dict(values | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None})


def make_block_class(config: PreTrainedConfig, index: int, vocab_size: int) -> tuple[Any, Any]:
    """Return the class of a model whose only decoder layer is layer `index` of the whole model, and its config.

    The layer has all settings that depend on its place (kind of attention, RoPE or none). It is called layer 0 in the
    model's state dict. The embedding has `vocab_size` rows.
    """
    small = copy.deepcopy(config)
    small.vocab_size, small.pad_token_id = vocab_size, None  # whose row may be left out
    model_class: Any = type(build_skeleton(small))

    def build(self: Any, block_config: Any) -> None:
        model_class.__init__(self, block_config)
        self.model.layers = nn.ModuleList([self.model.layers[index]])

    return type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__}), small


@contextmanager
def loading(source: str, form: str) -> Iterator[None]:
    """Turn errors of transformers into one line, and keep its progress bars (one for each block) off the screen.

    Args:
        form: the thing it loads ("this GGUF file"), for the message.
    """
    refused = f"model.source={source!r}: transformers cannot read {form}"
    with (
        reading(lambda reason: ModelImportError(f"{refused} ({reason}).")),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def check_complete(source: str, model: nn.Module, report: dict[str, Any]) -> CausalModel:
    """Return the model of `from_pretrained(…, output_loading_info=True)` in eval mode, without gradients.

    Raises:
        ModelImportError: transformers had to fill in tensors that the source lacks.
    """
    filled = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if filled:
        raise ModelImportError(f"model.source={source!r}: transformers finds no values for {', '.join(filled[:3])}")
    return as_causal_model(model.eval().requires_grad_(False))

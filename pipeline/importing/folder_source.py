"""A checkpoint folder as a source: config.json, the safetensors that transformers would read, and its own loading.

The source of a multimodal checkpoint is its text model (see `wrappers.py`). Weights in fp8 and mxfp4 are read as
float32 (see `stored_formats.py`). For both, transformers gets the tensors by their final names and values.
"""

import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pipeline.importing.expert_tensors import name_in_checkpoint, turn_experts
from pipeline.importing.obstacles import explain_obstacles
from pipeline.importing.source import (
    Dropped,
    ModelImportError,
    Read,
    Source,
    check_causal,
    check_complete,
    check_file,
    check_sizes,
    loading,
    make_block_class,
    read_json_object,
)
from pipeline.importing.stored_formats import Dequantized, find_quantization, open_stored, read_stored_format
from pipeline.importing.wrappers import (
    WRAPPERS,
    TextModel,
    check_text_family,
    check_text_forward,
    read_text_config,
    rename_tensors,
)
from pipeline.models.architectures import UnsupportedModelError, find_architecture, find_family
from pipeline.models.checkpoint import CONFIG, CONFIG_KEY, INDEX
from pipeline.models.experts import EAGER
from pipeline.models.layers import CausalModel
from pipeline.models.routing import is_correction_bias

_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"


def open_folder(source: str, folder: Path, stack: ExitStack, headers: dict[str, Any] | None = None) -> Source:
    """Return a folder as a source, whose shards stay open as long as `stack`.

    Args:
        source: as in params.yaml, for messages.
        folder: with config.json.
        stack: closes the shards.
        headers: name of a tensor -> an object like an open safetensors file, which may have `get_slice` alone. Then the
            folder needs no weights, and reading a tensor fails.

    Raises:
        ModelImportError: a file is missing, damaged or a pointer, the weights are a LoRA adapter, or quantized in a
            format that is not read.
        UnsupportedModelError: the model family, or a setting of the config, is not supported.
    """
    raw = read_raw_config(source, folder)
    quantization = find_quantization(raw)
    stored = None if quantization is None else read_stored_format(source, quantization)
    text = read_text_config(source, raw) if raw["model_type"] in WRAPPERS else None
    config = _read_config(source, folder) if text is None else text.config
    shards: dict[str, Any] = dict(headers or {})
    for path in _list_shards(source, folder) if headers is None else ():
        check_file(source, path)
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelImportError(
                f"model.source={source!r}: {path.name} is damaged ({error}). Get it again."
            ) from None
        shards |= dict.fromkeys(file.keys(), file)

    places = {name: name for name in shards}  # in the model class -> in the checkpoint
    dropped: dict[str, Dropped] = {}
    if text is not None:
        places, dropped = _find_text(source, text, shards)

    def read(name: str) -> torch.Tensor:
        tensor = shards[places[name]].get_tensor(places[name])
        return tensor if text is None else turn_experts(name, tensor, config.hidden_size)

    def find_dtype(name: str) -> str:
        return str(shards[places[name]].get_slice(places[name]).get_dtype())

    weights = Dequantized(set(places), read, set())
    if stored is not None:
        weights = open_stored(source, stored, set(places), read, find_dtype)
        for name, part in weights.dropped.items():
            dropped.setdefault(part, Dropped()).add_(_count_bytes(shards[places[name]], places[name]))

    def read_rows(name: str, rows: torch.Tensor) -> torch.Tensor:
        if name in weights.quantized:
            return weights.read(name)[rows]
        table = shards[places[name]].get_slice(places[name])
        return torch.cat([table[row : row + 1] for row in rows.tolist()])

    def load_whole(dtype: torch.dtype) -> CausalModel:
        kernel = find_architecture(config).kernel
        options = {"dtype": dtype, "attn_implementation": kernel, "output_loading_info": True}
        if find_architecture(config).experts is not None:
            options["experts_implementation"] = EAGER  # the only one that computes in float64
        with loading(source, "this folder"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
            model = check_complete(source, *loaded)
        _restore_biases_(model, config, weights.names, weights.read, 0)
        return model

    def load_block(index: int, token_ids: torch.Tensor, dtype: torch.dtype) -> CausalModel:
        return _load_block(
            source,
            config,
            names=weights.names,
            read=weights.read,
            read_rows=read_rows,
            index=index,
            token_ids=token_ids,
            dtype=dtype,
        )

    return Source(
        config,
        weights.names,
        weights.read,
        folder,
        load_whole if text is None and stored is None else None,
        load_block,
        wrapper=None if text is None else raw["model_type"],
        dropped=dropped,
        count_bytes=lambda name: _count_bytes(shards[places[name]], places[name]) if name in places else 0,
        quantization=weights.title,
        quantized=weights.quantized,
    )


def _find_text(source: str, text: TextModel, shards: dict[str, Any]) -> tuple[dict[str, str], dict[str, Dropped]]:
    """Return the names of the text model's tensors, in its class -> in the checkpoint, and the parts that are dropped.

    Settles a tie that only the text model's level states. transformers would fill lm_head with random numbers.
    """
    check_text_forward(source, text)
    places, parts = rename_tensors(source, text.wrapper, shards)
    if find_architecture(text.config).lm_head not in places:
        stated = getattr(text.wrapper_config.get_text_config(), "tie_word_embeddings", False)
        text.config.tie_word_embeddings |= bool(stated)
    dropped: dict[str, Dropped] = {}
    for name, part in parts.items():
        dropped.setdefault(part, Dropped()).add_(_count_bytes(shards[name], name))
    return places, dropped


def _count_bytes(file: Any, name: str) -> int:
    """Return the bytes of a tensor in a safetensors file, of its header alone. Types are called BF16, F8_E4M3, BOOL."""
    part = file.get_slice(name)
    digits = re.search(r"\d+", part.get_dtype())
    return math.prod(part.get_shape()) * (int(digits.group()) if digits else 8) // 8


def _list_shards(source: str, folder: Path) -> list[Path]:
    """Return the files that transformers would read: model.safetensors if it exists, else the shards of the index."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if others:
            reason = f"only {', '.join(others)}, which transformers would not read. Rename it, or get the index"
        elif pickles:
            reason = f"only {', '.join(pickles)}, and pickles are never read. Convert them to safetensors"
        else:
            reason = "the folder has none. Get the weights as well"
        raise ModelImportError(f"model.source={source!r}: needs {_SINGLE} or {INDEX}: {reason}")
    index = read_json_object(source, folder / INDEX)
    if not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
        raise ModelImportError(f"model.source={source!r}: {INDEX} has no weight_map. Get it again.")
    names = sorted({str(name) for name in index["weight_map"].values()})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelImportError(
            f"model.source={source!r}: {INDEX} names files that are missing: {', '.join(missing)}. Get them as well."
        )
    return [folder / name for name in names]


def read_raw_config(source: str, folder: Path) -> dict[str, Any]:
    """Return the content of config.json, after the checks that need nothing else.

    Raises:
        ModelImportError: there is none, it is damaged, or the folder holds an adapter or an export of this project.
        UnsupportedModelError: the model family, or a setting of the config, is not supported.
    """
    if (folder / _ADAPTER).is_file():  # transformers would load its base model, or both
        raise ModelImportError(
            f"model.source={source!r}: holds an adapter ({_ADAPTER}). Merge it into its base model with peft "
            "(merge_and_unload), save that, and import it."
        )
    if not (folder / CONFIG).is_file():
        raise ModelImportError(f"model.source={source!r}: no {CONFIG} in that folder. Name the folder of a checkpoint.")
    raw = read_json_object(source, folder / CONFIG)
    # Before transformers parses the config: it cannot explain an unknown model_type.
    try:
        if str(raw.get("model_type")) in WRAPPERS:
            check_text_family(source, raw)
        else:
            find_family(str(raw.get("model_type")))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}. {explain_obstacles(raw)}") from None
    if CONFIG_KEY in raw:
        raise ModelImportError(f"model.source={source!r}: written by this project's pipeline. Start from the original.")
    for level in (raw, raw.get("text_config")):
        if isinstance(level, dict):
            check_sizes(source, level)
            check_causal(source, level)
    return raw


def _read_config(source: str, folder: Path) -> Any:
    with loading(source, f"its {CONFIG}"):
        config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):  # transformers would quantize the models that are built from it
        delattr(config, "quantization_config")
    return config


def _load_block(
    source: str,
    config: PreTrainedConfig,
    *,
    names: set[str],
    read: Read,
    read_rows: Callable[[str, torch.Tensor], torch.Tensor],
    index: int,
    token_ids: torch.Tensor,
    dtype: torch.dtype,
) -> CausalModel:
    """Return a model of one block that transformers fills with the tensors of block `index`."""
    architecture = find_architecture(config)
    prefix, first = architecture.tensor_prefix(index), architecture.tensor_prefix(0)
    tensors = {first + name.removeprefix(prefix): read(name) for name in names if name.startswith(prefix)}
    tables = names & {architecture.embedding, architecture.lm_head}
    tensors |= {name: read_rows(name, token_ids) for name in tables}
    tensors[architecture.final_norm] = read(architecture.final_norm)
    model_class, small = make_block_class(config, index, len(token_ids))
    small._attn_implementation = architecture.kernel
    small._experts_implementation = EAGER
    options = {"dtype": dtype, "state_dict": tensors, "output_loading_info": True}
    with loading(source, "this folder"):
        model = check_complete(source, *model_class.from_pretrained(None, config=small, **options))
    _restore_biases_(model, config, names, read, index)
    return model


def _restore_biases_(model: CausalModel, config: PreTrainedConfig, names: set[str], read: Read, first: int) -> None:
    """Give routers their correction biases in float32 again.

    In some families transformers has rounded them to the model's dtype.

    Args:
        first: number in the checkpoint of the model's first block.
    """
    architecture = find_architecture(config)
    for index in range(model.config.num_hidden_layers):
        prefix = architecture.tensor_prefix(index)
        for name, bias in model.named_buffers():
            if name.startswith(prefix) and is_correction_bias(name):
                stored = architecture.tensor_prefix(first + index) + name.removeprefix(prefix)
                stored = stored if stored in names else name_in_checkpoint(config.model_type, stored)
                bias.data = read(stored).to(bias.device, torch.float32)

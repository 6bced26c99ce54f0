"""A checkpoint folder as a source: config.json, the safetensors that transformers would read, and its own loading."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.importing.source import (
    ModelImportError,
    Read,
    Source,
    check_causal,
    check_complete,
    check_file,
    check_sizes,
    loading,
    make_block_config,
    read_json_object,
)
from pipeline.models.architectures import find_architecture
from pipeline.models.checkpoint import CONFIG, CONFIG_KEY, INDEX, build_skeleton

_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"


def open_folder(source: str, folder: Path, stack: ExitStack) -> Source:
    """Return a folder as a source, whose shards stay open as long as `stack`.

    Raises:
        ModelImportError: a file is missing, damaged or a pointer, or the weights are quantized or a LoRA adapter.
        UnsupportedModelError: the model family, or a setting of the config, is not supported.
    """
    config = _read_config(source, folder)
    shards: dict[str, Any] = {}
    for path in _list_shards(source, folder):
        check_file(source, path)
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelImportError(f"model.source={source!r}: {path.name} is damaged ({error}). Get it again") from None
        shards |= dict.fromkeys(file.keys(), file)

    def read(name: str) -> torch.Tensor:
        return shards[name].get_tensor(name)

    def read_rows(name: str, rows: torch.Tensor) -> torch.Tensor:
        table = shards[name].get_slice(name)
        return torch.cat([table[row : row + 1] for row in rows.tolist()])

    def load_whole(dtype: torch.dtype) -> nn.Module:
        kernel = find_architecture(config).kernel
        options = {"dtype": dtype, "attn_implementation": kernel, "output_loading_info": True}
        with loading(source, "this folder"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
            return check_complete(source, *loaded)

    def load_block(index: int, token_ids: torch.Tensor, dtype: torch.dtype) -> nn.Module:
        return _load_block(
            source,
            config,
            names=set(shards),
            read=read,
            read_rows=read_rows,
            index=index,
            token_ids=token_ids,
            dtype=dtype,
        )

    return Source(config, set(shards), read, folder, load_whole, load_block)


def _list_shards(source: str, folder: Path) -> list[Path]:
    """Return the files that transformers would read: model.safetensors where it exists, else those of the index."""
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
        raise ModelImportError(f"model.source={source!r}: {INDEX} has no weight_map. Get it again")
    names = sorted({str(name) for name in index["weight_map"].values()})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelImportError(
            f"model.source={source!r}: {INDEX} names files that are missing: {', '.join(missing)}. Get them as well"
        )
    return [folder / name for name in names]


def _read_config(source: str, folder: Path) -> Any:
    if (folder / _ADAPTER).is_file():  # transformers would load its base model, or both
        raise ModelImportError(
            f"model.source={source!r}: holds an adapter ({_ADAPTER}). Merge it into its base model with peft "
            "(merge_and_unload), save that, and import it"
        )
    if not (folder / CONFIG).is_file():
        raise ModelImportError(f"model.source={source!r}: no {CONFIG} in that folder. Name the folder of a checkpoint")
    raw = read_json_object(source, folder / CONFIG)
    # Before transformers parses the config: it cannot explain an unknown model_type.
    find_architecture(SimpleNamespace(model_type=str(raw.get("model_type"))))
    if raw.get("quantization_config") is not None:
        quantization = raw["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelImportError(
            f"model.source={source!r}: already quantized (quant_method={method!r}). Start from the original model"
        )
    if CONFIG_KEY in raw:
        raise ModelImportError(f"model.source={source!r}: written by this project's pipeline. Start from the original")
    check_sizes(source, raw)
    check_causal(source, raw)
    with loading(source, f"its {CONFIG}"):
        return AutoConfig.from_pretrained(folder)


def _load_block(
    source: str,
    config: Any,
    *,
    names: set[str],
    read: Read,
    read_rows: Callable[[str, torch.Tensor], torch.Tensor],
    index: int,
    token_ids: torch.Tensor,
    dtype: torch.dtype,
) -> nn.Module:
    """Return a model of one block that transformers fills with the tensors of block `index`."""
    architecture = find_architecture(config)
    prefix, first = architecture.tensor_prefix(index), architecture.tensor_prefix(0)
    tensors = {first + name.removeprefix(prefix): read(name) for name in names if name.startswith(prefix)}
    tables = names & {architecture.embedding, architecture.lm_head}
    tensors |= {name: read_rows(name, token_ids) for name in tables}
    tensors[architecture.final_norm] = read(architecture.final_norm)
    small = make_block_config(config, index, len(token_ids))
    small._attn_implementation = architecture.kernel
    options = {"dtype": dtype, "state_dict": tensors, "output_loading_info": True}
    model_class: Any = type(build_skeleton(small))
    with loading(source, "this folder"):
        return check_complete(source, *model_class.from_pretrained(None, config=small, **options))

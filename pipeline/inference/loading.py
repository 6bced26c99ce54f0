"""Load an exported folder in one call.

    model, tokenizer = load(Path("artifacts/export"))
    model.generate(**tokenizer(["Once upon"], return_tensors="pt"))

The whole folder is checked before anything is built: its manifest lists every file with size and SHA-256. Then
`AutoModelForCausalLM.from_pretrained` loads it, as it does after `import pipeline.hf`.
"""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

import pipeline.inference.transformers_quantizer  # noqa: F401  (transformers then knows the method)
from pipeline.inference.manifest import GENERATION, ExportError, check_folder
from pipeline.inference.packed_block import multiply_integers_
from pipeline.inference.prefixed_model import PrefixedModel
from pipeline.models.architectures import find_architecture
from pipeline.models.layers import Movable, list_layers
from pipeline.models.lm_head import QuantizedHead
from pipeline.runtime.errors import reading
from pipeline.runtime.progress import hide_bars

__all__ = ["Arithmetic", "ExportError", "check_folder", "check_generation_config", "load", "use_integers_"]

Arithmetic = Literal["float", "integer"]


def load(
    folder: Path,
    device: torch.device | str | None = None,
    arithmetic: Arithmetic = "float",
    *,
    unpacked: bool | None = None,
    packed_cache: bool = False,
    **options: Any,
) -> tuple[PrefixedModel, PreTrainedTokenizerBase]:
    """Load an exported model and its tokenizer.

    Args:
        device: device of the model; None for the CPU, or for the devices of `device_map` in `options`.
        arithmetic: `float` computes the numbers that the pipeline evaluated. `integer` multiplies integers, on CPUs
            only, see `packed_block.py`.
        unpacked: True: the weights are kept unpacked between calls | False: they are unpacked in every call, which
            takes the least memory | None: kept where they take at most half of the free memory. For `float` only.
        packed_cache: True: caches store keys and values with static ranges as codes (blocks/packed_layers.py), which
            takes less memory and more time | False: they store states. The numbers are the same.
        options: passed to `from_pretrained` (device_map, dtype, …).

    Raises:
        ExportError: the folder is not an exported one, is damaged or incomplete, or of a newer format, or `options`
            ask for other sizes.
    """
    folder = Path(folder)
    check_folder(folder)
    check_generation_config(folder)
    hide_bars()
    with reading(lambda why: ExportError(f"{folder} cannot be loaded ({why}).")):
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(model, PrefixedModel):
        raise ExportError(f"{folder} was loaded as a {type(model).__name__}, without its prefix. Get an intact copy.")
    if device is not None:
        cast(Movable, model).to(device)
    model.keep_unpacked_(unpacked)
    model.packs_cache = packed_cache
    if arithmetic == "integer":
        use_integers_(model)
    return model, tokenizer


def check_generation_config(folder: Path) -> None:
    """Raise ExportError where generation_config.json is damaged: transformers would ignore it without an error."""
    if (folder / GENERATION).is_file():
        with reading(lambda why: ExportError(f"{folder / GENERATION} cannot be read ({why}). Correct or remove it.")):
            GenerationConfig.from_pretrained(folder)


def use_integers_(model: PrefixedModel) -> None:
    """Have a loaded model multiply integers wherever its settings allow it."""
    architecture = find_architecture(model.config)
    # Loaded tensors are views of the mapped file, which stays in memory until the last of them is gone.
    for block in list_layers(model):
        _copy_tensors_(block)
    _copy_tensors_(model.base_model.get_submodule("norm"))
    if model.prefix_kv is not None:
        model.prefix_kv = model.prefix_kv.clone()
    for block in list_layers(model):
        multiply_integers_(block, architecture)
    head: nn.Module = model.lm_head
    if isinstance(head, QuantizedHead):
        _copy_tensors_(head)
        head.multiply_integers_()


def _copy_tensors_(module: nn.Module) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.clone())
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))

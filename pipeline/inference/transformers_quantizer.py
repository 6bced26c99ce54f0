"""Makes transformers load exported folders: `import pipeline.hf`, then `AutoModelForCausalLM.from_pretrained(folder)`.

config.json of an exported folder has a `quantization_config` with `quant_method: prefixquant`; this module registers
what transformers then asks for, through its public registry. The model's own class is built, its linears are replaced
by packed ones, quantizers and prefix are put in, and the tensors are loaded by transformers.

Without this module transformers would skip a `quant_method` that it does not know, and fill the linears with random
numbers. So config.json also says what is missing (`GUARD`) where transformers looks for something else, and refuses:

    transformers_weights    the name of a file of weights, which this is none; `from_pretrained`, whatever it is passed
    attn_implementation     an attention that only this module registers; `from_config` too, of any version

Neither means anything to a model that is loaded: it has its own files, and computes with its family's own attention.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pipeline.blocks.quantized import QuantizedLinear, add_quantizers_, find_settings, find_site_quantizers
from pipeline.inference.manifest import METHOD, ExportError, check_format, write_manifest
from pipeline.inference.packed_block import pack_block_
from pipeline.inference.prefixed_model import prefix_model_
from pipeline.models.architectures import find_architecture
from pipeline.runtime.files import write_json

GUARD = f"{METHOD} (import pipeline.hf)"
GUARDS = {"transformers_weights": GUARD, "attn_implementation": GUARD}
AttentionInterface.register(GUARD, sdpa_attention_forward)
AttentionMaskInterface.register(GUARD, sdpa_mask)


@register_quantization_config(METHOD)
class PrefixQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of an exported folder.

    Attributes:
        blocks: settings of every block, as `blocks.quantized.describe_blocks` writes them: the quantizer of each site
            and which online rotations the weights count on.
        prefix: {"tokens": P, "token_ids": [P] or [] for a continuous one, "start_token_id": the start token that the
            prefix makes superfluous, or None}.
        format_version: of the layout of tensors.
        text_start_token_id: the start token that belongs in front of every text, or None.
    """

    def __init__(
        self,
        blocks: dict[str, Any],
        prefix: dict[str, Any],
        format_version: int,
        text_start_token_id: int | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        check_format("quantization_config", format_version)
        if unknown:
            raise ExportError(f"quantization_config has unknown keys: {', '.join(sorted(unknown))}")
        self.quant_method = METHOD
        self.format_version = format_version
        self.blocks = blocks
        self.prefix = prefix
        self.text_start_token_id = text_start_token_id


@register_quantizer(METHOD)
class PrefixQuantizer(HfQuantizer):
    """What transformers calls around loading."""

    requires_calibration = True
    quantization_config: PrefixQuantConfig

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """A map that somebody wrote for the plain model does not know of the prefix."""
        if not isinstance(device_map, dict) or not self.quantization_config.prefix["tokens"]:
            return device_map
        if {"", "prefix_kv"} & device_map.keys():
            return device_map
        return device_map | {"prefix_kv": next((place for place in device_map.values() if place != "disk"), "cpu")}

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """What transformers calls before it looks for files."""
        if getattr(config, "transformers_weights", None) == GUARD:
            del config.transformers_weights
        return config

    update_tp_plan = update_attn_implementation  # what older versions call there

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if model.config._attn_implementation == GUARD:
            model.set_attn_implementation(find_architecture(model.config).kernel)
        build_packed_(model, self.quantization_config)
        check_complete(model, checkpoint_files or [])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Older versions leave what they rename as it is stored: the table, where a model without a head is asked for.
        model.get_input_embeddings().to(model.config.dtype)
        return model

    def complete_folder(self, folder: Path) -> None:
        """Make what `save_pretrained` wrote an exported folder: refused by who cannot read it, with a manifest."""
        path = folder / "config.json"
        if path.is_file():  # of adapters alone there is none
            config = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, config | GUARDS)
            write_manifest(folder)

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Of adapters on top; what is packed stands still, and gradients pass it."""
        return True


def check_complete(model: nn.Module, files: list[str]) -> None:
    """Raises ExportError unless `files` hold every tensor of `model`: of what is not there, transformers only warns."""
    present: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            present |= set(file.keys())
    if missing := find_missing(model, present):
        raise ExportError(f"{len(missing)} tensors are missing: {', '.join(missing[:3])}; get a complete copy")


def find_missing(model: nn.Module, present: Collection[str]) -> list[str]:
    """Tensors of `model` that a folder with those `present` lacks; of two tied tables it holds one."""
    tied = {find_architecture(model.config).lm_head} if model.config.tie_word_embeddings else set()
    known, prefix = tied | set(present), f"{model.base_model_prefix}."
    return sorted(name for name in model.state_dict() if name not in known and prefix + name not in known)


def build_packed_(model: PreTrainedModel, config: PrefixQuantConfig) -> None:
    """Turn a plain model on the meta device into the exported one, its tensors still to be loaded."""
    architecture = find_architecture(model.config)
    heads = model.config.num_key_value_heads
    with torch.device("meta"):
        for index, block in enumerate(model.base_model.layers):
            settings = find_settings(config.blocks, index)
            add_quantizers_(block, architecture, settings, heads)
            for module in list(block.modules()):
                if isinstance(module, QuantizedLinear):
                    module.declare_quantized_()
            pack_block_(block, architecture)
            for quantizer in find_site_quantizers(block, architecture).values():
                quantizer.calibrated = quantizer.spec.enabled
        tokens = config.prefix["tokens"]
        layers = model.base_model.layers
        shape = (len(layers), 2, heads, tokens, layers[0].self_attn.head_dim)
        prefix_kv = torch.empty(shape, dtype=torch.float32) if tokens else None
    prefix_model_(model, prefix_kv, config.prefix["start_token_id"], config.text_start_token_id)

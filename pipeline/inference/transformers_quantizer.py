"""Makes transformers load exported folders: `import pipeline.hf`, then `AutoModelForCausalLM.from_pretrained(folder)`.

config.json of an exported folder has a `quantization_config` with `quant_method: prefixquant`. This module registers
the two classes that transformers then asks for, in its registry. They build the model's own class, replace
its linears by packed ones, add quantizers and prefix, and let transformers load the tensors.

Without this module transformers would skip a `quant_method` that it does not know, and fill the linears with random
numbers. So config.json also names this module (`GUARD`) in two places where transformers expects something else, and
stops:

    transformers_weights    transformers expects the name of a file of weights; stops `from_pretrained`, whatever it is
                            passed
    attn_implementation     transformers expects an attention, and only this module registers one of that name; stops
                            `from_config` too, in every version

A loaded model uses neither: it has its own files, and computes with its family's own attention.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from pipeline.blocks.quantized import QuantizedLinear, add_quantizers_, find_settings, find_site_quantizers
from pipeline.inference.manifest import METHOD, TOKENIZER_FILES, ExportError, check_format, write_manifest
from pipeline.inference.packed_block import pack_block_
from pipeline.inference.prefixed_model import PrefixedModel, prefix_model_
from pipeline.models.architectures import find_architecture
from pipeline.models.checkpoint import LM_HEAD
from pipeline.models.experts import route_experts_
from pipeline.models.layers import find_linear, list_layers
from pipeline.models.lm_head import QuantizedHead
from pipeline.models.routing import CORRECTION_BIAS
from pipeline.runtime.files import write_json

GUARD = f"{METHOD} (import pipeline.hf)"
GUARDS = {"transformers_weights": GUARD, "attn_implementation": GUARD}
AttentionInterface.register(GUARD, sdpa_attention_forward)
AttentionMaskInterface.register(GUARD, sdpa_mask)
_PREFIX_KV = "prefix_kv"


class PrefixQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of an exported folder.

    Attributes:
        blocks: settings of every block, as `blocks.quantized.describe_blocks` writes them: the quantizer of each site
            and the online rotations that the weights expect.
        prefix: {"tokens": P, "token_ids": [P] or [] for a continuous one, "start_token_id": the start token that a text
            must not begin with, because the prefix ends in it, or None}.
        format_version: version of the layout of tensors.
        text_start_token_id: the start token that is put between the prefix and every text, or None.
        lm_head: {"bits": 8, "rotate": whether it has a Hadamard transform before it}, or None: it is not quantized.
    """

    def __init__(
        self,
        blocks: dict[str, Any],
        prefix: dict[str, Any],
        format_version: int,
        text_start_token_id: int | None = None,
        lm_head: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        check_format("quantization_config", format_version)
        if unknown:
            raise ExportError(f"quantization_config has unknown keys: {', '.join(sorted(unknown))}. Remove them.")
        self.quant_method = cast(QuantizationMethod, METHOD)  # transformers takes any string, and types it as an enum
        self.format_version = format_version
        self.blocks = blocks
        self.prefix = prefix
        self.text_start_token_id = text_start_token_id
        self.lm_head = lm_head


class PrefixQuantizer(HfQuantizer):
    """The steps around loading that transformers leaves to a quantization method."""

    requires_calibration = True
    quantization_config: PrefixQuantConfig

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Add the prefix to a map that was written for the plain model."""
        if not isinstance(device_map, dict) or not self.quantization_config.prefix["tokens"]:
            return device_map
        if "" not in device_map and _PREFIX_KV not in device_map:
            device_map = device_map | {_PREFIX_KV: _choose_place(device_map)}
        self._keep_prefix_in_memory_(device_map)
        return device_map

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Correct the place of the prefix. transformers calls this with the map that it made of `auto`."""
        if isinstance(device_map, dict):
            self._keep_prefix_in_memory_(device_map)

    @staticmethod
    def _keep_prefix_in_memory_(device_map: dict[str, Any]) -> None:
        """Keep the prefix off the disk: caches are made of it outside of the calls that would load it from there."""
        if device_map.get(_PREFIX_KV) == "disk":
            device_map[_PREFIX_KV] = _choose_place(device_map)

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Remove the guard. transformers calls this before it looks for files."""
        if getattr(config, "transformers_weights", None) == GUARD:
            delattr(config, "transformers_weights")
        return config

    update_tp_plan = update_attn_implementation  # older versions call this one there

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if model.config._attn_implementation == GUARD:
            model.set_attn_implementation(find_architecture(model.config).kernel)
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), CORRECTION_BIAS}
        files = checkpoint_files or []
        check_depth(model.config, files)
        check_function(model.config, files)
        build_packed_(model, self.quantization_config)
        check_complete(model, files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Older versions leave a renamed tensor in its stored dtype: the table of a model that is loaded without a head.
        model.get_input_embeddings().to(model.config.dtype)
        if not isinstance(model, PrefixedModel):
            raise TypeError(f"{type(model).__name__} was not built by this quantizer")
        return model.keep_unpacked_(None)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Raise ValueError, as the model's own method does."""
        return model.dequantize(dtype)

    def complete_folder(self, folder: Path) -> None:
        """Turn the folder that `save_pretrained` wrote into an exported one: with the guards and a manifest."""
        path = folder / "config.json"
        if path.is_file():  # there is none if adapters alone were saved
            config = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, config | GUARDS)
            write_manifest(folder, left_out=TOKENIZER_FILES)

    # transformers' abstract methods have no return types.
    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether adapters on top can be trained. Packed weights are constant, and gradients pass through them."""
        return True


# Keys of a config that leave the function of the blocks alone: names, outputs, training, precision, special tokens. All
# others are compared with config.json.
_FREE_KEYS = frozenset(
    {
        *("_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version", "quantization_config"),
        *("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "transformers_weights"),
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits"),
        *("attention_dropout", "initializer_range", "router_aux_loss_coef", "router_jitter_noise", "problem_type"),
        *("id2label", "label2id", "num_labels", "chunk_size_feed_forward", "pretraining_tp", "gradient_checkpointing"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    }
)
_SIZES = frozenset(  # `check_complete` says which tensor they contradict
    {
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
        *("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "num_experts"),
        *("num_local_experts",),
    }
)
# With these kinds of RoPE, `max_position_embeddings` only says how long a text may be.
_FIXED_ROPE = {"default", "linear", "llama3"}

# Assigned, because transformers' `register_quantization_config` refuses to replace the placeholder of `prefixquant`.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PrefixQuantConfig
AUTO_QUANTIZER_MAPPING[METHOD] = PrefixQuantizer


def _choose_place(device_map: dict[str, Any]) -> Any:
    """Return the device of a map that computes: the first one that is neither the CPU nor the disk, if there is one."""
    places = [place for place in device_map.values() if place != "disk"]
    return next((place for place in places if str(place) != "cpu"), "cpu")


def check_depth(config: PreTrainedConfig, files: list[str]) -> None:
    """Raise ExportError unless `files` hold as many blocks as the config has."""
    indices = {int(match[1]) for name in _read_shapes(files) if (match := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    if indices and max(indices) + 1 != config.num_hidden_layers:
        raise ExportError(
            f"num_hidden_layers={config.num_hidden_layers}: the folder holds {max(indices) + 1} blocks, and its prefix "
            "and its quantizers belong to all of them. Leave num_hidden_layers out, or export a model of that depth."
        )


def check_function(config: PreTrainedConfig, files: list[str]) -> None:
    """Raise ExportError if a key that can change the function of a block differs from config.json next to `files`.

    Quantizers and prefix belong to the function that they were calibrated for.
    """
    path = Path(files[0]).with_name("config.json") if files else None
    if path is None or not path.is_file():
        return
    stored = type(config).from_dict(json.loads(path.read_text(encoding="utf-8"))).to_dict()
    values = config.to_dict()
    free = _FREE_KEYS | ({"max_position_embeddings"} if _list_rope_types(stored) <= _FIXED_ROPE else set())
    changed = [key for key in sorted({*values, *stored} - free - _SIZES) if values.get(key) != stored.get(key)]
    if changed:
        settings, exported = (", ".join(f"{key}={source.get(key)!r}" for key in changed) for source in (values, stored))
        raise ExportError(
            f"{settings}: the folder was exported with {exported}, and its quantizers belong to that. Leave "
            f"{', '.join(changed)} out, or export a model with such a config."
        )


def _list_rope_types(values: dict[str, Any]) -> set[str]:
    """Return the kinds of RoPE in a config. Some families have one for each kind of layer."""
    rope = values.get("rope_parameters") or {}
    levels = [rope, *(level for level in rope.values() if isinstance(level, dict))]
    return {str(level["rope_type"]) for level in levels if "rope_type" in level}


def check_complete(model: PreTrainedModel, files: list[str]) -> None:
    """Raise ExportError unless `files` hold every tensor of `model` in its shape. transformers would only warn."""
    shapes = _read_shapes(files)
    if missing := find_missing(model, shapes):
        raise ExportError(f"{len(missing)} tensors are missing: {', '.join(missing[:3])}. Get a complete copy.")
    prefix = f"{model.base_model_prefix}."
    for name, tensor in model.state_dict().items():
        stored = shapes.get(name, shapes.get(prefix + name))
        if stored is not None and stored != tensor.shape:
            raise ExportError(
                f"{name} has shape {list(stored)} in the folder and {list(tensor.shape)} by its config. Leave out the "
                "settings of the config that change sizes, such as hidden_size."
            )


def _read_shapes(files: list[str]) -> dict[str, torch.Size]:
    """Return name -> shape of all tensors in safetensors files."""
    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in set(file.keys())}
    return shapes


def find_missing(model: PreTrainedModel, present: Collection[str]) -> list[str]:
    """Return the tensors of `model` that a folder with those `present` lacks. It holds one of two tied tables."""
    tied = {find_architecture(model.config).lm_head} if model.config.tie_word_embeddings else set()
    known, prefix = tied | set(present), f"{model.base_model_prefix}."
    return sorted(name for name in model.state_dict() if name not in known and prefix + name not in known)


def build_packed_(model: PreTrainedModel, config: PrefixQuantConfig) -> PrefixedModel:
    """Turn a plain model on the meta device into the exported one, and return it. Its tensors are loaded later."""
    architecture = find_architecture(model.config)
    heads = model.config.num_key_value_heads
    with torch.device("meta"):
        for index, block in enumerate(list_layers(model)):
            if architecture.experts is not None:
                route_experts_(block, architecture.experts)
            settings = find_settings(config.blocks, index)
            if settings is None:
                raise ExportError(f"quantization_config: block {index} has no settings. Get an intact copy.")
            add_quantizers_(block, architecture, settings, heads)
            for module in list(block.modules()):
                if isinstance(module, QuantizedLinear):
                    module.declare_quantized_()
            pack_block_(block, architecture)
            for quantizer in find_site_quantizers(block, architecture).values():
                quantizer.calibrated = quantizer.spec.enabled
        if config.lm_head is not None:
            head = find_linear(model, LM_HEAD)
            integers = torch.empty(head.weight.shape, dtype=torch.int8)
            scale = torch.empty(head.out_features, dtype=torch.float32)
            model.set_submodule(LM_HEAD, QuantizedHead(integers, scale, config.lm_head["rotate"]))
        tokens = config.prefix["tokens"]
        layers = list_layers(model)
        shape = (len(layers), 2, heads, tokens, layers[0].self_attn.head_dim)
        prefix_kv = torch.empty(shape, dtype=torch.float32) if tokens else None
    return prefix_model_(model, prefix_kv, config.prefix["start_token_id"], config.text_start_token_id)

"""Take the text model out of a multimodal checkpoint: its config, and the names of its tensors.

A wrapper is a model class around a text model, a vision tower and a projector. On text alone it computes what its text
model computes, so the text model is imported as a model of its own family, and the other parts are dropped by name:

    Qwen3VLForConditionalGeneration                      imported as Qwen3ForCausalLM
    model.language_model.layers.0.mlp.up_proj.weight ->  model.layers.0.mlp.up_proj.weight
    model.visual.blocks.0.attn.qkv.weight            ->  dropped

Releases of transformers save the same wrapper under different names, so `WRAPPERS` lists all layouts. Before any tensor
is read, `check_text_forward` builds the wrapper and its text model at a tiny size and compares their logits.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.importing.source import ModelImportError, loading
from pipeline.models.architectures import UnsupportedModelError, find_architecture, find_family

_LLAVA_PARTS = ("vision_tower.", "multi_modal_projector.", "image_newline")
_QWEN_PARTS = ("visual.",)


@dataclass(frozen=True)
class Wrapper:
    """Names of a multimodal model class in checkpoints.

    Attributes:
        text: prefixes of the text model's tensors, one for each layout, the most specific first.
        parts: prefixes of all other parts, each also after `model.`.
        heads: names of lm_head.
    """

    text: tuple[str, ...] = (
        *("model.language_model.model.", "model.language_model."),
        *("language_model.model.", "language_model."),
    )
    parts: tuple[str, ...] = _LLAVA_PARTS
    heads: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight", "model.language_model.lm_head.weight")

    def find_part(self, name: str) -> str | None:
        """Return the part that a tensor belongs to, without a leading `model.` and a trailing dot, or None."""
        short = name.removeprefix("model.")
        return next((part.rstrip(".") for part in self.parts if short.startswith(part)), None)


# transformers 4 wrote the text model of Qwen as `model.*`, next to `visual.*`.
_QWEN = Wrapper(text=("model.language_model.", "language_model.", "model."), parts=_QWEN_PARTS)
_LLAVA = Wrapper()
_SMOLVLM = Wrapper(text=("model.text_model.",), parts=("vision_model.", "connector."), heads=("lm_head.weight",))

WRAPPERS: dict[str, Wrapper] = {
    "gemma3": _LLAVA,
    "idefics3": _SMOLVLM,
    "internvl": _LLAVA,
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "mistral3": _LLAVA,
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "smolvlm": _SMOLVLM,
}
# The model_type of a wrapper's own text config -> the family that computes the same on text.
_TEXT_FAMILIES = {
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# Settings that a text model has always, and the family of its own only if they are stated.
_FIXED: dict[str, dict[str, Any]] = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
_WITHOUT_DEFAULT = {"qwen3_moe": {"head_dim"}}  # settings that a family reads, and its config does not list
# Settings of the text model that some checkpoints state only for the wrapper.
_SHARED = ("vocab_size", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
_MULTIMODAL_ROPE = ("type", "mrope_section", "mrope_interleaved")
_TOLERANCE = 1e-5
_VOCABULARY = 96
_TINY: dict[str, int | None] = {
    "intermediate_size": 64,
    "vocab_size": _VOCABULARY,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_TINY |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_TINY |= {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_TINY_WINDOW, _TINY_LENGTH = 12, 40


@dataclass(frozen=True)
class TextModel:
    """The text model of a wrapper, before its tensors are read.

    Attributes:
        config: config of the text model, as a family of its own.
        wrapper_config: config of the whole.
        wrapper: the names in checkpoints.
    """

    config: PreTrainedConfig
    wrapper_config: PreTrainedConfig
    wrapper: Wrapper


def find_text_family(raw: dict[str, Any]) -> str:
    """Return the model_type of the text model of a wrapper's config.json, as a family of its own."""
    text = raw.get("text_config")
    stated = text.get("model_type") if isinstance(text, dict) else None
    if stated is None:
        stated = _read_default_family(str(raw["model_type"]))
    return _TEXT_FAMILIES.get(stated, str(stated))


def _read_default_family(model_type: str) -> str:
    default = CONFIG_MAPPING[model_type].sub_configs_defaults["text_config"]
    return getattr(default, "model_type", None) or default.config_class.model_type


def read_text_config(source: str, raw: dict[str, Any]) -> TextModel:
    """Return the text model that config.json of a wrapper describes.

    Settings that only the wrapper states (ties, ids of special tokens, eps, vocabulary) count for the text model. Very
    old files state all settings on the wrapper's level.

    Raises:
        ModelImportError: transformers cannot read the config.
        UnsupportedModelError: the family of the text model is not supported.
    """
    model_type = str(raw["model_type"])
    merged = copy.deepcopy(raw)
    if isinstance(merged.get("text_config"), dict):
        for key in _SHARED:
            if key in raw:
                merged["text_config"].setdefault(key, raw[key])
    with loading(source, "its config.json"):
        wrapper_config = CONFIG_MAPPING[model_type].from_dict(merged)
        text_config = wrapper_config.get_text_config(decoder=True)
        family = _TEXT_FAMILIES.get(text_config.model_type, text_config.model_type)
        config = _make_family_config(family, text_config)
    # transformers ties by the wrapper's own flag.
    config.tie_word_embeddings = bool(wrapper_config.tie_word_embeddings)
    return TextModel(config, wrapper_config, WRAPPERS[model_type])


def check_text_family(source: str, raw: dict[str, Any]) -> None:
    """Raise UnsupportedModelError if the text model in config.json of a wrapper is of an unsupported family."""
    family = find_text_family(raw)
    try:
        find_family(family)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"model.source={source!r}: model_type={raw['model_type']!r} wraps a text model that cannot be imported: "
            f"{error}"
        ) from None


def _make_family_config(family: str, text_config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the plain family with all settings of the text config that this family has."""
    config_class = CONFIG_MAPPING[family]
    known = set(config_class().to_dict()) | _WITHOUT_DEFAULT.get(family, set())
    values = {key: value for key, value in text_config.to_dict().items() if key in known and key != "model_type"}
    rope = values.get("rope_parameters")
    if rope:
        values["rope_parameters"] = {key: value for key, value in rope.items() if key not in _MULTIMODAL_ROPE}
    values |= _FIXED.get(text_config.model_type, {})
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    return config_class.from_dict(values)


def rename_tensors(source: str, wrapper: Wrapper, names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return `name in the text class -> name in the checkpoint`, and `name of a dropped tensor -> its part`.

    Names that belong to no part stay as they are, so that the strict check of names refuses them.

    Raises:
        ModelImportError: the checkpoint holds the text model twice, in two layouts.
    """
    places: dict[str, str] = {}
    dropped: dict[str, str] = {}
    all_names = sorted(names)
    prefix = next((prefix for prefix in wrapper.text if f"{prefix}layers.0.input_layernorm.weight" in names), "")
    for name in all_names:
        part = wrapper.find_part(name)
        if part is not None:
            dropped[name] = part
            continue
        new = "lm_head.weight" if name in wrapper.heads else name
        if prefix and name.startswith(prefix) and name not in wrapper.heads:
            new = "model." + name.removeprefix(prefix)
        if new in places:
            raise ModelImportError(
                f"model.source={source!r}: holds two tensors for {new}: {places[new]} and {name}. Save the model again "
                "with transformers (save_pretrained)."
            )
        places[new] = name
    return places, dropped


@torch.no_grad()
def check_text_forward(source: str, text: TextModel) -> float:
    """Compare wrapper and text model on text alone, both at a tiny size with the same random tensors.

    The tiny size keeps all settings but the numbers of layers, heads and rows, one layer for each kind of layer. The
    other parts of the wrapper are never in memory.

    Returns:
        The largest deviation of the logits, relative to the largest of them.

    Raises:
        UnsupportedModelError: it is larger than 1e-5.
    """
    changes = _shrink(text.config)
    with loading(source, "its config.json"):
        small = _make_family_config(text.config.model_type, text.config)
        wrapper_config = copy.deepcopy(text.wrapper_config)
        for config in (small, wrapper_config.get_text_config(decoder=True)):
            for key, value in changes.items():
                if hasattr(config, key):
                    setattr(config, key, copy.deepcopy(value))
        small.tie_word_embeddings = False
        wrapper_config.tie_word_embeddings = False
        kernel = find_architecture(small).kernel
        model: Any = AutoModelForCausalLM.from_config(small, attn_implementation=kernel, dtype=torch.float32)
        with torch.device("meta"):
            wrapper: Any = AutoModelForImageTextToText.from_config(wrapper_config, attn_implementation=kernel)
        _fill_(model)
        _put_text_(wrapper, model)
        token_ids = torch.arange(_TINY_LENGTH).remainder(_VOCABULARY - 30).add(20)[None]
        expected = wrapper.eval()(input_ids=token_ids, use_cache=False).logits
        computed = model.eval()(input_ids=token_ids, use_cache=False).logits
    deviation = ((computed - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    if not deviation <= _TOLERANCE:
        raise UnsupportedModelError(
            f"model.source={source!r}: model_type={text.wrapper_config.model_type!r} reads text in another way than "
            f"its text model {text.config.model_type!r} does: logits differ by {deviation:.2e} of max |logit|. Report "
            "this with the model's name."
        )
    return deviation


def _shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return settings for a tiny model that has one layer of each kind of a model."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    changes: dict[str, Any] = _TINY | {"head_dim": head_dim, "hidden_size": head_dim * 2, "num_hidden_layers": 2}
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if kinds:
        changes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    if getattr(config, "sliding_window", None):
        changes["sliding_window"] = _TINY_WINDOW
    return changes


def _fill_(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _put_text_(wrapper: Any, model: Any) -> None:
    """Give a wrapper on the meta device a text model in memory, with the tensors of `model`, and remove other parts."""
    name = "text_model" if hasattr(wrapper.model, "text_model") else "language_model"
    meta = getattr(wrapper.model, name)
    text: Any = type(meta)(meta.config).float()
    text.load_state_dict(model.model.state_dict())
    for part, _ in list(wrapper.model.named_children()):
        setattr(wrapper.model, part, text if part == name else nn.Identity())
    wrapper.lm_head = model.lm_head

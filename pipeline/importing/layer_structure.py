"""Say how the decoder layers of a family differ from Llama's, by the modules of its class in transformers.

The class is built on the meta device from config.json alone. Nothing is computed, so features without modules of their
own (pairs of RoPE, windows, factors) stay unknown; `obstacles.py` knows those from keys and by family.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.runtime.errors import PipelineError, reading

_NOT_BUILT = ("quantization_config", "auto_map", "dtype", "torch_dtype")
_LARGEST_DEPTH = 200  # layers; building more takes long, and no model has them
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FUSED = re.compile(r"qkv|query_key_value|c_attn|att_proj|Wqkv", re.IGNORECASE)
_PLAIN_LAYER_NORM = re.compile(r"(?!.*(RMS|Rms|T5)).*LayerNorm")
_POSITIONS = re.compile(r"\b(wpe|embed_positions|position_embeddings?|pos_emb\w*)$")
Facts = list[tuple[str, str]]  # the feature, and the name of the module in the layer that shows it


class UnreadableStructureError(PipelineError):
    """transformers does not know the family, or cannot build it from this config."""


def describe_structure(values: Mapping[str, Any]) -> list[str] | None:
    """Return how the layers of a text model differ from Llama's; None where transformers cannot build its class.

    Args:
        values: settings of the text model in config.json.
    """
    try:
        with reading(UnreadableStructureError):
            config = _read_config(values)
            with torch.device("meta"):
                return _describe(AutoModelForCausalLM.from_config(config))
    except UnreadableStructureError:
        return None


def list_layer_kinds(values: Mapping[str, Any]) -> list[str]:
    """Return the kind of each layer, which many configs state by an interval or a pattern; [] if it is unknown."""
    try:
        with reading(UnreadableStructureError):
            config = _read_config(values)
            kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
            return [str(kind) for kind in kinds or ()]
    except UnreadableStructureError:
        return []


def _read_config(values: Mapping[str, Any]) -> Any:
    family = str(values.get("model_type"))
    depth = next((values[key] for key in ("num_hidden_layers", "n_layer", "n_layers") if key in values), 1)
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not 1 <= depth <= _LARGEST_DEPTH:
        raise UnreadableStructureError(f"model_type={family!r} is not built")
    settings = {key: value for key, value in values.items() if key not in _NOT_BUILT}
    # The row of a padding token may lie beyond a small vocabulary, and changes no structure.
    config = CONFIG_MAPPING[family].from_dict(settings | {"pad_token_id": None})
    if getattr(config, "num_key_value_heads", 1) is None:
        config.num_key_value_heads = config.num_attention_heads
    return config


def _describe(model: nn.Module) -> list[str]:
    """Return a phrase for each feature of the decoder layers, and of the modules around them."""
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        return []
    place, layers = min(stacks, key=lambda stack: stack[0].count("."))
    features: dict[str, list[tuple[int, str]]] = {}
    for index, layer in enumerate(layers):
        for feature, module in _inspect_layer(layer):
            features.setdefault(feature, []).append((index, module))
    described = [_locate(feature, places, len(layers)) for feature, places in features.items()]
    positions = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name) and not name.startswith(f"{place}.")
    ]
    if positions:
        described.append(f"learned positions in place of RoPE ({positions[0]})")
    if getattr(getattr(model, "lm_head", None), "bias", None) is not None:
        described.append("a bias of lm_head")
    return described


def _locate(feature: str, places: list[tuple[int, str]], count: int) -> str:
    """Return a feature with its layers: "LayerNorm instead of RMSNorm (input_layernorm) in all layers"."""
    layers = sorted({index for index, _ in places})
    first = places[0][1]
    part = f"in {len(layers)} of {count} layers, first in layer {layers[0]}"
    where = "in all layers" if len(layers) == count else part
    return f"{feature} ({first}) {where}" if first else f"{feature} {where}"


def _inspect_layer(layer: nn.Module) -> Facts:
    return [fact for rule in _RULES for fact in rule(layer)]


def _find_norms(layer: nn.Module) -> Facts:
    norms = [(name, module) for name, module in layer.named_modules() if _is_norm(module)]
    facts: Facts = []
    for name, module in norms:
        if isinstance(module, nn.LayerNorm) or _PLAIN_LAYER_NORM.fullmatch(type(module).__name__):
            facts.append(("LayerNorm instead of RMSNorm", name))
        elif not list(module.parameters()):
            facts.append(("norms without weights", name))
    return facts[:1]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _find_parallel_branches(layer: nn.Module) -> Facts:
    norms = [name for name, module in layer.named_children() if _is_norm(module)]
    if _find_missing_attention(layer):
        return []
    return [("attention and MLP in parallel, after one norm", norms[0])] if len(norms) == 1 else []


def _find_missing_attention(layer: nn.Module) -> Facts:
    names = [name for name, _ in layer.named_modules()]
    return [] if any(_ATTENTION.search(name) for name in names) else [("no attention and so no cache of keys", "")]


def _find_fused_attention(layer: nn.Module) -> Facts:
    fused = (name for name, _ in layer.named_modules() if _FUSED.search(name.rpartition(".")[2]))
    return [("q, k and v fused into one linear", name) for name in fused][:1]


def _find_gateless_mlp(layer: nn.Module) -> Facts:
    if _find_missing_attention(layer):
        return []
    for name, module in [("", layer), *layer.named_children()]:
        if _ATTENTION.search(name) or any("expert" in part for part, _ in module.named_modules()):
            continue
        children = module.named_children() if module is layer else module.named_modules()
        linears = [(part, child) for part, child in children if _is_linear(child)]
        if len(linears) == 2 and _read_outputs(linears[0][1]) == _read_inputs(linears[1][1]):
            return [("an MLP without a gate", f"{name}.{linears[0][0]}".lstrip("."))]
    return []


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _read_outputs(linear: Any) -> int:
    return linear.out_features if isinstance(linear, nn.Linear) else linear.weight.shape[1]


def _read_inputs(linear: Any) -> int:
    return linear.in_features if isinstance(linear, nn.Linear) else linear.weight.shape[0]


def _find_own_parameters(layer: nn.Module) -> Facts:
    """Find weights that belong to no linear, norm or activation, such as attention sinks or factors of a layer."""
    names: Iterable[str] = (
        f"{name}.{part}" if name else part
        for name, module in layer.named_modules()
        if not _is_norm(module) and not _is_linear(module) and "expert" not in name
        for part in [*module._parameters, *module._buffers]
        if part not in module._non_persistent_buffers_set and getattr(module, part) is not None
    )
    return [("weights that Llama's layers do not have", name) for name in names][:1]


_RULES: tuple[Callable[[nn.Module], Facts], ...] = (
    _find_missing_attention,
    _find_norms,
    _find_parallel_branches,
    _find_fused_attention,
    _find_gateless_mlp,
    _find_own_parameters,
)

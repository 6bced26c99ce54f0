"""The folder of the ONNX format: the graph, the prefix as its first past, the tokenizer and a manifest.

    model.onnx, model.onnx.data   the graph (`onnx_graph.py`) and its tensors, without the prefix
    past.safetensors, past.npz    the prefix: name of a graph's input -> float32 [1, kv heads, P, d], twice
    config.json, tokenizer files  of the model; the tokenizer begins texts as calibration windows begin
    genai_config.json             for onnxruntime-genai, which has no place for a first past: only without a prefix
    manifest.json                 properties that the folder keeps and drops, sizes, sites

`find_onnx_obstacles` needs no package of the extra `onnx`; `write_onnx` does.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.blocks.quantized import BlockSettings
from pipeline.export.folder import save_tokenizer
from pipeline.export.params import OnnxParams
from pipeline.interop.onnx_layout import GRAPH, MANIFEST, PAST, PAST_ARRAYS, SESSION_OPTIONS, WEIGHTS, list_parts
from pipeline.models.checkpoint import CONFIG, CONFIG_KEY, Checkpoint, copy_companions
from pipeline.models.sites import CACHE_SITES, INPUT_SITES, Site
from pipeline.numerics.formats import INT, INT16
from pipeline.numerics.quantizer import QuantizerSpec
from pipeline.runtime.artifacts import Header, save_tensors, write_json
from pipeline.runtime.errors import PipelineError

if TYPE_CHECKING:
    import onnx_ir as ir

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_DATA_DEPENDENT_ROPE = ("dynamic", "longrope")  # their frequencies depend on the length of the text
_PACKAGES = ("onnx", "onnxscript", "onnx_ir")


class MissingExtraError(PipelineError):
    """The packages of the extra `onnx` are not installed."""


def find_onnx_obstacles(checkpoint: Checkpoint, all_settings: Sequence[BlockSettings], params: OnnxParams) -> list[str]:
    """Return a message for each reason to refuse the model; `all_settings` are the settings of its blocks."""
    config = checkpoint.config
    if config.model_type not in FAMILIES:
        return [
            f"export.formats=['onnx']: model_type={config.model_type!r} was never compared in ONNX Runtime; compared "
            f"are {', '.join(FAMILIES)}. Remove onnx."
        ]
    problems: dict[str, None] = {}  # an ordered set
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _DATA_DEPENDENT_ROPE:
        problems[
            f"export.formats=['onnx']: RoPE of type {rope!r} depends on the length of the text, and a graph has one "
            "table. Remove onnx."
        ] = None
    widths = checkpoint.architecture.site_widths(checkpoint.build_block(0))
    for settings in all_settings:
        for site, spec in settings.sites.items():
            problems |= dict.fromkeys(_find_site_problems(site, spec))
        problems |= dict.fromkeys(_find_rotation_problems(settings, widths, params.widest_rotation))
        if params.cache == "integer":
            problems |= dict.fromkeys(_find_cache_problems(settings))
    return list(problems)


def _find_site_problems(site: str, spec: QuantizerSpec) -> list[str]:
    """Return a message for each setting of a site that a QDQ pair does not have."""
    problems = []
    if site in INPUT_SITES or site in CACHE_SITES:
        allowed = ("8, or format: int16 with bits: 16",) if site in INPUT_SITES else ("8 or 16",)
        eight = spec.format == INT and spec.bits == 8
        if not eight and not (site in INPUT_SITES and spec.format == INT16):
            problems.append(
                f"bits={spec.bits}, format={spec.format!r} of {site}: the onnx format has integers of 8 and 16 bits. "
                f"Use bits: {allowed[0]}."
            )
        if spec.dynamic:
            problems.append(f"mode='dynamic' of {site}: a QDQ pair has a static scale. Use static.")
        if spec.group_size != -1:
            problems.append(
                f"group_size={spec.group_size} of {site}: the onnx format has one scale per tensor, or per head of "
                "keys and values. Use -1."
            )
    elif spec.format != INT:
        problems.append(f"format={spec.format!r} of {site}: initializers of the onnx format are integers. Use int.")
    return [f"quantizer_init: {problem}" for problem in problems]


def _find_rotation_problems(settings: BlockSettings, widths: dict[str, int], widest: int) -> list[str]:
    """Return a message for each online rotation that is wider than export.onnx.widest_rotation."""
    online = {
        "r1": (settings.online_r1, Site.ATTENTION_INPUT, "hadamard"),
        "r3": (settings.online_r3 and settings.spec(Site.KEY).enabled, Site.KEY, "identity"),
        "r4": (settings.online_r4, Site.MLP_HIDDEN, "identity"),
        "r5": (settings.online_r5, Site.ATTENTION_OUTPUT, "identity"),
    }
    return [
        f"rotation.{name}: it acts online, and its matrix [{widths[site]}, {widths[site]}] is wider than "
        f"export.onnx.widest_rotation={widest}. Set rotation.{name}: {instead}, or allow the MatMul."
        for name, (acts, site, instead) in online.items()
        if acts and widths[site] > widest
    ]


def _find_cache_problems(settings: BlockSettings) -> list[str]:
    """Return a message for each reason why the past cannot hold integers."""
    key, value = settings.spec(Site.KEY), settings.spec(Site.VALUE)
    problems = [
        f"export.onnx.cache='integer': {group} are not quantized. Set quantizer_init.{group}.bits: 8, or "
        "export.onnx.cache: float32."
        for group, spec in (("keys", key), ("values", value))
        if not spec.enabled
    ]
    if key.enabled and (key.centered or settings.key_before_rope or settings.online_r3):
        problems.append(
            "export.onnx.cache='integer': keys that are centered, rotated by R3 or quantized before RoPE are not "
            "integers times a scale in the cache. Set quantizer_init.keys.centered: false, keys.before_rope: false and "
            "rotation.r3: identity."
        )
    return problems


def write_onnx(
    checkpoint: Checkpoint,
    prefix_kv: torch.Tensor | None,
    folder: Path,
    *,
    params: OnnxParams,
    header: Header,
    text_start_token_id: int | None = None,
    prefix_token_ids: Sequence[int] = (),
    graph: "ir.Model | None" = None,
) -> None:
    """Write the format's files into `folder`. `find_onnx_obstacles` has nothing to say about the checkpoint.

    Args:
        prefix_kv: [L, 2, kv_heads, P, d], or None.
        text_start_token_id: the start token between the prefix and every text, or None.
        prefix_token_ids: [P], empty for a continuous prefix.
        graph: the checkpoint's graph if there is one already (`fill_graph_`), or None to build it.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
        PipelineError: the prefix does not fit into a cache of static length.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"export.formats=['onnx']: {', '.join(missing)} not installed. Install the extra: pip install "
            "'prefixquant-pipeline[onnx]'."
        )
    from pipeline.interop.onnx_graph import GraphShapes, build_graph, save_graph

    tokens = 0 if prefix_kv is None else prefix_kv.shape[-2]
    shapes = None
    if params.sequence_length is not None and params.cache_length is not None:
        shapes = GraphShapes(params.sequence_length, params.cache_length)
        if tokens >= params.cache_length and params.cache != "integer":
            raise PipelineError(
                f"export.onnx.cache_length={params.cache_length}: the prefix has {tokens} positions, and text needs "
                "some. Use more."
            )
    integer_cache = params.cache == "integer"
    if graph is None:
        graph = build_graph(checkpoint, integer_cache=integer_cache, shapes=shapes, prefix_tokens=tokens)
    save_graph(graph, folder / GRAPH, WEIGHTS, tokens)
    if prefix_kv is not None:
        past = _name_past(prefix_kv)
        save_tensors(folder / PAST, past, header)
        np.savez(folder / PAST_ARRAYS, allow_pickle=False, **{name: tensor.numpy() for name, tensor in past.items()})
    copy_companions(checkpoint.folder, folder)
    save_tokenizer(checkpoint, folder, text_start_token_id)
    config = checkpoint.read_config()
    config.pop(CONFIG_KEY)
    write_json(folder / CONFIG, config)
    if prefix_kv is None and shapes is None and not integer_cache:
        write_json(folder / "genai_config.json", describe_for_genai(checkpoint))
    manifest = describe_contents(checkpoint, tokens, params)
    manifest["prefix"] |= {"token_ids": list(prefix_token_ids)}
    starts = prefix_kv is not None and text_start_token_id is None
    manifest["start_token_id"] = checkpoint.tokenizer.bos_token_id if starts else None
    write_json(folder / MANIFEST, manifest)


def _name_past(prefix_kv: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return input name -> float32 [1, kv heads, P, d]."""
    rows = prefix_kv.float().flatten(0, 1)
    names = list_parts(len(prefix_kv))
    return {f"past_key_values.{name}": row[None].clone() for name, row in zip(names, rows, strict=True)}


def describe_contents(checkpoint: Checkpoint, prefix_tokens: int, params: OnnxParams) -> dict[str, Any]:
    """Return the manifest, without token ids: the properties that the folder keeps and drops."""
    described = checkpoint.settings
    online = [name for name in ("r1", "r3", "r4", "r5") if described["block"].get(f"online_{name}")]
    keeps = [
        "weights: the checkpoint's integers, scales and zero points",
        "activations, keys and values: the checkpoint's static scales and zero points, as QDQ pairs",
        "centered activations: their mean is in the biases of the linears that read them",
        "R1 and R2, where they are merged into the weights",
        *(f"{name.upper()}: a MatMul" for name in online),
    ]
    drops = [] if checkpoint.dtype == torch.float32 else [f"{checkpoint.dtype}: the graph computes in float32"]
    return {
        "format": "onnx",
        "keeps": keeps,
        "drops": drops,
        "cache": params.cache,
        "shapes": None
        if params.sequence_length is None
        else {"batch": 1, "sequence": params.sequence_length, "past": params.cache_length},
        "prefix": {
            "tokens": prefix_tokens,
            "in_the_graph": False,
            "files": [PAST, PAST_ARRAYS] if prefix_tokens else [],
            "use": "past of the first call; position_ids begin at its length, attention_mask counts it",
        },
        "session_options": SESSION_OPTIONS,
        "blocks": described,
    }


def describe_for_genai(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return genai_config.json, by which onnxruntime-genai runs the graph. It has no place for a prefix."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    end = config.eos_token_id
    decoder = {
        "session_options": {},
        "filename": GRAPH,
        "head_size": checkpoint.build_block(0).self_attn.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": config.model_type,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos_token_id": end,
        "pad_token_id": end[0]
        if isinstance(end, list)
        else end
        if config.pad_token_id is None
        else config.pad_token_id,
        "decoder": decoder,
    }
    search = {"max_length": config.max_position_embeddings, "past_present_share_buffer": False, "do_sample": False}
    return {"model": model, "search": search}

"""The walk must call each decoder layer as transformers' own model does: same mask, same positions, nothing left out.

Layers are the model's own, so only the calls can differ: the mask of a layer with a sliding window, RoPE by kind of
layer, an argument that only this family has, a factor on the hidden states between embedding and layers. transformers'
model is therefore built without weights, its layers record how they are called, and the walk's calls are compared with
theirs, for every layer. Windows are cut to 40 positions in both, so that 72 positions cross them.
"""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.blocks.kv_cache import CACHE, make_block_cache
from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import UnsupportedModelError, find_max_positions
from pipeline.models.checkpoint import Checkpoint, build_skeleton
from pipeline.runtime.errors import reading

_WINDOW, _BEYOND = 40, 32
_INPUT = "hidden_states"
_WITHOUT_EFFECT = {CACHE, "past_key_values", "cache", "use_cache", "output_attentions", "cache_position", "kwargs"}
Calls = list[dict[str, Any]]


def check_layer_arguments(checkpoint: Checkpoint, source_config: PreTrainedConfig) -> None:
    """Compare the arguments of every layer, past the sliding window.

    Args:
        checkpoint: the imported model.
        source_config: config of the source, of another family where the import changes the family. Then only masks
            are compared with it.

    Raises:
        UnsupportedModelError: a layer gets other arguments from transformers' model than from the walk.
    """
    config = cut_windows(checkpoint.config)
    length = min(_WINDOW + _BEYOND, find_max_positions(config))
    problem = f"model_type={config.model_type!r}: its layers cannot be called as Llama's are"
    with reading(lambda reason: UnsupportedModelError(f"{problem} ({reason}). This family is not supported")):
        walk, calls = record_walk(checkpoint, config, length), record_model_calls(config, length)
    _compare(config, walk, calls, masks_only=False)
    if source_config.model_type != config.model_type:
        _compare(source_config, walk, record_model_calls(cut_windows(source_config), length), masks_only=True)


def cut_windows(config: PreTrainedConfig) -> Any:
    """Return a copy of a config whose sliding windows and chunks have at most 40 positions."""
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        names_window = ("window" in key or "chunk" in key) and not key.startswith(("max_", "num_"))
        if names_window and isinstance(value, int) and not isinstance(value, bool) and value > _WINDOW:
            setattr(config, key, _WINDOW)
    return config


@torch.no_grad()
def record_model_calls(config: PreTrainedConfig, length: int) -> Calls:
    """Return the arguments that transformers' model gives each decoder layer for one text of `length` tokens.

    The layers compute nothing. `hidden_states` of each call are the input of the layer minus the input of the model.
    """
    model = build_skeleton(config).eval()
    base, calls = model.model, []
    hidden = _make_hidden(config, length)

    def record(forward: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        bound = inspect.signature(forward).bind(hidden_states, *args, **kwargs)
        values = {name: value for name, value in bound.arguments.items() if value is not None}
        for name, parameter in inspect.signature(forward).parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                values |= values.pop(name, {})
        calls.append(values | {_INPUT: hidden_states - hidden})
        return hidden_states

    for layer in base.layers:
        layer.forward = functools.partial(record, layer.forward)
    base.rotary_emb = type(base.rotary_emb)(config)
    base.set_submodule("norm", nn.Identity())
    base(inputs_embeds=hidden, use_cache=False)
    for layer in base.layers:
        del layer.forward  # it refers to the layer, which would keep both in memory
    return calls


def record_walk(checkpoint: Checkpoint, config: PreTrainedConfig, length: int) -> Calls:
    """Return the arguments that the walk gives each decoder layer for the same text."""
    narrow = copy.copy(checkpoint)
    narrow.config = config
    narrow.__dict__.pop("_skeleton", None)  # cached, with the uncut windows
    runner, hidden = BlockRunner(narrow, torch.device("cpu"), 1), _make_hidden(config, length)
    calls = []
    for index in range(checkpoint.block_count):
        arguments = runner.prepare(narrow.build_block(index), hidden, make_block_cache(None))
        calls.append(arguments | {_INPUT: torch.zeros_like(hidden)})
    return calls


def _make_hidden(config: PreTrainedConfig, length: int) -> torch.Tensor:
    return torch.linspace(1, 2, length * config.hidden_size).view(1, length, config.hidden_size)


def _compare(config: PreTrainedConfig, walk: Calls, model: Calls, masks_only: bool) -> None:
    if len(walk) != len(model):
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: transformers runs {len(model)} layers for num_hidden_layers={len(walk)}"
            ". Models that repeat or skip layers are not supported."
        )
    for index, (ours, theirs) in enumerate(zip(walk, model, strict=True)):
        length = ours[_INPUT].shape[1]
        problem = f"model_type={config.model_type!r}: layer {index} "
        reads = _visible(ours.get("attention_mask"), length)
        expected = _visible(theirs.get("attention_mask"), length)
        if not torch.equal(reads, expected):
            counts = [int(mask[-1].sum()) for mask in (expected, reads)]
            raise UnsupportedModelError(
                f"{problem}has another attention mask: in a text of {length} tokens and with windows of at most "
                f"{_WINDOW}, its last token reads {counts[0]} positions in transformers, and {counts[1]} here. See "
                "find_sliding_window in pipeline/models/architectures.py."
            )
        if masks_only:
            continue
        names = theirs.keys() - ours.keys() - _WITHOUT_EFFECT
        if theirs.get("is_causal") is True:  # as the walk's attention always is
            names.discard("is_causal")
        if names:
            raise UnsupportedModelError(
                f"{problem}gets {', '.join(sorted(names))} from transformers' model, which the walk does not compute. "
                "This family is not supported."
            )
        for name, meaning in (
            (_INPUT, "hidden states. The model changes them between its embedding and its layers"),
            ("position_ids", "positions"),
            ("position_embeddings", "tables of RoPE (see BlockRunner.tables_at)"),
        ):
            if name in theirs and not _agree(ours[name], theirs[name]):
                raise UnsupportedModelError(f"{problem}gets other {meaning}. This family is not supported.")


def _visible(mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """Return which positions each position reads, [T, T] bool, from a mask of any attention function."""
    if mask is None:
        return torch.ones(length, length, dtype=torch.bool).tril()
    mask = mask[0, 0] if mask.dim() == 4 else mask
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _agree(ours: Any, theirs: Any) -> bool:
    """Return whether two tensors, or tuples of tensors, agree."""
    if isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), atol=1e-6)
    if isinstance(theirs, tuple) and isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(map(_agree, ours, theirs))
    return False

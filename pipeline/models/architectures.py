"""The differences between model families, as data.

A family can be listed if its decoder layers have the shape of Llama's: separate q, k and v projections, a gated MLP,
and RMSNorms before attention and MLP, after them, or both. Names are as in the checkpoint.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.models.sites import Site
from pipeline.runtime.errors import PipelineError


@dataclass(frozen=True)
class Architecture:
    """Names inside one decoder layer, grouped by their role in rotation and quantization.

    Attributes:
        attention_readers, mlp_readers: the linears that read the input of attention and of the MLP.
        attention_norm, mlp_norm: the norms before these linears; None if they read the residual stream directly.
        post_norms: norms between the outputs of attention and MLP and the residual stream. Their weights prevent R1
            from being merged, so in such models R1 is online or the identity.
        attention, mlp: the modules.
        attention_output, mlp_output: the linears that write to the residual stream, or to a post-norm.
        value: the linear whose output R2 rotates, head by head.
        kernel: transformers' attention implementation; eager if scores are capped, which the others cannot do.
        heads_first: whether k_norm reads keys as [B, heads, T, d] and not as [B, T, …].
        norm_offset: a constant that norms add to their weight before they multiply by it (1 in Gemma).
        nope_without_window: whether layers without a sliding window have no RoPE, where others have a window.
        slides_throughout: whether `sliding_window` applies to all blocks, and not only to those in config.layer_types.
        block_prefix, embedding, final_norm, lm_head: names in the checkpoint.
    """

    attention_readers: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp_readers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    post_norms: tuple[str, ...] = ()
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_output: str = "self_attn.o_proj"
    mlp_output: str = "mlp.down_proj"
    value: str = "self_attn.v_proj"
    kernel: str = "sdpa"
    heads_first: bool = False
    norm_offset: float = 0.0
    slides_throughout: bool = False
    nope_without_window: bool = False
    block_prefix: str = "model.layers.{index}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"

    @property
    def linears(self) -> tuple[str, ...]:
        """The quantized linears of a block, in the order data flows through them."""
        return tuple(name for readers in self.site_readers.values() for name in readers)

    @property
    def linear_names(self) -> dict[str, str]:
        """Short name, as in params and reports -> name in the block: {"q_proj": "self_attn.q_proj", …}."""
        return {name.rpartition(".")[2]: name for name in self.linears}

    @property
    def site_readers(self) -> dict[str, tuple[str, ...]]:
        """Site of an input -> the linears that read it, in the order data flows through them."""
        return {
            Site.ATTENTION_INPUT: self.attention_readers,
            Site.ATTENTION_OUTPUT: (self.attention_output,),
            Site.MLP_INPUT: self.mlp_readers,
            Site.MLP_HIDDEN: (self.mlp_output,),
        }

    def site_widths(self, block: Any) -> dict[str, int]:
        """Return the size of the last dimension at every site and linear of a plain decoder layer.

        A group size must divide it.
        """
        linears = self.linear_names | {site: readers[0] for site, readers in self.site_readers.items()}
        widths = {site: block.get_submodule(name).in_features for site, name in linears.items()}
        return widths | {Site.KEY: block.self_attn.head_dim, Site.VALUE: block.self_attn.head_dim}

    def tensor_prefix(self, index: int) -> str:
        """Return the prefix of the names of block `index` in the checkpoint: "model.layers.3."."""
        return self.block_prefix.format(index=index)

    @property
    def norms(self) -> dict[str, tuple[str, ...]]:
        """Each norm before linears -> the linears that read its output."""
        pairs = ((self.attention_norm, self.attention_readers), (self.mlp_norm, self.mlp_readers))
        return {norm: readers for norm, readers in pairs if norm is not None}

    @property
    def rotates_residual(self) -> bool:
        """Whether R1 can be merged into the weights."""
        return not self.post_norms

    def input_norm(self, site: str) -> str | None:
        """Return the name of the norm that writes `attention_input` or `mlp_input`, or None."""
        norms: dict[str, str | None] = {Site.ATTENTION_INPUT: self.attention_norm, Site.MLP_INPUT: self.mlp_norm}
        return norms[site]

    def input_module(self, block: nn.Module, site: str) -> nn.Module:
        """Return the norm that writes `attention_input` or `mlp_input`, or else the module that reads it."""
        readers: dict[str, str] = {Site.ATTENTION_INPUT: self.attention, Site.MLP_INPUT: self.mlp}
        return block.get_submodule(self.input_norm(site) or readers[site])

    def watch_input_(
        self, block: nn.Module, site: str, replace: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    ) -> None:
        """Hook `attention_input` or `mlp_input`: its readers get replace(input_module, x) in place of x."""
        module = self.input_module(block, site)
        if self.input_norm(site) is not None:
            module.register_forward_hook(functools.partial(_replace_output, replace))
        else:
            module.register_forward_pre_hook(functools.partial(_replace_input, replace), with_kwargs=True)


# Hooks are functions of a module, because a pickled model refers to them by name.
def _replace_output(
    replace: Callable[..., torch.Tensor], module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
) -> torch.Tensor:
    return replace(module, output)


def _replace_input(
    replace: Callable[..., torch.Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (replace(module, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": replace(module, kwargs["hidden_states"])}


# Arguments that transformers passes to an attention function, and that masks, caches and kernels account for.
_ATTENTION_ARGUMENTS = {
    "scaling",
    "dropout",
    "softcap",
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
    "is_causal",
    "output_attentions",
    "attention_mask",
}

_LLAMA = Architecture()
_POST = ("post_attention_layernorm", "post_feedforward_layernorm")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": Architecture(slides_throughout=True),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": Architecture(mlp_norm="pre_feedforward_layernorm", post_norms=_POST, kernel="eager", norm_offset=1.0),
    "gemma3_text": Architecture(
        mlp_norm="pre_feedforward_layernorm", post_norms=_POST, heads_first=True, norm_offset=1.0
    ),
    "olmo2": Architecture(attention_norm=None, mlp_norm=None, post_norms=_POST),
    "olmo3": Architecture(attention_norm=None, mlp_norm=None, post_norms=_POST),
    "exaone4": Architecture(
        attention_norm=None, mlp_norm=None, post_norms=_POST, heads_first=True, nope_without_window=True
    ),
    "seed_oss": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": Architecture(slides_throughout=True),
    "smollm3": _LLAMA,
    "cwm": _LLAMA,
    "gemma": Architecture(norm_offset=1.0),
    "vaultgemma": Architecture(mlp_norm="pre_feedforward_layernorm", kernel="eager", norm_offset=1.0),
}
# Imported as another family that computes the same (importing/fused_projections.py).
IMPORTED_AS = {"phi3": "mistral"}


class UnsupportedModelError(PipelineError):
    """The model's family, or a setting in its config, is not supported. The message lists the supported ones."""


def find_architecture(config: Any) -> Architecture:
    """Return the architecture of a transformers config.

    Raises:
        UnsupportedModelError: the family is not supported. The message lists those that are.
    """
    family = IMPORTED_AS.get(config.model_type, config.model_type)
    if family not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES | IMPORTED_AS))
        raise UnsupportedModelError(f"model_type={config.model_type!r} is not supported; supported are: {supported}")
    return ARCHITECTURES[family]


def find_logit_cap(config: Any) -> float | None:
    """Return the bound of a model's soft cap on its logits (cap tanh(z / cap)), or None."""
    return getattr(config, "final_logit_softcapping", None)


def find_sliding_window(config: Any, block: nn.Module) -> int | None:
    """Return how many positions a position of a decoder layer attends to, itself included; None: all before it."""
    if find_architecture(config).slides_throughout:
        return config.sliding_window
    attention = block.self_attn
    return getattr(attention, "sliding_window", None) if getattr(attention, "is_sliding", True) else None


def uses_rope(config: Any, block: nn.Module) -> bool:
    """Return whether a decoder layer turns its queries and keys by RoPE. Some families leave it out in some layers."""
    attention = block.self_attn
    if find_architecture(config).nope_without_window:
        return config.sliding_window is None or find_sliding_window(config, block) is not None
    return bool(getattr(attention, "use_rope", True))


def find_narrowest_window(config: Any, blocks: Iterable[nn.Module]) -> int | None:
    """Return the smallest sliding window of a model's decoder layers; None: no layer slides."""
    windows = (find_sliding_window(config, block) for block in blocks)
    return min((window for window in windows if window is not None), default=None)


def find_widest_window(config: Any, blocks: Iterable[nn.Module]) -> int | None:
    """Return the largest sliding window of a model's decoder layers; None: no layer slides."""
    windows = (find_sliding_window(config, block) for block in blocks)
    return max((window for window in windows if window is not None), default=None)


def check_attention_arguments(arguments: Mapping[str, object]) -> None:
    """Check the keyword arguments of an attention function that does not compute all that transformers may pass.

    Raises:
        UnsupportedModelError: one would have an effect, such as `s_aux`, the learned sinks of some families.
    """
    unknown = sorted(
        name for name, value in arguments.items() if value is not None and name not in _ATTENTION_ARGUMENTS
    )
    if unknown:
        raise UnsupportedModelError(
            f"attention gets {', '.join(unknown)}, which is not supported: the results would silently lack it (s_aux "
            "are learned attention sinks)"
        )


def find_rope_limit(config: Any) -> int | None:
    """Return the text length at which a model's RoPE changes its frequencies (LongRoPE and dynamic RoPE), or None.

    A text must not exceed it. Otherwise the keys in a cache, also the prefix's, would keep the old frequencies.
    """
    nested = [value for value in config.rope_parameters.values() if isinstance(value, dict)]
    for rope in nested or [config.rope_parameters]:
        if rope.get("rope_type") == "longrope":
            return rope["original_max_position_embeddings"]
        if rope.get("rope_type") == "dynamic":
            return config.max_position_embeddings
    return None


def find_max_positions(config: Any) -> int:
    """Return the longest text that a model can read, prefix included."""
    limit = find_rope_limit(config)
    return config.max_position_embeddings if limit is None else min(limit, config.max_position_embeddings)


def check_rope(config: Any, positions: int) -> None:
    """Check that a text of this many positions, prefix included, stays within `find_rope_limit`.

    Raises:
        UnsupportedModelError: it does not.
    """
    limit = find_rope_limit(config)
    if limit is not None and positions > limit:
        raise UnsupportedModelError(
            f"{positions} positions (prefix + window) exceed {limit}, beyond which this model's RoPE changes its "
            "frequencies. Keys in a cache, those of the prefix too, would keep the old ones. Use windows of at most "
            f"{limit} tokens less the prefix"
        )


def check_window(config: Any, positions: int) -> None:
    """Check that windows stay within the positions of a model, and within `find_rope_limit`.

    Args:
        config: a transformers config.
        positions: prefix tokens + window length.

    Raises:
        UnsupportedModelError: they do not.
    """
    if positions > config.max_position_embeddings:
        raise UnsupportedModelError(
            f"{positions} positions (prefix + window) exceed max_position_embeddings={config.max_position_embeddings}"
            " of this model. Use shorter windows"
        )
    check_rope(config, positions)

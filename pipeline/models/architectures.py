"""What differs between model families, as data.

A family is listed when its decoder layers have the Llama shape: separate q/k/v projections, a gated MLP, RMSNorm before
both, behind both, or both. Names below are those of the checkpoint's tensors.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.models.sites import Site
from pipeline.runtime.errors import PipelineError


@dataclass(frozen=True)
class Architecture:
    """Names inside one decoder layer, grouped by what rotation and quantization do with them.

    Attributes:
        attention_readers, mlp_readers: the linears that read what attention and the MLP begin with.
        attention_norm, mlp_norm: the norms in front of them; None where they read the residual stream itself.
        post_norms: norms between what attention and the MLP give and the residual stream. Their weights stand in the
            way of R1: such models are rotated by R2, R3 and R4 only, and no norm is folded.
        attention, mlp: the modules.
        attention_output, mlp_output: the linears that write to the residual stream, or to a post-norm.
        value: the linear whose per-head output R2 rotates.
        kernel: transformers' attention implementation; eager where scores are capped, which the others do not do.
        heads_first: k_norm sees keys [B, heads, T, d], not [B, T, …].
        norm_offset: what norms add to their weight before they multiply by it (1 in Gemma).
        slides_throughout: `sliding_window` counts in every block, not in those of config.layer_types alone.
        block_prefix, embedding, final_norm, lm_head: where things are in the checkpoint.
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
    block_prefix: str = "model.layers.{index}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"

    @property
    def linears(self) -> tuple[str, ...]:
        """The quantized linears of a block, in the order data flows through them."""
        return tuple(name for readers in self.site_readers.values() for name in readers)

    @property
    def linear_sites(self) -> dict[str, str]:
        """Short name, as in params and reports -> linear: {"q_proj": "self_attn.q_proj", …}."""
        return {name.rpartition(".")[2]: name for name in self.linears}

    @property
    def site_readers(self) -> dict[str, tuple[str, ...]]:
        """Activation site -> the linears that read it, in the order data flows through them."""
        return {
            Site.ATTENTION_INPUT: self.attention_readers,
            Site.ATTENTION_OUTPUT: (self.attention_output,),
            Site.MLP_INPUT: self.mlp_readers,
            Site.MLP_HIDDEN: (self.mlp_output,),
        }

    def site_widths(self, block: Any) -> dict[str, int]:
        """Size of the last dimension at every site of a plain decoder layer: what a group size must divide."""
        linears = self.linear_sites | {site: readers[0] for site, readers in self.site_readers.items()}
        widths = {site: block.get_submodule(name).in_features for site, name in linears.items()}
        return widths | {Site.KEY: block.self_attn.head_dim, Site.VALUE: block.self_attn.head_dim}

    def tensor_prefix(self, index: int) -> str:
        """What the names of block `index` begin with in the checkpoint: "model.layers.3."."""
        return self.block_prefix.format(index=index)

    @property
    def norms(self) -> dict[str, tuple[str, ...]]:
        """Each norm in front of linears -> the linears that read its output."""
        pairs = ((self.attention_norm, self.attention_readers), (self.mlp_norm, self.mlp_readers))
        return {norm: readers for norm, readers in pairs if norm is not None}

    @property
    def rotates_residual(self) -> bool:
        """Whether R1 can be merged."""
        return not self.post_norms

    def input_norm(self, site: str) -> str | None:
        """The norm that writes `attention_input` or `mlp_input`, if there is one."""
        return {Site.ATTENTION_INPUT: self.attention_norm, Site.MLP_INPUT: self.mlp_norm}[site]

    def input_module(self, block: nn.Module, site: str) -> nn.Module:
        """Where `attention_input` or `mlp_input` is watched: the norm that writes it, or the module that reads it."""
        reader = {Site.ATTENTION_INPUT: self.attention, Site.MLP_INPUT: self.mlp}[site]
        return block.get_submodule(self.input_norm(site) or reader)

    def watch_input_(self, block: nn.Module, site: str, see: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        """Let readers of `attention_input` or `mlp_input` get see(input_module, x) in place of x."""
        module = self.input_module(block, site)
        if self.input_norm(site) is not None:
            module.register_forward_hook(functools.partial(_replace_output, see))
        else:
            module.register_forward_pre_hook(functools.partial(_replace_input, see), with_kwargs=True)


# Functions of the module, as are all hooks of a model: what is pickled with it must be found again by name.
def _replace_output(see: Callable[..., torch.Tensor], module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
    return see(module, output)


def _replace_input(
    see: Callable[..., torch.Tensor], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (see(module, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": see(module, kwargs["hidden_states"])}


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
}
# Imported as another family that computes the same, see fused_projections.py.
IMPORTED_AS = {"phi3": "mistral"}


class UnsupportedModelError(PipelineError):
    """The model's family or a setting in its config is not supported; the message lists what is."""


def find_architecture(config: Any) -> Architecture:
    """The architecture of a transformers config. Raises UnsupportedModelError, naming the supported families."""
    family = IMPORTED_AS.get(config.model_type, config.model_type)
    if family not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES | IMPORTED_AS))
        raise UnsupportedModelError(f"model_type={config.model_type!r} is not supported; supported are: {supported}")
    return ARCHITECTURES[family]


def find_logit_cap(config: Any) -> float | None:
    """What the model's logits are softly kept within, or None."""
    return getattr(config, "final_logit_softcapping", None)


def find_sliding_window(config: Any, block: nn.Module) -> int | None:
    """How many positions of text, its own included, a position sees in a decoder layer; None: all of them."""
    if find_architecture(config).slides_throughout:
        return config.sliding_window
    return getattr(block.self_attn, "sliding_window", None)


def find_narrowest_window(config: Any, blocks: Iterable[nn.Module]) -> int | None:
    """The least `find_sliding_window` of a model's decoder layers; None: none of them slides."""
    windows = (find_sliding_window(config, block) for block in blocks)
    return min((window for window in windows if window is not None), default=None)


def find_rope_limit(config: Any) -> int | None:
    """How many positions RoPE turns in one way; LongRoPE and dynamic RoPE turn longer texts in another. None: no limit.

    Keys in a cache, the prefix's among them, stay turned as they were, so a text must stay within.
    """
    nested = [value for value in config.rope_parameters.values() if isinstance(value, dict)]
    for rope in nested or [config.rope_parameters]:
        if rope.get("rope_type") == "longrope":
            return rope["original_max_position_embeddings"]
        if rope.get("rope_type") == "dynamic":
            return config.max_position_embeddings
    return None


def find_max_positions(config: Any) -> int:
    """The longest text, prefix included."""
    limit = find_rope_limit(config)
    return config.max_position_embeddings if limit is None else min(limit, config.max_position_embeddings)


def check_rope(config: Any, positions: int) -> None:
    """Refuse a text that goes beyond `find_rope_limit`, prefix included."""
    limit = find_rope_limit(config)
    if limit is not None and positions > limit:
        raise UnsupportedModelError(
            f"{positions} positions (prefix + window) exceed {limit}, beyond which this model's RoPE turns all of them "
            "in another way, and keys in a cache, the prefix's among them, would keep the old one; use windows of at "
            f"most {limit} tokens less the prefix"
        )


def check_window(config: Any, positions: int) -> None:
    """Refuse windows that go beyond the position range, prefix included.

    Args:
        config: a transformers config.
        positions: prefix tokens + window length.
    """
    if positions > config.max_position_embeddings:
        raise UnsupportedModelError(
            f"{positions} positions (prefix + window) exceed max_position_embeddings={config.max_position_embeddings}"
            " of this model; use shorter windows"
        )
    check_rope(config, positions)

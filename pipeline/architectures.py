"""What differs between model families, as data.

A family is listed when its decoder layers have the Llama shape: RMSNorm before attention and before the MLP, separate
q/k/v projections, a gated MLP. Names below are those of the checkpoint's tensors.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Architecture:
    """Names inside one decoder layer, grouped by what rotation and quantization do with them.

    Attributes:
        norms: each norm -> the linears that read its output (its weight is folded into them).
        attention_output, mlp_output: the linears that write to the residual stream.
        value: the linear whose per-head output R2 rotates.
        block_prefix, embedding, final_norm, lm_head: where things are in the checkpoint.
    """

    norms: dict[str, tuple[str, ...]]
    attention_output: str = "self_attn.o_proj"
    mlp_output: str = "mlp.down_proj"
    value: str = "self_attn.v_proj"
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
        attention, mlp = self.norms.values()
        return {
            "attention_input": attention,
            "attention_output": (self.attention_output,),
            "mlp_input": mlp,
            "mlp_hidden": (self.mlp_output,),
        }

    def site_widths(self, block: Any) -> dict[str, int]:
        """Size of the last dimension at every site of a plain decoder layer: what a group size must divide."""
        linears = self.linear_sites | {site: readers[0] for site, readers in self.site_readers.items()}
        widths = {site: block.get_submodule(name).in_features for site, name in linears.items()}
        return widths | {"key": block.self_attn.head_dim, "value": block.self_attn.head_dim}

    def tensor_prefix(self, index: int) -> str:
        """What the names of block `index` begin with in the checkpoint: "model.layers.3."."""
        return self.block_prefix.format(index=index)

    @property
    def attention_norm(self) -> str:
        return next(iter(self.norms))

    @property
    def mlp_norm(self) -> str:
        return list(self.norms)[1]


_LLAMA = Architecture(
    norms={
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
)

ARCHITECTURES: dict[str, Architecture] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}
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


def check_window(config: Any, positions: int) -> None:
    """Refuse windows that a sliding attention window or the position range would cut, prefix included.

    Args:
        config: a transformers config.
        positions: prefix tokens + window length.
    """
    layer_types = getattr(config, "layer_types", None) or []
    sliding = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layer_types or (not layer_types and sliding)
    if slides and positions > sliding:
        raise UnsupportedModelError(
            f"{positions} positions (prefix + window) exceed sliding_window={sliding} of this model, and the prefix "
            f"would slide out of sight; use windows of at most {sliding} tokens less the prefix"
        )
    if positions > config.max_position_embeddings:
        raise UnsupportedModelError(
            f"{positions} positions (prefix + window) exceed max_position_embeddings={config.max_position_embeddings}"
            " of this model; use shorter windows"
        )

"""Types of the modules of transformers' decoder layers, which torch knows as `Tensor | Module` only.

These classes are annotations: no object is an instance of them.
"""

from typing import Protocol, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Norm(nn.Module):
    """An RMSNorm. A family has either `eps` or `variance_epsilon`."""

    weight: nn.Parameter
    eps: float
    variance_epsilon: float


class Attention(nn.Module):
    """The attention of a decoder layer. Norms of queries and keys have names of their own (`Architecture.key_norm`)."""

    config: PretrainedConfig
    head_dim: int
    layer_idx: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


class DecoderLayer(nn.Module):
    """A decoder layer, in every supported family."""

    self_attn: Attention
    mlp: nn.Module


class Generates(Protocol):
    """A model that generates text. transformers types it as two classes, neither of which has all methods."""

    def generate(self, inputs: torch.Tensor | None = None, **options: object) -> object:
        """Return token ids [B, T], or more if that is asked for."""
        ...


class Movable(Protocol):
    """A model whose `to` transformers wraps in a way that loses its type."""

    def to(self, target: torch.device | torch.dtype | str, /) -> object:
        """Move or cast the model in place."""
        ...


def as_decoder_layer(module: nn.Module) -> DecoderLayer:
    """Return a module as the decoder layer that it is.

    Raises:
        TypeError: it has no `self_attn` or no `mlp`.
    """
    missing = [name for name in ("self_attn", "mlp") if not hasattr(module, name)]
    if missing:
        raise TypeError(f"{type(module).__name__} is not a decoder layer: it has no {' and no '.join(missing)}")
    return cast(DecoderLayer, module)


class Body(nn.Module):
    """A causal language model without its head, in every supported family."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: Norm
    rotary_emb: nn.Module


class CausalModel(PreTrainedModel):
    """A causal language model of every supported family."""

    model: Body
    lm_head: nn.Linear


def as_causal_model(module: nn.Module) -> CausalModel:
    """Return a module as the causal language model that it is.

    Raises:
        TypeError: it has no `model` or no `lm_head`.
    """
    missing = [name for name in ("model", "lm_head") if not hasattr(module, name)]
    if missing:
        raise TypeError(f"{type(module).__name__} is not a causal model: it has no {' and no '.join(missing)}")
    return cast(CausalModel, module)


def list_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """Return the decoder layers of a model, with or without its head, in order."""
    return [as_decoder_layer(layer) for layer in model.base_model.get_submodule("layers").children()]


def as_norm(module: nn.Module) -> Norm:
    """Return a module as the RMSNorm that it is.

    Raises:
        TypeError: it has no weight.
    """
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise TypeError(f"{type(module).__name__} is not an RMSNorm: it has no weight")
    return cast(Norm, module)


def find_linear(module: nn.Module, name: str) -> nn.Linear:
    """Return a plain linear inside a module.

    Raises:
        TypeError: there is another module of that name.
    """
    linear = module.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, not a linear")
    return linear


def read_input_width(module: nn.Module, name: str) -> int:
    """Return `in_features` of a linear inside a module, plain or with quantizers.

    Raises:
        TypeError: there is another module of that name.
    """
    linear = module.get_submodule(name)
    width = getattr(linear, "in_features", None)
    if not isinstance(width, int):
        raise TypeError(f"{name} is a {type(linear).__name__}, not a linear")
    return width

"""Hooks on the sites of the original model's blocks.

A hook gets the values at a site and returns the values that the block goes on with. The block is a plain decoder layer,
so the values include the norm weights and are not rotated:

    attention_input, attention_output, mlp_input, mlp_hidden   [B, T, C]
    key (before RoPE), value                                   [B, heads, T, d]
    o_proj, which is not a quantized site: the output of o_proj   [B, T, D]
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from pipeline.blocks.kv_cache import hook_keys_, quantize_cache_
from pipeline.models.architectures import Architecture
from pipeline.models.sites import RESIDUAL_SITES, Site

ATTENTION_RESULT = "o_proj"

Hook = Callable[[str, torch.Tensor], torch.Tensor]  # (site, values) -> values that the block goes on with


def hook_sites_(block: nn.Module, architecture: Architecture, sites: Iterable[str], hook: Hook) -> None:
    """Replace the values x at each of the `sites` by hook(site, x) whenever the block runs.

    Args:
        block: a decoder layer without quantizers.
    """
    for site in sites:
        if site in RESIDUAL_SITES:
            architecture.watch_input_(block, site, _drop_module(hook, site))
        elif site == Site.ATTENTION_OUTPUT:
            _hook_input_(block.get_submodule(architecture.attention_output), site, hook)
        elif site == Site.MLP_HIDDEN:
            _hook_input_(block.get_submodule(architecture.mlp_output), site, hook)
        elif site == Site.KEY:
            hook_keys_(block.self_attn, architecture.heads_first, functools.partial(hook, Site.KEY))
        elif site == Site.VALUE:
            _hook_values_(block.self_attn, hook)
        elif site == ATTENTION_RESULT:
            _hook_output_(block.get_submodule(architecture.attention_output), site, hook)
        else:
            raise ValueError(f"{site} is not a site")


def _drop_module(hook: Hook, site: str) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return lambda module, x: hook(site, x)


def _hook_input_(module: nn.Module, site: str, hook: Hook) -> None:
    module.register_forward_pre_hook(lambda module, args: (hook(site, args[0]),))


def _hook_output_(module: nn.Module, site: str, hook: Hook) -> None:
    module.register_forward_hook(lambda module, args, output: hook(site, output))


def _hook_values_(attention: nn.Module, hook: Hook) -> None:
    """Hook the values on their way to the cache."""
    attention.value_quantizer = _ValueHook(hook)
    quantize_cache_(attention)


class _ValueHook(nn.Module):
    """Takes the place of a block's quantizer of values."""

    def __init__(self, hook: Hook) -> None:
        super().__init__()
        self.hook = hook

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hook(Site.VALUE, x)

"""What passes the sites of a block, shown to whoever watches, who says what goes on in its place.

All sites as the original model has them, norm weights included, no rotation: attention_input, attention_output,
mlp_input, mlp_hidden [B, T, C]; o_proj [B, T, D], its output; key (before RoPE) and value [B, heads, T, d].
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pipeline.blocks.kv_cache import quantize_cache_
from pipeline.models.architectures import Architecture
from pipeline.models.sites import Site

See = Callable[[str, torch.Tensor], torch.Tensor]


def watch_sites_(block: nn.Module, architecture: Architecture, sites: Iterable[str], see: See) -> None:
    """Put see(site, x) in the place of x at the `sites` of a plain decoder layer, whenever it runs from now on."""

    def watch_input(site: str, name: str) -> None:
        block.get_submodule(name).register_forward_pre_hook(lambda module, args: (see(site, args[0]),))

    def watch_input_module(site: str) -> None:
        architecture.watch_input_(block, site, lambda module, x: see(site, x))

    def watch_output(site: str, name: str) -> None:
        block.get_submodule(name).register_forward_hook(lambda module, args, output: see(site, output))

    hang: dict[str, Callable[[str], Any]] = {
        Site.ATTENTION_INPUT: watch_input_module,
        Site.KEY: lambda site: _watch_keys_(block.self_attn, architecture.heads_first, see),
        Site.VALUE: lambda site: _watch_values_(block.self_attn, _CacheSite(see, site)),
        Site.ATTENTION_OUTPUT: lambda site: watch_input(site, architecture.attention_output),
        "o_proj": lambda site: watch_output(site, architecture.attention_output),
        Site.MLP_INPUT: watch_input_module,
        Site.MLP_HIDDEN: lambda site: watch_input(site, architecture.mlp_output),
    }
    for site in sites:
        hang[site](site)


def _watch_keys_(attention: nn.Module, heads_first: bool, see: See) -> None:
    """Show what RoPE turns: the output of k_norm where the family has one, of k_proj otherwise."""

    head_dim = attention.head_dim  # a hook that held the block would keep it until the garbage collector comes by

    def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if heads_first:
            return see(Site.KEY, output)
        keys = output.view(*output.shape[:2], -1, head_dim).transpose(1, 2)
        return see(Site.KEY, keys).transpose(1, 2).reshape(output.shape)

    source = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
    source.register_forward_hook(replace)


def _watch_values_(attention: nn.Module, site: "_CacheSite") -> None:
    attention.value_quantizer = site
    quantize_cache_(attention)


class _CacheSite(nn.Module):
    """Takes the place of a block's quantizer of values, and shows them to `see`."""

    def __init__(self, see: See, site: str) -> None:
        super().__init__()
        self.see, self.site = see, site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.see(self.site, x)

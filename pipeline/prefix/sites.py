"""Hooks on the sites of the original model's blocks.

A hook gets the values at a site and returns the values that the block goes on with. The block is a plain decoder layer,
so the values include the norm weights and are not rotated:

    attention_input, attention_output, mlp_input, mlp_hidden   [B, T, C]; mlp_input of experts: [B T, C]
    mlp_hidden.experts.N, in place of mlp_hidden                [1, n, C], the n tokens of an expert
    key (before RoPE), value                                   [B, heads, T, d]
    o_proj, which is not a quantized site: the output of o_proj   [B, T, D]
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from pipeline.blocks.kv_cache import hook_keys_, quantize_cache_
from pipeline.models.architectures import Architecture
from pipeline.models.experts import RoutedExperts
from pipeline.models.layers import Attention, DecoderLayer
from pipeline.models.sites import RESIDUAL_SITES, Site
from pipeline.prefix.outliers import token_maxima

ATTENTION_RESULT = "o_proj"

Hook = Callable[[str, torch.Tensor], torch.Tensor]  # (site, values) -> values that the block goes on with


def hook_sites_(block: DecoderLayer, architecture: Architecture, sites: Iterable[str], hook: Hook) -> None:
    """Replace the values x at each of the `sites` by hook(site, x) whenever the block runs.

    Args:
        block: a decoder layer without quantizers.
    """
    architecture = architecture.of_block(block)
    for site in sites:
        if site in RESIDUAL_SITES:
            architecture.watch_input_(block, site, _drop_module(hook, site))
        elif site == Site.ATTENTION_OUTPUT:
            _hook_input_(block.get_submodule(architecture.attention_output), site, hook)
        elif site == Site.MLP_HIDDEN and architecture.experts is not None:
            for expert_site, (_, _, down) in architecture.mlps.items():
                _hook_input_(block.get_submodule(down), expert_site, _add_batch(hook))
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


def watch_token_maxima_(block: nn.Module, architecture: Architecture, collect: Callable[[torch.Tensor], None]) -> None:
    """Call collect(maxima [B, T]) whenever the block runs: max |x| of each token at the input of down_proj.

    With experts, the maximum is over all experts that a token passes. In a rotated block, x is taken after R4.
    """
    architecture = architecture.of_block(block)
    if architecture.experts is None:
        down = block.get_submodule(architecture.mlp_output)
        source = getattr(down, "input_quantizer", None) or down
        source.register_forward_pre_hook(lambda module, args: collect(token_maxima(args[0])))
        return
    maxima, shape = torch.zeros(0), torch.Size()
    tokens: torch.Tensor | slice = slice(None)

    def begin(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal maxima, shape, tokens
        shape = args[0].shape[:2]
        maxima, tokens = args[0].new_zeros(shape.numel(), dtype=torch.float32), slice(None)

    def locate(index: int, expert_tokens: torch.Tensor, inner: torch.Tensor) -> None:
        nonlocal tokens
        tokens = expert_tokens

    def raise_maxima(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        maxima[tokens] = torch.maximum(maxima[tokens], token_maxima(args[0]))

    def end(module: nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
        collect(maxima.view(shape))

    mlp = block.get_submodule(architecture.mlp)
    mlp.register_forward_pre_hook(begin)
    mlp.register_forward_hook(end)
    experts = block.get_submodule(architecture.experts)
    assert isinstance(experts, RoutedExperts)
    experts.watchers.append(locate)
    for _, _, name in architecture.mlps.values():
        down = block.get_submodule(name)
        source = getattr(down, "input_quantizer", None) or down
        source.register_forward_pre_hook(raise_maxima)


def watch_expert_peaks_(block: nn.Module, architecture: Architecture, peaks: dict[str, float]) -> None:
    """Raise `peaks` to the largest |output| of each expert's down_proj whenever the block runs.

    Args:
        peaks: short name of an expert (experts.3, shared_expert) -> value. Dense blocks add nothing.
    """
    architecture = architecture.of_block(block)
    if architecture.experts is None:
        return
    for site, (_, _, down) in architecture.mlps.items():
        name = site.removeprefix(f"{Site.MLP_HIDDEN}.")
        peaks[name] = 0.0

        block.get_submodule(down).register_forward_hook(functools.partial(_raise_peak, peaks, name))


def _raise_peak(peaks: dict[str, float], name: str, module: nn.Module, args: object, output: torch.Tensor) -> None:
    peaks[name] = max(peaks[name], output.abs().max().item())


def _add_batch(hook: Hook) -> Hook:
    """Return a hook that passes tokens [n, C] on as [1, n, C]."""
    return lambda site, x: hook(site, x.unsqueeze(0)).squeeze(0)


def _drop_module(hook: Hook, site: str) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return lambda module, x: hook(site, x)


def _hook_input_(module: nn.Module, site: str, hook: Hook) -> None:
    module.register_forward_pre_hook(lambda module, args: (hook(site, args[0]),))


def _hook_output_(module: nn.Module, site: str, hook: Hook) -> None:
    def replace(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return hook(site, output)

    module.register_forward_hook(replace)


def _hook_values_(attention: Attention, hook: Hook) -> None:
    """Hook the values on their way to the cache."""
    attention.add_module("value_quantizer", _ValueHook(hook))
    quantize_cache_(attention)


class _ValueHook(nn.Module):
    """Takes the place of a block's quantizer of values."""

    def __init__(self, hook: Hook) -> None:
        super().__init__()
        self.hook = hook

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hook(Site.VALUE, x)

"""A mixture of experts in vLLM: transformers' own module of the exported block, with other modules for its experts.

    mlp                   transformers' forward: router, weights of the chosen experts, sum with the shared expert
    mlp.gate              as exported: it reads the norm's output, without R1 and quantizer
    mlp.experts           -> ServedExperts   quantizes the input once, and runs the experts that got tokens
    mlp.shared_expert     -> ServedShared    quantizes the same input for the shared expert

gate_proj and up_proj of an expert are one linear. With static ranges and one scale per channel, the experts gather
codes, and integers are multiplied. The tokens of each expert are chosen at run time, so `torch.compile` cannot read
this code: vLLM runs the whole module as one operator (mixture.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.blocks.quantized import find_site_quantizers
from pipeline.inference.packed_block import find_packed_linear, find_rotation, fits_integers
from pipeline.kernels.operands import IntegerOperands
from pipeline.models.architectures import Architecture, find_architecture
from pipeline.models.experts import RoutedExperts, group_tokens
from pipeline.models.layers import DecoderLayer
from pipeline.models.routing import is_correction_bias
from pipeline.models.sites import Site
from pipeline.serving.linear import ServedInput, ServedLinear, ServedWeights


@dataclass(frozen=True)
class Share:
    """The experts that one of several processes computes: every `processes`th one, from number `rank` on.

    The first process computes the shared expert too. The outputs of all processes add up to the mixture's.
    """

    rank: int = 0
    processes: int = 1

    def has(self, index: int) -> bool:
        """Return whether this process computes expert `index`."""
        return index % self.processes == self.rank


ALL = Share()


class ServedMlp(nn.Module):
    """Compute down_proj(combine(gate_proj(x), up_proj(x))), [n, D], from x [n, D] after a `ServedInput`."""

    def __init__(self, gate_up: ServedWeights, combine: nn.Module, down: ServedLinear) -> None:
        super().__init__()
        self.gate_up, self.combine, self.down = gate_up, combine, down

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(values).chunk(2, dim=-1)
        return self.down(self.combine(gate, up))


class ServedExperts(nn.Module):
    """Takes the place of `RoutedExperts`, with the same arguments: each expert runs on the tokens sent to it."""

    def __init__(self, source: ServedInput, mlps: dict[int, ServedMlp], count: int) -> None:
        """Take the experts that this process computes, by number, and the number of all experts."""
        super().__init__()
        self.source, self.count = source, count
        self.mlps = nn.ModuleDict({str(index): mlp for index, mlp in mlps.items()})

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output, values = torch.zeros_like(hidden_states), self.source(hidden_states)
        for index, tokens, places in group_tokens(top_k_index, self.count):
            if str(index) in self.mlps:
                y = self.mlps[str(index)](values[tokens]) * top_k_weights[tokens, places].unsqueeze(-1)
                output.index_add_(0, tokens, y.to(output.dtype))
        return output


class ServedShared(nn.Module):
    """Takes the place of the shared expert. In processes that do not compute it, the output is zero."""

    def __init__(self, source: ServedInput, mlp: ServedMlp | None) -> None:
        super().__init__()
        self.source, self.mlp = source, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) if self.mlp is None else self.mlp(self.source(x))


def has_experts(block: DecoderLayer) -> bool:
    """Return whether a loaded block of transformers has a mixture of experts."""
    return find_architecture(block.self_attn.config).of_block(block).experts is not None


def take_mixture(
    block: DecoderLayer,
    dtype: torch.dtype,
    make_product: Callable[[IntegerOperands, torch.dtype], nn.Module] | None,
    share: Share = ALL,
) -> nn.Module:
    """Return the mixture of a loaded block of transformers, with the modules above. The block loses it.

    Args:
        dtype: the dtype in which the model computes, on a CPU.
        make_product: builds a product of integers. None: weights are dequantized.
        share: the experts of this process.
    """
    architecture = find_architecture(block.self_attn.config).of_block(block)
    assert architecture.experts is not None
    experts = block.get_submodule(architecture.experts)
    assert isinstance(experts, RoutedExperts)
    quantizer = find_site_quantizers(block, architecture)[Site.MLP_INPUT]
    readers = [find_packed_linear(block, name) for name in architecture.mlp_readers]
    gathers_codes = make_product is not None and fits_integers(quantizer, readers)
    make_first = make_product if gathers_codes else None
    mlps: dict[str, ServedMlp] = {}
    for place, (site, (gate, up, _)) in enumerate(architecture.mlps.items()):
        is_shared = place == len(experts)
        if (is_shared and share.rank != 0) or (not is_shared and not share.has(place)):
            continue
        parts = [find_packed_linear(block, name) for name in (gate, up)]
        gate_up = ServedWeights(parts, quantizer, dtype=dtype, make_product=make_first)
        mlps[site] = ServedMlp(gate_up, experts.combine, _serve_down(block, architecture, site, dtype, make_product))
    rotate, block_size = find_rotation(block, architecture, Site.MLP_INPUT)
    width = readers[0].in_features
    source = ServedInput(quantizer, width, rotate=rotate, dtype=dtype, block_size=block_size)
    sites = list(architecture.mlps)
    routed = {index: mlps[sites[index]] for index in range(len(experts)) if sites[index] in mlps}
    block.set_submodule(architecture.experts, ServedExperts(source, routed, len(experts)))
    if architecture.shared_expert is not None:
        block.set_submodule(architecture.shared_expert, ServedShared(source, mlps.get(sites[-1])))
    mixture = block.get_submodule(architecture.mlp)
    block.set_submodule(architecture.mlp, nn.Identity())
    _own_router_(mixture, dtype)
    return mixture.eval()


def _serve_down(
    block: DecoderLayer,
    architecture: Architecture,
    site: str,
    dtype: torch.dtype,
    make_product: Callable[[IntegerOperands, torch.dtype], nn.Module] | None,
) -> ServedLinear:
    (name,) = architecture.site_readers[site]
    rotate, block_size = find_rotation(block, architecture, site)
    quantizer = find_site_quantizers(block, architecture)[site]
    part = find_packed_linear(block, name)
    return ServedLinear([part], quantizer, rotate=rotate, dtype=dtype, make_product=make_product, block_size=block_size)


def _own_router_(mixture: nn.Module, dtype: torch.dtype) -> None:
    """Copy the router's tensors, which are views of the mapped file, in the dtype that the model computes in."""
    served = (ServedExperts, ServedShared)
    inside = {id(part) for module in mixture.modules() if isinstance(module, served) for part in module.modules()}
    for module in mixture.modules():
        if id(module) in inside:
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            copy = tensor.detach().to(torch.float32 if is_correction_bias(name) else dtype, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(copy, requires_grad=False) if is_parameter else copy)

"""The place of a mixture of experts in vLLM's model, and the operator that computes it.

vLLM builds its own fused experts first. They get no weights (`NoWeights`), and model.py puts a `ServedMixture` into
their place. Compiled code calls the operator, which finds the module by the layer's name, as vLLM finds its attention.
"""

from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_OPERATORS = torch.library.Library("prefixquant", "FRAGMENT")
_OPERATORS.define("served_mixture(Tensor x, str name) -> Tensor")


class NoWeights(FusedMoEMethodBase):
    """The method of vLLM's own experts, which are never called."""

    def create_weights(self, layer: nn.Module, *sizes: Any, **options: Any) -> None:
        """Create nothing."""

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig | None:
        return None


class ServedMixture(nn.Module):
    """Computes a mixture of experts, [T, D] -> [T, D], by the module that `take` has put into it."""

    def __init__(self, name: str, processes: int) -> None:
        super().__init__()
        self.name, self.processes = name, processes
        self.mixture: nn.Module | None = None

    def take(self, mixture: nn.Module) -> None:
        """Compute by this module from now on. It reads and writes [B, T, D]."""
        self.mixture = mixture

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return this process's part of the output, [T, D]."""
        assert self.mixture is not None, "model.py fills every layer"
        return self.mixture(x.unsqueeze(0)).squeeze(0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = torch.ops.prefixquant.served_mixture(hidden_states, self.name)
        return tensor_model_parallel_all_reduce(output) if self.processes > 1 else output


def replace_mixture_(config: VllmConfig, layer: nn.Module, index: int) -> ServedMixture:
    """Put a `ServedMixture` into decoder layer `index` of vLLM, in place of its own mixture, which vLLM forgets."""
    child = "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"
    context, layers = config.compilation_config.static_forward_context, config.compilation_config.static_all_moe_layers
    for module in layer.get_submodule(child).modules():
        name = module.layer_name if isinstance(module, RoutedExperts) else None
        if name in layers and name is not None:
            layers.remove(name)
            del context[name]
    served = ServedMixture(f"prefixquant.layers.{index}.mixture", config.parallel_config.tensor_parallel_size)
    context[served.name] = served
    layer.set_submodule(child, served)
    return served


def _compute(x: torch.Tensor, name: str) -> torch.Tensor:
    return cast(ServedMixture, get_forward_context().no_compile_layers[name]).compute(x)


_OPERATORS.impl("served_mixture", _compute, "CPU")
torch.library.register_fake("prefixquant::served_mixture", lambda x, name: torch.empty_like(x), lib=_OPERATORS)

from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.quantization import QuantizeMethodBase

class FusedMoEMethodBase(QuantizeMethodBase):
    def __init__(self, moe: FusedMoEConfig) -> None: ...
    def create_weights(self, layer: nn.Module, *sizes: Any, **options: Any) -> None: ...
    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig | None: ...

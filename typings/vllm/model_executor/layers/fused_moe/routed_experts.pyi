from torch import nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

class RoutedExperts(nn.Module):
    layer_name: str
    moe_config: FusedMoEConfig

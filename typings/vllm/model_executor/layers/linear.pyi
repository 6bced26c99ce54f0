import torch
from torch import nn
from vllm.model_executor.layers.quantization import QuantizeMethodBase

class LinearMethodBase(QuantizeMethodBase):
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...

class LinearBase(nn.Module):
    input_size: int
    output_size: int
    quant_method: QuantizeMethodBase | None
    bias: torch.Tensor | None
    tp_size: int
    tp_rank: int

class RowParallelLinear(LinearBase): ...

class QKVParallelLinear(LinearBase):
    num_heads: int
    num_kv_heads: int
    num_kv_head_replicas: int
    head_size: int

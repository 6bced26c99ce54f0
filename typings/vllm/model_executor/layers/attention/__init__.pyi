import torch
from torch import nn
from vllm.v1.attention.backend import AttentionImpl

class Attention(nn.Module):
    impl: AttentionImpl
    layer_name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    sliding_window: int | None
    has_sink: bool
    attn_type: str
    kv_sharing_target_layer_name: str | None
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor: ...

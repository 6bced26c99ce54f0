from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig

class MiniMaxM2ForCausalLM(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None: ...
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]: ...

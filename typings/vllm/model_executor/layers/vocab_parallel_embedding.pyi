from typing import Any

from torch import nn

class ParallelLMHead(nn.Module):
    quant_method: Any
    tp_rank: int
    num_embeddings_per_partition: int

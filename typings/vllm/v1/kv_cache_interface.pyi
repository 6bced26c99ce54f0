import torch

class KVCacheSpec: ...

class AttentionSpec(KVCacheSpec):
    def __init__(
        self,
        *,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        state_content_bytes: int | None = None,
    ) -> None: ...

class FullAttentionSpec(AttentionSpec): ...

class SlidingWindowSpec(AttentionSpec):
    def __init__(
        self,
        *,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        sliding_window: int,
        state_content_bytes: int | None = None,
    ) -> None: ...

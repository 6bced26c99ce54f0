from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

class MultipleOf:
    def __init__(self, base: int) -> None: ...

class AttentionType:
    DECODER: str

class AttentionMetadata: ...

T = TypeVar("T", bound=AttentionMetadata)

@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    block_table_tensor: torch.Tensor

class AttentionMetadataBuilder(ABC, Generic[T]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None: ...

class AttentionImpl(ABC, Generic[T]):
    scale: float
    num_heads: int
    kv_cache_dtype: str

class AttentionBackend(ABC):
    forward_includes_kv_cache_update: bool
    supported_dtypes: ClassVar[list[torch.dtype]]
    supported_kv_cache_dtypes: ClassVar[list[str]]
    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]: ...
    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None: ...
    @staticmethod
    @abstractmethod
    def get_name() -> str: ...
    @classmethod
    def supports_sliding_window(cls) -> bool: ...
    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImpl]: ...
    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]: ...

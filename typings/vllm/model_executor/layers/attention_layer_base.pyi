from abc import ABC, abstractmethod

from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

class AttentionLayerBase(ABC):
    @abstractmethod
    def get_attn_backend(self) -> type[AttentionBackend]: ...
    @abstractmethod
    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None: ...

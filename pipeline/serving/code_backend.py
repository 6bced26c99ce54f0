"""vLLM's cache holds packed codes: a layer, an attention backend and a cache spec of this project's own.

    CodeLayer        vLLM's runner finds it by name in place of the layer's attention (`AttentionLayerBase`)
    .get_kv_cache_spec   FullAttentionSpec or SlidingWindowSpec with `state_content_bytes`: a head's key and value codes
    .get_attn_backend    CodeBackend, registered with `register_backend`
    CodeImpl         writes codes into pages, and attends over them (kernels/code_attention.py)

vLLM's own managers allocate the pages. Memory profiling, prefix caching, chunks, preemption and n > 1 therefore work as
for any model, with smaller pages. The prefix is not in the pages; its placeholders take up places that nothing reads.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from pipeline.kernels.code_attention import CodeAttention
from pipeline.serving.attention import PackedValues
from pipeline.serving.families import ServingError

BACKEND = "PREFIXQUANT"


class CodeBackend(AttentionBackend):
    """Attention over pages of codes, [pages, K, tokens, bytes]."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float32", "bfloat16"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type["CodeImpl"]:
        return CodeImpl

    @staticmethod
    def get_builder_cls() -> type["CodeMetadataBuilder"]:
        return CodeMetadataBuilder


@dataclass
class CodeMetadata(AttentionMetadata):
    """The texts of a batch.

    Attributes:
        tokens: number of queries, without padding.
        pages: int32 [texts, most pages].
        starts: int32 [texts + 1], the first query of each text.
        lengths: int32 [texts], positions of each text, those of its queries included.
    """

    tokens: int
    pages: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


class CodeMetadataBuilder(AttentionMetadataBuilder[CodeMetadata]):
    """Builds `CodeMetadata` from vLLM's."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CodeMetadata:
        common = common_attn_metadata
        return CodeMetadata(
            tokens=common.num_actual_tokens,
            pages=common.block_table_tensor[: common.num_reqs].contiguous(),
            starts=common.query_start_loc[: common.num_reqs + 1].contiguous(),
            lengths=common.seq_lens[: common.num_reqs].to(torch.int32).contiguous(),
        )


class CodeImpl(AttentionImpl[CodeMetadata]):
    """Writes codes to pages and attends over them."""

    kv_cache_dtype = "auto"

    def __init__(self, attention: CodeAttention, heads: int) -> None:
        self.attention, self.num_heads = attention, heads
        self.scale, self.sliding_window = attention.scale, attention.window

    def do_kv_cache_update(
        self,
        layer: nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write key codes and value codes, uint8 [T, K bytes] each, to their places in the pages."""
        keys, values = self.split(kv_cache)
        torch.ops.prefixquant.store_codes(keys, key, slot_mapping)
        torch.ops.prefixquant.store_codes(values, value, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CodeMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the attention of queries [T, H, d] to output [T, H, d]. Keys and values come from the pages."""
        if attn_metadata is None:  # a call that only measures memory, or compiles
            return output.zero_()
        key_codes, value_codes = self.split(kv_cache)
        self.attention.attend_(
            output[: attn_metadata.tokens],
            query[: attn_metadata.tokens],
            key_codes=key_codes,
            value_codes=value_codes,
            pages=attn_metadata.pages,
            starts=attn_metadata.starts,
            lengths=attn_metadata.lengths,
        )
        return output

    def split(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the key codes and the value codes of pages uint8 [pages, K, tokens, bytes]."""
        first, second = self.attention.keys.bytes, self.attention.values.bytes
        return pages[..., :first], pages[..., first : first + second]


class CodeLayer(nn.Module, AttentionLayerBase):
    """Takes the place of vLLM's attention: (queries [T, H d], key codes [T, K bytes], values [T, K d]) -> [T, H d].

    Attributes:
        row_bytes: the bytes of a head's key and value in a page. All layers have the same (`match_rows_`).
    """

    def __init__(self, engine: Attention, attention: CodeAttention, values: PackedValues) -> None:
        """Take the place of a layer's attention.

        Raises:
            ServingError: the layer computes an attention of another kind.
        """
        super().__init__()
        impl: Any = engine.impl
        others = {
            "ALiBi": impl.alibi_slopes is not None,
            "a soft cap of logits": bool(impl.logits_soft_cap),
            "sinks": engine.has_sink,
            "attention that is not causal": engine.attn_type != AttentionType.DECODER,
            "a shared KV cache": engine.kv_sharing_target_layer_name is not None,
        }
        if refused := [name for name, is_used in others.items() if is_used]:
            raise ServingError(f"packed_cache: this model has {', '.join(refused)}. Leave packed_cache out.")
        self.layer_name, self.num_heads, self.num_kv_heads = engine.layer_name, engine.num_heads, engine.num_kv_heads
        self.head_size, self.sliding_window = engine.head_size, engine.sliding_window
        self.values, self.impl = values, CodeImpl(attention, engine.num_heads)
        self.row_bytes = attention.keys.bytes + attention.values.bytes
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return AttentionBackendEnum[BACKEND].get_class()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        sizes: dict[str, Any] = {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "dtype": torch.uint8,
            "state_content_bytes": self.row_bytes,
        }
        if self.sliding_window is None:
            return FullAttentionSpec(**sizes)
        return SlidingWindowSpec(**sizes, sliding_window=self.sliding_window)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        name = _encode_layer_name(self.layer_name)
        codes = self.values(values)
        queries = queries.view(-1, self.num_heads, self.head_size)
        output = torch.empty_like(queries)
        written = torch.ops.vllm.unified_kv_cache_update(keys, codes, name)
        torch.ops.vllm.unified_attention_with_output(queries, keys, codes, output, name, kv_cache_dummy_dep=written)
        return output.flatten(1)


def replace_attention_(
    config: VllmConfig, engine: Attention, attention: CodeAttention, values: PackedValues
) -> CodeLayer:
    """Return a `CodeLayer` that vLLM's runner finds in place of a layer's attention."""
    layer = CodeLayer(engine, attention, values)
    config.compilation_config.static_forward_context[layer.layer_name] = layer
    return layer


def match_rows_(layers: list[CodeLayer]) -> None:
    """Give all layers the longest of their rows, because the pages of a model have one size."""
    longest = max((layer.row_bytes for layer in layers), default=0)
    for layer in layers:
        layer.row_bytes = longest


def register_codes() -> None:
    """Register the backend with vLLM. A second call changes nothing."""
    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, f"{CodeBackend.__module__}.{CodeBackend.__qualname__}")

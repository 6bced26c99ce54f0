import torch
from transformers import PretrainedConfig
from vllm.model_executor.layers.quantization import QuantizationConfig

class ModelConfig:
    hf_config: PretrainedConfig
    hf_text_config: PretrainedConfig
    dtype: torch.dtype
    max_model_len: int
    quantization: str | None
    quantization_config: object | None
    runner_type: str

class ParallelConfig:
    data_parallel_size: int
    enable_eplb: bool
    tensor_parallel_size: int
    decode_context_parallel_size: int
    pipeline_parallel_size: int

class DeviceConfig:
    device_type: str

class CacheConfig:
    cache_dtype: str
    block_size: int
    sliding_window: int | None

class LoadConfig:
    load_format: str

class CompilationConfig:
    static_forward_context: dict[str, object]
    static_all_moe_layers: list[str]

class VllmConfig:
    compilation_config: CompilationConfig
    kv_transfer_config: object | None
    model_config: ModelConfig
    parallel_config: ParallelConfig
    device_config: DeviceConfig
    cache_config: CacheConfig
    load_config: LoadConfig
    speculative_config: object | None
    lora_config: object | None
    quant_config: QuantizationConfig | None
    additional_config: dict[str, object]

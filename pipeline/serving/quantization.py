"""The quantization method `prefixquant` in vLLM, and the engine settings that it refuses.

vLLM asks the method for each of its layers. Linears of the blocks get one that holds nothing until model.py puts the
exported linears in, and so does an lm_head in 8 bits. Embedding, other lm_heads and norms stay vLLM's own.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from pipeline.inference.transformers_quantizer import METHOD, PrefixQuantConfig
from pipeline.models.architectures import find_architecture, find_rope_limit
from pipeline.serving.families import ServingError, served_class
from pipeline.serving.head import ServedHead
from pipeline.serving.linear import ServedLinear
from pipeline.serving.mixture import NoWeights

_EPS_OF_OLMOE = 1e-5


class ServedQuantization(QuantizationConfig):
    """vLLM's wrapper of a `PrefixQuantConfig`.

    Attributes:
        exported: the wrapped config.
    """

    _ignore_unexpected_suffixes = ()

    def __init__(self, exported: PrefixQuantConfig) -> None:
        super().__init__()
        self.exported = exported

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Choose model.py's class for an exported folder. vLLM calls this first for each folder."""
        if hf_quant_cfg.get("quant_method") != METHOD:
            return None
        hf_config.architectures = [served_class(hf_config.model_type)]
        return METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ServedQuantization":
        return cls(PrefixQuantConfig(**config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | FusedMoEMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return NoWeights(layer.moe_config)
        if isinstance(layer, ParallelLMHead) and self.exported.lm_head is not None:
            return ServedLinearMethod()
        return ServedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        return WeightsMapper()

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper()


class ServedLinearMethod(LinearMethodBase):
    """Computes a layer of vLLM by the `ServedLinear` or `ServedHead` that `take` has put into it."""

    def create_weights(self, layer: nn.Module, *sizes: Any, **options: Any) -> None:
        layer.add_module("served", None)

    def take(self, layer: nn.Module, served: ServedLinear | ServedHead) -> None:
        layer.served = served

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        served = layer.served
        assert isinstance(served, ServedLinear | ServedHead), "model.py fills every layer"
        return served(x)


def wants_packed_cache(config: VllmConfig) -> bool:
    """Return whether vLLM's cache should hold codes: `--additional-config '{"packed_cache": true}'`.

    Raises:
        ServingError: the value is not a boolean.
    """
    options = config.additional_config
    value = options.get("packed_cache", False) if isinstance(options, dict) else False
    if not isinstance(value, bool):
        raise ServingError(f"packed_cache={value!r}: expected true or false in --additional-config.")
    return value


def check_engine(config: VllmConfig) -> None:
    """Refuse engine settings under which an exported model would compute other results.

    Raises:
        ServingError: names each such setting and the reason.
    """
    parallel, model = config.parallel_config, config.model_config
    device, cache = config.device_config.device_type, config.cache_config.cache_dtype
    limit = find_rope_limit(model.hf_config)
    is_known = device == "cpu" or (device == "cuda" and current_platform.is_cuda())  # AMD's GPUs say cuda, too
    processes, channels = parallel.tensor_parallel_size, model.hf_config.intermediate_size
    has_experts = find_architecture(model.hf_config).experts is not None
    refused = {
        f"tensor_parallel_size={processes}": channels % processes != 0
        and f"it does not divide the {channels} hidden channels of the MLP. Use a size that does",
        f"device={current_platform.device_name}": not is_known and "only CPUs and NVIDIA's GPUs are supported",
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}": parallel.pipeline_parallel_size > 1
        and "the prefix and all blocks are loaded in one process. Use 1",
        "speculative decoding": config.speculative_config is not None and "a draft model has no prefix. Leave it out",
        "LoRA": config.lora_config is not None
        and "vLLM would give adapters the input of q, k, v, gate and up before rotation and quantization, and not the "
        "one they were trained on. Use PEFT on top of pipeline.quantized_model.load",
        f"kv_cache_dtype={cache}": cache not in ("auto", "float32", "bfloat16")
        and "the model quantizes keys and values itself, and the prefix must stay exact. Use auto",
        f"runner={model.runner_type}": model.runner_type != "generate" and "only generation is supported",
        f"load_format={config.load_config.load_format}": config.load_config.load_format == "dummy"
        and "random numbers are not valid quantizers. Use auto",
        f"max_model_len={model.max_model_len}": limit is not None
        and model.max_model_len > limit
        and f"beyond {limit} positions RoPE changes for all of them, the prefix included. Pass --max-model-len {limit}",
    }
    if has_experts:
        copies = parallel.data_parallel_size
        refused |= {
            f"device={device} for a mixture of experts": device != "cpu"
            and "its experts are chosen and run on a CPU only. Use pipeline.quantized_model.load",
            f"data_parallel_size={copies} for a mixture of experts": copies > 1
            and "vLLM would divide the experts among the engines. Start one server for each copy",
            f"rms_norm_eps={model.hf_config.rms_norm_eps}": model.hf_config.model_type == "olmoe"
            and model.hf_config.rms_norm_eps != _EPS_OF_OLMOE
            and f"vLLM's class adds {_EPS_OF_OLMOE} in every norm. Use pipeline.quantized_model.load",
            "enable_eplb": parallel.enable_eplb and "the experts of a process are fixed. Leave it out",
        }
    if wants_packed_cache(config):
        shards = parallel.decode_context_parallel_size
        refused |= {
            f"packed_cache=true on device={device}": device != "cpu"
            and "attention over codes has a kernel for CPUs only. Leave packed_cache out",
            "packed_cache=true with kv_transfer_config": config.kv_transfer_config is not None
            and "pages of codes are of no use without the scales of this engine. Leave one of the two out",
            f"packed_cache=true with decode_context_parallel_size={shards}": shards > 1
            and "attention over codes reads whole texts. Use 1",
        }
    if config.model_config.quantization_config is not None:
        refused["online quantization"] = "the weights are quantized already. Leave it out"
    problems = [f"{setting}: {reason}." for setting, reason in refused.items() if reason]
    if problems:
        raise ServingError(f"an exported model cannot be served like this: {' '.join(problems)}")

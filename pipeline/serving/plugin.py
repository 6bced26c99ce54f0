"""The entry point (`vllm.general_plugins` in pyproject.toml): vLLM calls `register` in each of its processes.

What it puts in place:

    quantization.py   `quant_method: prefixquant` in config.json is known, and picks the model classes of model.py
    model.py          vLLM's models with the exported blocks: quantizers, rotations, and the prefix in the cache
    placeholders.py   every text gets P tokens in front, whose places in the cache the prefix takes
"""

from pipeline.export.transformers_quantizer import METHOD
from pipeline.models.architectures import UnsupportedModelError
from pipeline.runtime.errors import PipelineError

# transformers' model_type -> vLLM's own class; model.py has a class "PrefixQuant…" for each.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class ServingError(PipelineError, ValueError):
    """vLLM is asked for what it cannot keep of an exported model; the message names it. A bad request to a server."""


def served_class(family: str) -> str:
    """The name under which model.py's class for a family is registered. Raises UnsupportedModelError."""
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type={family!r} is not served by vLLM with a prefix; served are: {', '.join(sorted(FAMILIES))}; "
            "pipeline.quantized_model.load runs every family"
        )
    return f"PrefixQuant{FAMILIES[family]}"


def register() -> None:
    """Make vLLM serve exported folders; may be called more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import register_quantization_config

    from pipeline.serving.placeholders import insert_placeholders_
    from pipeline.serving.quantization import ServedQuantization

    register_quantization_config(METHOD)(ServedQuantization)
    for family in FAMILIES:
        name = served_class(family)
        ModelRegistry.register_model(name, f"pipeline.serving.model:{name}")
    insert_placeholders_()

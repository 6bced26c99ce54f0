"""The entry point (`vllm.general_plugins` in pyproject.toml): vLLM calls `register` in each of its processes.

What it puts in place:

    quantization.py   `quant_method: prefixquant` in config.json is known, and picks the model classes of model.py
    model.py          vLLM's models with the exported blocks: quantizers, rotations, and the prefix in the cache
    placeholders.py   every text gets P tokens in front, whose places in the cache the prefix takes
"""

from pipeline.inference.transformers_quantizer import METHOD
from pipeline.serving.families import FAMILIES, served_class


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

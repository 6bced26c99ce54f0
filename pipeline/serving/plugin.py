"""The entry point (`vllm.general_plugins` in pyproject.toml), which vLLM calls in each of its processes.

It registers four things:

    quantization.py   the method `prefixquant` of config.json, which chooses the model classes of model.py
    model.py          vLLM's models with the exported blocks: quantizers, rotations, and the prefix in the cache
    code_backend.py   the attention of a cache of codes
    placeholders.py   P tokens before every text, whose places in the cache the prefix takes
"""

from pipeline.inference.transformers_quantizer import METHOD
from pipeline.serving.families import FAMILIES, served_class


def register() -> None:
    """Register exported folders with vLLM. It may be called more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import register_quantization_config

    from pipeline.serving.code_backend import register_codes
    from pipeline.serving.placeholders import insert_placeholders_
    from pipeline.serving.quantization import ServedQuantization

    register_quantization_config(METHOD)(ServedQuantization)
    for family in FAMILIES:
        name = served_class(family)
        ModelRegistry.register_model(name, f"pipeline.serving.model:{name}")
    register_codes()
    insert_placeholders_()

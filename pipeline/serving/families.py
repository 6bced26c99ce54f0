"""What vLLM can serve with a prefix, and the error that names what it cannot."""

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
    """vLLM is asked for what it cannot keep of an exported model; the message names it."""


def served_class(family: str) -> str:
    """The name under which model.py's class for a family is registered. Raises UnsupportedModelError."""
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type={family!r} is not served by vLLM with a prefix; served are: {', '.join(sorted(FAMILIES))}; "
            "pipeline.quantized_model.load runs every family"
        )
    return f"PrefixQuant{FAMILIES[family]}"

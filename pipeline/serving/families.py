"""The model families that vLLM serves with a prefix, and the errors of serving."""

from pipeline.models.architectures import UnsupportedModelError
from pipeline.runtime.errors import PipelineError

# model_type of transformers -> class of vLLM; model.py has a class "PrefixQuant…" for each. Linears and RoPE come from
# the exported blocks, so a class serves all families that have its norms, activation and order of layers.
FAMILIES = {
    "apertus": "ApertusForCausalLM",
    "cwm": "LlamaForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "hyperclovax": "HyperCLOVAXForCausalLM",
    "llama": "LlamaForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "ministral": "MistralForCausalLM",
    "ministral3": "MistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "seed_oss": "LlamaForCausalLM",
    "smollm3": "LlamaForCausalLM",
}
# Their classes take the window of each layer from `layer_types`.
SLIDES_BY_LAYER = ("cwm", "exaone4", "gemma2", "gemma3_text", "ministral")


class ServingError(PipelineError, ValueError):
    """A setting or request would change the results of an exported model in vLLM; the message names it."""


def served_class(family: str) -> str:
    """Return the name of model.py's class for a family. Raise UnsupportedModelError if there is none."""
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type={family!r}: vLLM serves only {', '.join(sorted(FAMILIES))} with a prefix. Use "
            "pipeline.quantized_model.load, which runs every family."
        )
    return f"PrefixQuant{FAMILIES[family]}"

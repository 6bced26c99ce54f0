"""Tiny random models of each supported family, their tokenizer and params, for tests and for the robustness benchmark.

They prove exactness, never quality: they have no massive activations and were trained on nothing.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    CwmConfig,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    HunYuanMoEV1Config,
    HyperCLOVAXConfig,
    LlamaConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    VaultGemmaConfig,
)

from benchmarks.workspace import read_params

VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ROPE_SCALING = {  # as Llama 3's
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = 28  # of families that slide
SLIDING = ("mistral", "mixtral", "qwen2", "phi3", "gemma2", "gemma3_text")
POST_NORMS = ("gemma2", "gemma3_text", "olmo2")  # no R1
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_untied_biases": LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama_odd_sizes": LlamaConfig(**SIZES | {"hidden_size": 52, "intermediate_size": 78}, head_dim=13 * 2),
    "mistral": MistralConfig(**SIZES, head_dim=20, sliding_window=WINDOW),
    "qwen2": Qwen2Config(
        **SIZES,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "llama_long_rope": LlamaConfig(**SIZES, rope_parameters=ROPE_SCALING),
    "phi3": Phi3Config(**SIZES, tie_word_embeddings=False, sliding_window=WINDOW),
    "gemma2": Gemma2Config(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=WINDOW,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    "gemma3_text": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=WINDOW, sliding_window_pattern=2),
    "olmo2": Olmo2Config(**SIZES),
}
# Near relatives: they go through the whole pipeline and the import gate, and not through every test of each family.
_KINDS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_LLAMA4_SCALE = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.4}
_LLAMA4_SCALE |= {"original_max_position_embeddings": 16}
NEAR_FAMILIES = {
    "seed_oss": SeedOssConfig(**SIZES, head_dim=16, attention_bias=True),
    "ministral": MinistralConfig(**SIZES, head_dim=16, **_KINDS),
    "ministral3": Ministral3Config(**SIZES, head_dim=16, rope_parameters=_LLAMA4_SCALE),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2),
    "olmo3": Olmo3Config(**SIZES, **_KINDS),
    "exaone4": Exaone4Config(**SIZES, sliding_window_pattern=2, **_KINDS),
    "cwm": CwmConfig(**SIZES, head_dim=16, **_KINDS, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "vaultgemma": VaultGemmaConfig(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=WINDOW,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    # A norm of keys after RoPE; MLPs without a gate.
    "hunyuan_v1_dense": HunYuanDenseV1Config(
        **SIZES,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
    ),
    "arcee": ArceeConfig(**SIZES, head_dim=12, attention_bias=True, mlp_bias=True),
    "apertus": ApertusConfig(**SIZES, dtype="float32", rope_parameters=ROPE_SCALING),
}
_YARN = {  # as gpt-oss
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
_MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1}
_LONG_ROPE = {  # of 16 channels of a head, 12 are turned
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 9.0],
    "original_max_position_embeddings": 128,
}
# These are rewritten at import to another family.
NEAR_FAMILIES |= {
    "granite": GraniteConfig(**SIZES, **_MULTIPLIERS, logits_scaling=8.0, tie_word_embeddings=True, mlp_bias=True),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **SIZES | _MULTIPLIERS,
        logits_scaling=3.0,
        num_local_experts=0,
        shared_intermediate_size=96,
        layer_types=["full_attention"] * 3,
        position_embedding_type="rope",
        mamba_n_heads=2,
    ),
    "granitemoe": GraniteMoeConfig(
        **SIZES | _MULTIPLIERS, logits_scaling=6.0, num_local_experts=4, num_experts_per_tok=2
    ),
    "hyperclovax": HyperCLOVAXConfig(**SIZES, **_MULTIPLIERS, logits_scaling=0.2, head_dim=12, attention_bias=True),
    "helium": HeliumConfig(**SIZES, head_dim=12),
    "ernie4_5": Ernie4_5Config(**SIZES, head_dim=20, use_bias=True),
    "glm": GlmConfig(**SIZES, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "glm4": Glm4Config(**SIZES, head_dim=20),
    "phi3_partial": Phi3Config(
        **SIZES | {"hidden_size": 64},
        tie_word_embeddings=True,
        rope_parameters=_LONG_ROPE,
        original_max_position_embeddings=128,
    ),
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
MOE_FAMILIES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
    # Blocks 0 and 2 are dense, of another width than the experts and the shared expert of block 1.
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES | _EXPERTS,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=2,
    ),
    "qwen3_moe": Qwen3MoeConfig(**SIZES | _EXPERTS, head_dim=16, moe_intermediate_size=32, mlp_only_layers=[0]),
    "olmoe": OlmoeConfig(**SIZES | _EXPERTS | {"norm_topk_prob": False}),
}
FAMILIES |= MOE_FAMILIES
_TWO_BLOCKS = SIZES | {"num_hidden_layers": 2}
# Their routers have a correction bias.
NEAR_FAMILIES |= {
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **_TWO_BLOCKS,
        tie_word_embeddings=True,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=2,
        moe_intermediate_size=32,
        moe_layer_start_index=1,
    ),
    "glm4_moe": Glm4MoeConfig(
        **_TWO_BLOCKS,
        head_dim=16,
        use_qk_norm=True,
        attention_bias=True,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "minimax_m2": MiniMaxM2Config(
        **_TWO_BLOCKS, head_dim=16, num_local_experts=4, num_experts_per_tok=2, partial_rotary_factor=0.75
    ),
}
# Norms of queries and keys after RoPE, a shared expert, a router with a linear of its own.
NEAR_FAMILIES |= {
    "hunyuan_v1_moe": HunYuanMoEV1Config(
        **_TWO_BLOCKS | {"intermediate_size": 32},
        head_dim=16,
        num_experts=4,
        moe_topk=[2, 2],
        attention_bias=True,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
    ),
}
# Attention sinks, and experts with biases and a clamped gate. The limit is low, so that some values are clamped.
NEAR_FAMILIES |= {
    "gpt_oss": GptOssConfig(
        **_TWO_BLOCKS | {"intermediate_size": 32},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        swiglu_limit=1.5,
        rope_parameters=_YARN,
    ),
}
PROSE_FILE = Path(__file__).with_name("prose.txt")
PROSE = PROSE_FILE.read_text(encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on a few paragraphs. It adds no special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def randomize_(model: torch.nn.Module) -> torch.nn.Module:
    """Set all parameters to random values, norms and biases too, so that an error in folding them shows."""
    model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)
    return model


def make_model(family: str, seed: int = 0) -> torch.nn.Module:
    """Return a random model of one of `FAMILIES` or `NEAR_FAMILIES`."""
    torch.manual_seed(seed)
    config = copy.deepcopy((FAMILIES | NEAR_FAMILIES)[family])
    # sdpa ignores attn_logit_softcapping, and older versions of transformers choose it nevertheless.
    capped = getattr(config, "attn_logit_softcapping", None)
    return randomize_(AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None))


def tiny_params(source: Path, corpus: Path) -> dict[str, Any]:
    """Return the project's params.yaml, reduced for a tiny model and a local corpus."""
    params = read_params()
    params["model"]["source"] = str(source)
    params["corpora"] = {"prose": {"source": str(corpus)}}
    params["prefix_search"]["choose"] = "threshold"  # tiny random models have no outlier tokens
    for name in ("search", "train", "end_to_end", "validation"):
        params["calibration"][name] |= {"corpora": ["prose"], "windows": 3, "length": 32}
    params["calibration"]["validation"]["windows"] = 1
    params["calibration"]["evaluation"] = {"corpora": ["prose"], "windows": 2, "length": 48}
    params["calibration"]["start_token"] = "never"  # `auto` measures, and random models have no habits
    params["prefix_training"]["max_kl"] = None  # a prefix changes random models by up to a nat
    params["quantizer_init"]["mse_samples"] = 2
    params["finetuning"]["blocks"] |= {"enabled": True, "epochs": 1}  # so that both phases run
    params["evaluation"]["tasks"] = {}
    params["activation_plots"] |= {"windows": 2, "surface_blocks": [0]}
    params["runtime"] |= {"batch_size": 2, "threads": 1, "device": "cpu"}
    return params

"""vLLM computes what transformers does with tiny exported mixtures of experts, and refuses what it would not."""

import pytest
from transformers import (
    Glm4MoeConfig,
    GraniteMoeConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.serving.test_vllm import DYNAMIC, GROUPS, ONLINE, WIDE_SIZES, compare, make_served

pytestmark = pytest.mark.serving
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1}
PREFIX = [7, 9, 0]
QWEN2 = Qwen2MoeConfig(
    **WIDE_SIZES | EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=64, decoder_sparse_step=2
)
# name -> config, changed params, prefix, rotations other than those of `rotate`
MODELS = {
    "mixtral": (MixtralConfig(**WIDE_SIZES, **LOCAL, sliding_window=50), {}, PREFIX, ONLINE),
    "qwen2_moe": (QWEN2, {}, PREFIX, ONLINE),  # blocks 0 and 2 are dense
    "qwen3_moe": (
        Qwen3MoeConfig(**WIDE_SIZES | EXPERTS, head_dim=32, moe_intermediate_size=48, mlp_only_layers=[0]),
        {},
        PREFIX,
        ONLINE,
    ),
    "olmoe": (OlmoeConfig(**WIDE_SIZES | EXPERTS | {"norm_topk_prob": False}), {}, PREFIX, ONLINE),
    "glm4_moe": (
        Glm4MoeConfig(
            **WIDE_SIZES,
            head_dim=32,
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
        {},
        PREFIX,
        ONLINE,
    ),
    "minimax_m2": (MiniMaxM2Config(**WIDE_SIZES, **LOCAL, head_dim=32, partial_rotary_factor=0.75), {}, PREFIX, ONLINE),
    "granitemoe": (
        GraniteMoeConfig(**WIDE_SIZES | MULTIPLIERS, **LOCAL, logits_scaling=6.0),
        {},
        PREFIX,
        ONLINE,
    ),
    "mixtral, weights alone": (
        MixtralConfig(**WIDE_SIZES, **LOCAL),
        {f"{group}.bits": 16 for group in ("activations", "keys", "values")},
        PREFIX,
        ONLINE,
    ),
    "qwen2_moe, dynamic": (QWEN2, DYNAMIC, PREFIX, ONLINE),
    "qwen3_moe, asymmetric groups": (
        Qwen3MoeConfig(**WIDE_SIZES | EXPERTS, head_dim=32, moe_intermediate_size=48),
        GROUPS,
        None,
        {"r4": "block_hadamard", "block_size": 16},
    ),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Return name -> exported folder."""
    root = tmp_path_factory.mktemp("mixtures")
    return {name: make_served(root / str(place), *MODELS[name]) for place, name in enumerate(MODELS)}


@pytest.mark.parametrize("name", MODELS)
def test_vllm_equals_transformers(exports, name):
    """Texts are batched, and cut into chunks of 96 tokens. The second run reads cached blocks."""
    parity = compare(exports, name, "--eager")
    assert parity["median_block"] <= 1e-5
    assert parity["rounded_otherwise"] <= 0.02

"""vLLM computes what transformers does with tiny exported mixtures of experts, and refuses what it would not."""

import subprocess
import sys

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

from tests.conftest import ROOT
from tests.serving.test_vllm import DYNAMIC, ENVIRONMENT, GROUPS, ONLINE, WIDE_SIZES, compare, make_served

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
    if name == "mixtral, weights alone":
        assert parity["largest_difference"] <= 1e-3  # measured: 1.1e-4
        assert parity["largest_tie"] <= 1e-4


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe, asymmetric groups"])
def test_compiled_blocks_equal_transformers(exports, name):
    """One model multiplies integers and has a shared expert, the other dequantizes weights."""
    compare(exports, name)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_two_processes_equal_transformers(exports, name):
    """Each process has half of the experts, and the first one the shared expert. Dense blocks are split as ever."""
    compare(exports, name, "--eager", "--processes", "2")


def test_experts_with_a_cache_of_codes_equal_transformers(exports):
    compare(exports, "qwen3_moe", "--eager", "--packed-cache")


REFUSED = {
    "data_parallel_size=2 for a mixture of experts": ("qwen2_moe", {"data_parallel_size": 2}),
    "enable_eplb": (
        "qwen2_moe",
        {"enable_eplb": True, "enable_expert_parallel": True, "tensor_parallel_size": 2},
    ),
    "rms_norm_eps=0.01": ("olmoe", {"hf_overrides": {"rms_norm_eps": 0.01}}),
    "device=cuda for a mixture of experts": ("qwen2_moe", {}),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_change_results_are_refused(exports, setting):
    name, options = REFUSED[setting]
    program = f"""
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
from pipeline.serving.quantization import check_engine
config = EngineArgs(model={str(exports[name])!r}, dtype="float32", enforce_eager=True).create_engine_config()
options = {options!r}
for key, value in options.pop("hf_overrides", {{}}).items():
    setattr(config.model_config.hf_config, key, value)
for key, value in options.items():
    setattr(config.parallel_config, key, value)
if "cuda" in {setting!r}:
    config.device_config.device_type = "cuda"
check_engine(config)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"{setting}: " in done.stderr.splitlines()[-1]

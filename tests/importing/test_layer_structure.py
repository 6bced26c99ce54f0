import pytest

from pipeline.importing.layer_structure import describe_structure, list_layer_kinds

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 320,
}
LAYER_NORM, GATELESS = "LayerNorm instead of RMSNorm", "an MLP without a gate"
FUSED, PARALLEL = "q, k and v fused into one linear", "attention and MLP in parallel, after one norm"
FEATURES = {
    "llama": [],
    "glm4": [],  # gate and up in one linear are no MLP without a gate
    "gpt_neox": [
        f"{LAYER_NORM} (input_layernorm) in all layers",
        f"{FUSED} (attention.query_key_value) in all layers",
        f"{GATELESS} (mlp.dense_h_to_4h) in all layers",
    ],
    "opt": [
        f"{LAYER_NORM} (self_attn_layer_norm) in all layers",
        f"{GATELESS} (fc1) in all layers",
        "learned positions in place of RoPE (model.decoder.embed_positions)",
    ],
    "phi": [
        f"{LAYER_NORM} (input_layernorm) in all layers",
        f"{PARALLEL} (input_layernorm) in all layers",
        f"{GATELESS} (mlp.fc1) in all layers",
        "a bias of lm_head",
    ],
    "nanochat": [
        "norms without weights (self_attn.q_norm) in all layers",
        f"{GATELESS} (mlp.fc1) in all layers",
    ],
    "doge": ["weights that Llama's layers do not have (input_residual) in all layers"],
    "mamba": ["no attention and so no cache of keys in all layers"],
}


@pytest.mark.parametrize("family", FEATURES)
def test_features_are_found_in_the_modules_of_a_layer(family):
    described = describe_structure(SIZES | {"model_type": family})
    assert described is not None
    assert described[: len(FEATURES[family])] == FEATURES[family]
    assert bool(described) == bool(FEATURES[family])


def test_features_of_some_layers_name_the_first_one():
    values = SIZES | {"model_type": "lfm2", "num_hidden_layers": 4, "full_attn_idxs": [0, 2]}
    described = describe_structure(values)
    assert described is not None
    assert described[0] == "no attention and so no cache of keys in 2 of 4 layers, first in layer 1"


@pytest.mark.parametrize(
    "values",
    [{}, {"model_type": "unheard_of"}, {"model_type": "llama", "hidden_size": "wide"}, {"model_type": "opt"} | SIZES],
)
def test_a_class_that_cannot_be_built_has_no_structure(values):
    values = values | ({"num_hidden_layers": 10**9} if values.get("model_type") == "opt" else {})
    assert describe_structure(values) is None
    assert list_layer_kinds(values) == []

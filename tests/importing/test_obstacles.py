import pytest

from pipeline.importing.obstacles import explain_obstacles, find_obstacles, find_text_level


def test_the_text_level_is_found_below_several_wrappers():
    raw = {"model_type": "a", "eos_token_id": 3, "thinker_config": {"text_config": {"model_type": "b", "x": 1}}}
    assert find_text_level(raw) == {"model_type": "b", "eos_token_id": 3, "x": 1}


@pytest.mark.parametrize(
    ("values", "obstacle"),
    [
        ({"num_local_experts": 32}, "experts (num_local_experts=32) in its layers"),
        ({"num_experts": 1}, None),
        ({"num_experts": None, "rms_norm_eps": 1e-6}, None),
        ({"partial_rotary_factor": 0.5}, "RoPE on a part of each head (partial_rotary_factor=0.5) in all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, None),
        (
            {"logits_scaling": 16.0, "residual_multiplier": 0.2},
            "multipliers (residual_multiplier=0.2, logits_scaling=16.0)",
        ),
        ({"logit_scale": 1.0}, None),
        ({"attn_output_gate": True}, "an output gate after attention (attn_output_gate=True), which forbids R2"),
        ({"clip_qkv": None}, None),
        ({"index_topk": 2048}, "attention that selects tokens with an indexer (index_topk=2048)"),
        ({"layer_norm_eps": 1e-5, "rms_norm_eps": 1e-6}, None),
        ({"model_type": "cohere2"}, "RoPE that pairs channels 2i and 2i + 1 in all layers"),
        ({"model_type": "cohere2"}, "attention and MLP in parallel, after one norm (input_layernorm) in all layers"),
        ({"alibi": True}, "ALiBi in place of RoPE (alibi=True) in all layers"),
        ({"attn_config": {"alibi": True}}, "ALiBi in place of RoPE (alibi=True) in all layers"),
        ({"ffn_config": {"moe_num_experts": 16}}, "experts (moe_num_experts=16) in its layers"),
        ({"parallel_attn": True}, "attention and MLP in parallel (parallel_attn=True) in all layers"),
        (
            {"rotary_dim": 64, "n_embd": 4096, "n_head": 16},
            "RoPE on a part of each head (rotary_dim=64, of 256 channels) in all layers",
        ),
        ({"rotary_dim": 64, "head_dim": 64}, None),
        ({"model_type": "bert"}, "an encoder, whose attention reads later positions; only decoders are imported"),
        ({"model_type": "exaone", "layer_norm_epsilon": 1e-5}, None),  # an RMSNorm all the same
    ],
)
def test_each_feature_is_named_with_its_key(values, obstacle):
    assert obstacle in find_obstacles(values) if obstacle else find_obstacles(values) == []


def test_layers_come_from_tensor_names():
    names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.sinks",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert find_obstacles({}, names) == [
        "attention sinks (a learned logit per head) in 1 of 2 layers, first in layer 1"
    ]
    assert find_obstacles({}, names[:1]) == []


def test_the_sentence_names_the_wrapper_and_its_text_model():
    raw = {"model_type": "outer", "text_config": {"model_type": "inner", "kv_lora_rank": 64}}
    sentence = explain_obstacles(raw)
    assert sentence.startswith(
        "model_type='outer' (text model 'inner') is not supported, because it has latent attention"
    )


GROUP_6 = {
    "gemma4_text": {"global_head_dim": 512, "head_dim": 256},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], "attn_output_gate": True},
    "qwen3_next": {"linear_num_key_heads": 16},
    "deepseek_v2": {"kv_lora_rank": 512},
    "deepseek_v3": {"kv_lora_rank": 512},
    "kimi_k25": {"kv_lora_rank": 512},
    "kimi_linear": {"linear_attn_config": {"kda_layers": [1]}, "kv_lora_rank": 512},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"hybrid_override_pattern": "M-M*"},
    "falcon_h1": {"mamba_d_state": 256},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 8},
    "starcoder2": {"norm_epsilon": 1e-5},
    "stablelm": {"layer_norm_eps": 1e-5},
    "nemotron": {"norm_eps": 1e-5},
    "cohere2": {"layer_norm_eps": 1e-5},
}


@pytest.mark.parametrize("family", GROUP_6)
def test_refused_families_have_a_reason_and_name_the_missing_feature(family):
    sentence = explain_obstacles({"model_type": family, **GROUP_6[family]})
    reason, _, need = sentence.partition(". It would need ")
    assert reason.startswith(f"model_type={family!r} is not supported, because it has ")
    assert need


def test_a_pattern_of_layers_is_read_by_the_class_of_the_config():
    """Jamba states a period and an offset, Qwen3-Next an interval."""
    jamba = {"model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1}
    assert "3 of 4 layers, first layer 0" in find_obstacles(jamba)[0]
    following = {"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 4}
    assert "6 of 8 layers, first layer 0" in find_obstacles(following)[0]


@pytest.mark.parametrize("model_type", [None, 5, ["llama"]])
def test_a_config_without_a_family_gets_an_answer(model_type):
    assert "config.json names no family" in explain_obstacles({"model_type": model_type})


def test_a_wrapper_that_is_not_listed_around_a_supported_text_model():
    sentence = explain_obstacles({"model_type": "voxtral", "text_config": {"model_type": "llama"}})
    assert "(text model 'llama') is not supported: its text model is, but" in sentence


def test_a_dense_model_of_a_hybrid_family_has_no_state():
    values = {"layer_types": ["attention"] * 2, "mamba_d_state": 128, "num_local_experts": 0}
    assert find_obstacles(values) == []

"""Configs of real models, written from their published sizes; no weights."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from pipeline.importing.source import ModelImportError
from pipeline.models.architectures import IMPORTED_AS
from pipeline.planning import explain
from pipeline.planning.explain import explain_source
from tests.conftest import make_model, make_tokenizer
from tests.importing.test_stored_formats import store
from tests.importing.test_wrappers import make_wrapper, save_wrapper

QWEN3_VL_2B = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
    "vision_config": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048},
}
GEMMA3_4B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27},
}
MISTRAL_SMALL_31 = {
    "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "sliding_window": None,
        "rope_theta": 1e9,
        "max_position_embeddings": 131072,
    },
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24},
}
QWEN25_VL_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "out_hidden_size": 3584},
}
SUPPORTED = {
    "Qwen3-VL-2B": (QWEN3_VL_2B, r"qwen3_vl is imported as Qwen3ForCausalLM, 28 blocks, 1,720,574,976 parameters"),
    "Gemma-3-4B": (GEMMA3_4B, r"gemma3 is imported as Gemma3ForCausalLM, 34 blocks, 3,880,\d+,\d+ parameters"),
    "Mistral-Small-3.1": (MISTRAL_SMALL_31, r"mistral3 is imported as MistralForCausalLM, 40 blocks, 2\d,\d+,\d+,\d+"),
    "Qwen2.5-VL-7B": (QWEN25_VL_7B, r"qwen2_5_vl is imported as Qwen2ForCausalLM, 28 blocks, 7,615,616,512 parameters"),
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "kv_lora_rank": 512,
    "n_routed_experts": 256,
    "first_k_dense_replace": 3,
    "rms_norm_eps": 1e-6,
    "auto_map": {"AutoConfig": "x"},
}
LINEAR = ["linear_attention"] * 3 + ["full_attention"]
UNSUPPORTED = {
    "DeepSeek-V3": (DEEPSEEK_V3, [r"MLA, kv_lora_rank=512\) in all layers", r"n_routed_experts=256\) from layer 3 on"]),
    "Kimi-K2.5": (
        {"model_type": "kimi_k25", "text_config": DEEPSEEK_V3 | {"model_type": "kimi_k2"}},
        [r"'kimi_k25' \(text model 'kimi_k2'\)", "MLA"],
    ),
    "Qwen3.5": (
        {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", "layer_types": LINEAR * 16}},
        [r"recurrent state \('linear_attention', 48 of 64 layers, first layer 0\)"],
    ),
    "Gemma 3n": (
        {
            "model_type": "gemma3n",
            "text_config": {"hidden_size_per_layer_input": 256, "num_kv_shared_layers": 15, "altup_num_inputs": 4},
        },
        ["several residual streams", "embedding per layer", r"num_kv_shared_layers=15, the last 15 layers"],
    ),
    "Gemma 4 31B": (
        {"model_type": "gemma4", "text_config": {"global_head_dim": 512, "head_dim": 256}},
        [r"another width in layers with full attention \(global_head_dim=512, head_dim=256\)"],
    ),
    "Llama 4": (
        {
            "model_type": "llama4",
            "text_config": {"model_type": "llama4_text", "num_local_experts": 16, "attention_chunk_size": 8192},
        },
        [r"experts \(num_local_experts=16\)", "within chunks of text", "complex RoPE"],
    ),
    "Mllama": (
        {"model_type": "mllama", "text_config": {"model_type": "mllama_text_model", "cross_attention_layers": [3, 8]}},
        [r"cross-attention to images in layers of its own \(cross_attention_layers=\[3, 8\]\)"],
    ),
    "GPT-2": ({"model_type": "gpt2", "layer_norm_epsilon": 1e-5}, [r"LayerNorm instead of RMSNorm"]),
    "T5": ({"model_type": "t5", "is_encoder_decoder": True}, ["an encoder"]),
    "Mamba": ({"model_type": "mamba2", "state_size": 128}, [r"recurrent state \(state_size\)"]),
    "MiniCPM": ({"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4}, [r"scale_emb=12, scale_depth=1\.4"]),
    "unknown": ({"model_type": "zarquon", "hidden_size": 64}, ["nobody has listed and tested this family"]),
    "code": ({"model_type": "zarquon", "auto_map": {"AutoModel": "x.Y"}}, ["code from the hub"]),
    "old Gemma": (
        {"model_type": "llava", "text_config": {"model_type": "bloom", "layer_norm_epsilon": 1e-5}},
        [r"'llava' \(text model 'bloom'\)"],
    ),
}


def write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_models_are_explained_by_their_config(name, tmp_path):
    config, message = SUPPORTED[name]
    explanation = explain_source(write_config(tmp_path, config))
    assert explanation.supported
    assert re.search(message, explanation.lines[0]), explanation.lines[0]
    assert "Not checked: names of tensors" in explanation.lines[-1]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_get_one_sentence_that_names_feature_and_layers(name, tmp_path):
    config, messages = UNSUPPORTED[name]
    explanation = explain_source(write_config(tmp_path, config))
    assert not explanation.supported
    (line,) = explanation.lines
    for message in messages:
        assert re.search(message, line), line
    assert "supported are" not in line


def test_tensor_names_say_in_which_layers_a_feature_is(tmp_path):
    write_config(tmp_path, {"model_type": "zarquon", "num_experts": 8})
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    names += [f"model.layers.{layer}.mlp.experts.0.up_proj.weight" for layer in (2, 3)]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    (line,) = explain_source(str(tmp_path)).lines
    assert "experts (num_experts=8) in 2 of 4 layers, first in layer 2" in line
    write_config(tmp_path, {"model_type": "zarquon"})
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"model.layers.0.mlp.up_proj.weight": "a", "model.layers.1.self_attn.w_qs.weight": "a"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (line,) = explain_source(str(tmp_path)).lines
    assert "modules that Llama's layers do not have (self_attn.w_qs.weight in layer 1)" in line


def test_dropped_parts_and_the_stored_format_are_listed(tmp_path):
    save_wrapper(make_wrapper("mistral3"), tmp_path / "wrapper")
    lines = explain_source(str(tmp_path / "wrapper")).lines
    assert lines[0].startswith("Supported: mistral3 is imported as MistralForCausalLM, 3 blocks")
    assert [line.partition(" (")[0] for line in lines[1:]] == [
        "Dropped: multi_modal_projector",
        "Dropped: vision_tower",
    ]
    make_model("llama_tied").save_pretrained(tmp_path / "fp8")
    make_tokenizer().save_pretrained(tmp_path / "fp8")
    store(tmp_path / "fp8", "per tensor")
    lines = explain_source(str(tmp_path / "fp8")).lines
    assert lines[1].startswith("Stored: fp8, one scale per tensor")
    assert lines[2] == "Dropped: scales of activations (21 tensors, 0.0 MiB)."


def test_other_refusals_equal_the_import(tmp_path):
    llama = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64).to_dict()
    for change, message in (
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (quant_method='gptq')"),
        ({"is_causal": False}, "attention reads later positions"),
        ({"hidden_size": -1}, "hidden_size=-1 in its config is not a size"),
    ):
        explanation = explain_source(write_config(tmp_path, llama | change))
        assert not explanation.supported
        assert message in explanation.lines[0]
    write_config(tmp_path, llama)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pickles are never read" in explain_source(str(tmp_path)).lines[0]
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "config.json").unlink()
    assert "no config.json" in explain_source(str(tmp_path)).lines[0]


def test_a_hub_id_is_explained_by_its_headers(tmp_path, monkeypatch):
    class Info:
        dtype, shape = "BF16", (4, 4)

    class Api:
        def get_safetensors_metadata(self, source, revision):
            names = ["model.visual.a.weight", "model.language_model.layers.0.input_layernorm.weight"]
            return type(
                "Metadata", (), {"files_metadata": {"f": type("F", (), {"tensors": dict.fromkeys(names, Info)})}}
            )

    write_config(tmp_path, QWEN3_VL_2B)
    monkeypatch.setattr(explain, "snapshot_download", lambda source, **options: str(tmp_path))
    monkeypatch.setattr(explain, "HfApi", Api)
    explanation = explain_source("Qwen/Qwen3-VL-2B-Instruct", "main")
    assert not explanation.supported  # this copy lacks most tensors
    assert "missing (model.embed_tokens.weight" in explanation.lines[0]

    def fail(source, **options):
        raise OSError("offline")

    monkeypatch.setattr(explain, "snapshot_download", fail)
    with pytest.raises(ModelImportError, match=r"no such file or folder, and it cannot be fetched .*\(offline\)"):
        explain_source("a/b")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granite", "glm4"])
def test_experts_and_rewritten_families_are_explained_by_their_tensors(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    explanation = explain_source(str(tmp_path))
    assert explanation.supported, explanation.lines
    changes = [line for line in explanation.lines if line.startswith("Rewritten: ")]
    assert bool(changes) == (family in IMPORTED_AS)

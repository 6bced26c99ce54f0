import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    PixtralVisionConfig,
    SiglipVisionConfig,
)

from pipeline.importing import wrappers
from pipeline.importing.import_model import ModelImportError, import_model
from pipeline.importing.wrappers import WRAPPERS, check_text_forward, read_text_config, rename_tensors
from pipeline.inspection.import_gate import check_import
from pipeline.models.architectures import UnsupportedModelError
from tests.conftest import SIZES, WINDOW, make_tokenizer, randomize_, read_json

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 48}
MROPE = {"mrope_section": [3, 3, 2], "rope_type": "default", "rope_theta": 50000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.1,
}
TEXT = SIZES | {"rms_norm_eps": 1e-3, "head_dim": 16}
SIGLIP = SiglipVisionConfig(**VISION, image_size=28, patch_size=14).to_dict()
SMOLVLM = {
    "text_config": TEXT | {"model_type": "llama"},
    "vision_config": VISION | {"image_size": 28, "patch_size": 14},
}
CONFIGS = {
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "tie_word_embeddings": True,
    },
    "qwen3_vl_moe": {
        "text_config": TEXT
        | {"rope_parameters": MROPE | {"mrope_interleaved": True}}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
        "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen2_5_vl": {
        "text_config": SIZES | {"rms_norm_eps": 1e-3, "rope_parameters": MROPE | {"mrope_section": [2, 2, 2]}},
        "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1]},
    },
    "qwen2_vl": {
        "text_config": SIZES | {"rms_norm_eps": 1e-3, "rope_parameters": MROPE | {"mrope_section": [2, 2, 2]}},
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 48},
    },
    "gemma3": {
        "text_config": TEXT | {"sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20},
        "vision_config": SIGLIP,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": PixtralVisionConfig(**VISION, image_size=28, patch_size=14).to_dict(),
        "tie_word_embeddings": False,
    },
    # Ministral 3: YaRN, and queries scaled from position 8 on.
    "mistral3 ministral3": {
        "text_config": TEXT | {"model_type": "ministral3", "sliding_window": None, "rope_parameters": YARN},
        "vision_config": PixtralVisionConfig(**VISION, image_size=28, patch_size=14).to_dict(),
        "tie_word_embeddings": True,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen3"},
        "vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": CLIPVisionConfig(**VISION, image_size=28, patch_size=14).to_dict(),
    },
    "llava_next": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": CLIPVisionConfig(**VISION, image_size=28, patch_size=14).to_dict(),
    },
    "llava_onevision": {
        "text_config": SIZES | {"model_type": "qwen2", "rms_norm_eps": 1e-3},
        "vision_config": SIGLIP,
    },
    "smolvlm": SMOLVLM,
    "idefics3": SMOLVLM | {"tie_word_embeddings": True},
}
# transformers 4 and 5 save other names: of the text model, of lm_head, of the other parts.
OLD_NAMES = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""}
OLD_QWEN_NAMES = {"model.language_model.": "model.", "model.visual.": "visual."}


def make_wrapper(name: str) -> torch.nn.Module:
    """Return the wrapper of a key of CONFIGS: a model_type, and the text model's if there are several."""
    torch.manual_seed(0)
    family = name.partition(" ")[0]
    config = CONFIG_MAPPING[family].from_dict({"model_type": family} | copy.deepcopy(CONFIGS[name]))
    return randomize_(AutoModelForImageTextToText.from_config(config))


def save_wrapper(model: torch.nn.Module, folder) -> dict[str, torch.Tensor]:
    """Save a wrapper with a tokenizer; return its tensors under the names that the class has."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }


def rename(tensors: dict[str, torch.Tensor], prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + name.removeprefix(old)] = tensor
    return renamed


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_text_model_of_each_wrapper_equals_the_wrapper_on_text(name, tmp_path, token_ids):
    family, model = name.partition(" ")[0], make_wrapper(name)
    save_wrapper(model, tmp_path / "source")
    metrics = import_model(
        str(tmp_path / "source"),
        None,
        torch.float32,
        tmp_path / "out",
        check_result=lambda source, folder: check_import(source, folder, 1e15),
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, model(input_ids=token_ids).logits)
    assert metrics["max_logit_deviation"] < 1e-5  # measured: 0
    assert loaded.config.rms_norm_eps == 1e-3
    assert loaded.config.architectures == [type(loaded).__name__]
    parts = read_json(tmp_path / "out/report.json")
    assert parts["wrapper"] == family
    known = {part.rstrip(".") for part in WRAPPERS[family].parts}
    assert {part.partition(".")[0] for part in parts["dropped"]} <= known
    whole = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    text = sum(tensor.numel() * tensor.element_size() for tensor in loaded.parameters())
    assert sum(part["bytes"] for part in parts["dropped"].values()) == whole - text
    assert metrics["dropped_tensors"] == len(list(model.parameters())) - len(list(loaded.parameters()))


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "gemma3", "mistral3", "internvl", "llava"])
def test_names_of_transformers_4_and_5_give_the_same_import(name, tmp_path):
    model = make_wrapper(name)
    tensors = save_wrapper(model, tmp_path / "source")
    old = OLD_QWEN_NAMES if name.startswith("qwen") else OLD_NAMES
    folders = []
    for layout in ({}, old):
        save_file(rename(tensors, layout), tmp_path / "source/model.safetensors", metadata={"format": "pt"})
        folders.append(tmp_path / f"out{len(folders)}")
        import_model(str(tmp_path / "source"), None, torch.float32, folders[-1])
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert {path.name for path in folders[0].glob("block-*.safetensors")} == {
        f"block-{index:05d}.safetensors" for index in range(3)
    }


def test_a_sharded_wrapper_with_torch_dtype_is_imported(tmp_path, token_ids):
    model = make_wrapper("qwen3_vl")
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    make_tokenizer().save_pretrained(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 1
    config = read_json(tmp_path / "source/config.json")
    for level in (config, config["text_config"]):
        level["torch_dtype"] = level.pop("dtype", "float32")
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, model(input_ids=token_ids).logits)


def test_a_flat_config_of_old_qwen_is_read(tmp_path, token_ids):
    """Qwen2.5-VL of early 2025 states its text model's settings on the wrapper's level, with RoPE of type mrope."""
    model = make_wrapper("qwen2_5_vl")
    save_wrapper(model, tmp_path / "source")
    config = read_json(tmp_path / "source/config.json")
    text = config.pop("text_config")
    text.pop("model_type")
    text.pop("rope_parameters")
    config |= text | {"rope_theta": 50000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, model(input_ids=token_ids).logits)


@pytest.mark.parametrize("level", ["wrapper", "text"])
def test_settings_of_either_level_are_kept(level):
    raw = {"model_type": "qwen3_vl"} | copy.deepcopy(CONFIGS["qwen3_vl"])
    values = {"rms_norm_eps": 3e-4, "eos_token_id": [7, 9], "bos_token_id": 5, "vocab_size": 300}
    for key in values:
        raw["text_config"].pop(key, None)
    (raw if level == "wrapper" else raw["text_config"]).update(values)
    config = read_text_config("x", raw).config
    assert {key: getattr(config, key) for key in values} == values


@pytest.mark.parametrize("tied", ["wrapper", "text", "neither"])
def test_ties_of_either_level_are_kept(tied, tmp_path, token_ids):
    model = make_wrapper("qwen3_vl")
    tensors = save_wrapper(model, tmp_path / "source")
    config = read_json(tmp_path / "source/config.json")
    config["tie_word_embeddings"] = tied == "wrapper"
    config["text_config"]["tie_word_embeddings"] = tied == "text"
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    if tied == "neither":
        head = {"lm_head.weight": torch.randn(tensors["model.language_model.embed_tokens.weight"].shape)}
        save_file(tensors | head, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "source").eval()
    metrics = import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out")
    assert metrics["tied_embeddings"] is (tied != "neither")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, model(input_ids=token_ids).logits)


def test_a_missing_an_unknown_and_a_double_tensor_are_refused_by_name(tmp_path):
    tensors = save_wrapper(make_wrapper("gemma3"), tmp_path / "source")
    path, name = tmp_path / "source/model.safetensors", "model.language_model.layers.1.mlp.up_proj.weight"
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    for changed, message in (
        (missing, r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (tensors | {"model.audio.weight": torch.zeros(1)}, r"1 unexpected \(model\.audio\.weight\)"),
        (tensors | {"language_model.lm_head.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}, "holds two"),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ModelImportError, match=message):
            import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrapper_that_reads_text_in_another_way_is_refused(monkeypatch):
    text = read_text_config("x", {"model_type": "gemma3"} | copy.deepcopy(CONFIGS["gemma3"]))
    assert check_text_forward("x", text) < 1e-6  # measured: 0
    text.config.rms_norm_eps = 1e-6
    with pytest.raises(UnsupportedModelError, match=r"'gemma3' reads text in another way .* 'gemma3_text' does"):
        check_text_forward("x", text)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "internvl", "text_config": {"model_type": "internlm2"}}, "'internvl' wraps .*'internlm2'"),
        ({"model_type": "llava", "text_config": {"model_type": "gpt2"}}, "'llava' wraps .*'gpt2'"),
    ],
)
def test_a_wrapper_of_an_unsupported_text_model_is_refused_by_name(raw, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match=message):
        import_model(str(tmp_path), None, torch.float32, tmp_path / "out")


def test_names_of_a_part_are_dropped_and_others_stay():
    names = ["model.language_model.layers.0.input_layernorm.weight", "model.visual.x", "lm_head.weight", "other.weight"]
    places, dropped = rename_tensors("x", WRAPPERS["qwen3_vl"], names)
    assert places == {
        "model.layers.0.input_layernorm.weight": names[0],
        "lm_head.weight": "lm_head.weight",
        "other.weight": "other.weight",
    }
    assert dropped == {"model.visual.x": "visual"}


def test_every_wrapper_is_tested_and_positions_scale_the_queries_of_ministral3(token_ids):
    assert {name.partition(" ")[0] for name in CONFIGS} == set(WRAPPERS)
    model = make_wrapper("mistral3 ministral3")
    with torch.no_grad():
        scaled = model(input_ids=token_ids).logits
        model.config.text_config.rope_parameters["llama_4_scaling_beta"] = 0.0
        same = (model(input_ids=token_ids).logits == scaled).all(-1).all(0)
    assert same[:8].all()
    assert not same[8:].any()


def test_the_text_family_of_a_config_without_one_is_the_default_of_the_wrapper():
    assert wrappers.find_text_family({"model_type": "mistral3", "text_config": {}}) == "mistral"
    assert wrappers.find_text_family({"model_type": "gemma3"}) == "gemma3_text"
    assert wrappers.find_text_family({"model_type": "qwen2_5_vl"}) == "qwen2"


def test_the_imported_folder_is_of_the_text_model_alone(tmp_path):
    save_wrapper(make_wrapper("smolvlm"), tmp_path / "source")
    (tmp_path / "source/preprocessor_config.json").write_text("{}")
    import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*processor*"))
    config = read_json(tmp_path / "out/config.json")
    assert config["model_type"] == "llama"
    assert not {"vision_config", "text_config"} & set(config)

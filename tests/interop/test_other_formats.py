"""Formats of other programs, read back by their own libraries: the same logits, or an error that names the loss."""

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.export.folder import export_model
from pipeline.inference.prefixed_model import assemble_model
from pipeline.interop.compressed_tensors import pack_words
from pipeline.interop.other_formats import FormatError, compare_formats, write_formats
from pipeline.models.architectures import count_experts
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.experts import PROJECTIONS
from pipeline.numerics.quantizer import integer_range
from pipeline.runtime.artifacts import load_tensors, make_header
from tests.conftest import WINDOW, read_json
from tests.export.test_folder import NEEDS_PROC, check_parts, collect_parts
from tests.inference.test_prefixed_model import make_quantized

TEXT = torch.randint(2, 320, (2, 14), generator=torch.Generator().manual_seed(3))
# Settings that the formats can hold: no R4, no quantized cache, nothing centered.
PLAIN = {f"{group}.bits": 16 for group in ("activations", "keys", "values")} | {
    f"{group}.centered": False for group in ("weights", "activations")
}
KINDS = {
    "W4": {},
    "W3 asymmetric groups": {"weights.bits": 3, "weights.symmetric": False, "weights.group_size": 4},
    "W8A8 static": {"weights.bits": 8, "activations.bits": 8},
    "W8A8 static asymmetric": {"weights.bits": 8, "activations.bits": 8, "activations.symmetric": False},
    "W4A4 static": {"activations.bits": 4},
    "W4A4 static asymmetric": {"activations.bits": 4, "activations.symmetric": False},
    "W2A8 dynamic": {
        "weights.bits": 2,
        "activations.bits": 8,
        "activations.mode": "dynamic",
        "activations.symmetric": False,
        "activations.clipping": False,
    },
    "mixed": {
        "overrides": [
            {"sites": ["down_proj"], "blocks": [0, 2], "bits": 8},
            {"sites": ["q_proj"], "bits": 16},
            {"sites": ["v_proj"], "group_size": 8},
        ]
    },
}

READ = ["llama_tied", "llama_untied_biases", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"]


def write(imported, folder, family, changes, *, formats=("compressed-tensors",), drop=(), prefix=(), **rotation):
    """Return the quantized model in memory, the folder of formats and their contents."""
    checkpoint, _ = make_quantized(imported, folder, family, PLAIN | changes, prefix, **{"r4": "identity"} | rotation)
    kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    contents = write_formats(
        checkpoint,
        kv,
        folder / "formats",
        formats=list(formats),
        drop=list(drop),
        max_shard_size="5GB",
        header=make_header("export", {}),
    )
    return assemble_model(checkpoint, kv), folder / "formats", contents


@NEEDS_PROC
def test_unwritten_shards_keep_no_file_mapped(imported, tmp_path, monkeypatch):
    collected = collect_parts(monkeypatch, "pipeline.interop.compressed_tensors")
    write(imported, tmp_path, "llama_untied_biases", {})
    check_parts(collected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", READ)
@torch.no_grad()
def test_compressed_tensors_computes_the_same_logits(imported, tmp_path, family, kind):
    model, folder, contents = write(imported, tmp_path, family, KINDS[kind])
    asymmetric = kind == "W3 asymmetric groups"
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if asymmetric else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder / "compressed-tensors", **options)
    described = read_json(folder / "compressed-tensors" / "config.json")["quantization_config"]
    assert described["format"] == ("int-quantized" if kind.startswith("W8A8") else "pack-quantized")
    expected = model(TEXT).logits
    # Measured: at most 7e-7 of the largest logit.
    same = ((loaded(TEXT).logits - expected).abs() <= 1e-5 * expected.abs().max()).all(-1)
    if kind != "W2A8 dynamic":
        assert same.all()
    else:  # its scales come from sums in another order, so a value between two integers may round to the other one
        assert same.float().mean() > 0.4  # measured: 0.5 to 0.96 of the tokens
        return
    parts = contents["compressed-tensors"]
    assert read_json(folder / "manifest.json") == {"compressed-tensors": vars(parts)}
    assert (parts.keeps, parts.drops) == (["weights", *(["activations"] if "A" in kind else [])], [])
    assert ("dequantize=True" in parts.load) == asymmetric
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(TEXT, **options), model.generate(TEXT, **options))


@pytest.mark.parametrize("family", ["exaone4", "glm4", "ministral3", "phi3_partial", "vaultgemma"])
@torch.no_grad()
def test_compressed_tensors_holds_near_families(imported, tmp_path, family):
    model, folder, _ = write(imported, tmp_path, family, {}, r1="identity")
    expected = model(TEXT).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder / "compressed-tensors")
    assert (loaded(TEXT).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_llama_keeps_biases_of_centered_weights(imported, tmp_path):
    changes = {"weights.centered": True, "activations.bits": 8}
    model, folder, _ = write(imported, tmp_path, "llama_tied", changes)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "compressed-tensors")
    assert loaded.config.attention_bias
    assert loaded.config.mlp_bias
    expected = model(TEXT).logits
    assert (loaded(TEXT).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "olmo2"])
@torch.no_grad()
def test_adapter_carries_the_prefix(imported, tmp_path, family):
    formats = ("compressed-tensors", "peft")
    options = {"formats": formats, "prefix": (5, 9, 0)}
    model, folder, contents = write(imported, tmp_path, family, {"activations.bits": 8}, **options)
    base = AutoModelForCausalLM.from_pretrained(folder / "compressed-tensors")
    without = base(TEXT).logits
    adapted = PeftModel.from_pretrained(base, folder / "peft")
    expected = model(TEXT).logits
    assert (adapted(TEXT).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (without - expected).abs().max() > 1e-2 * expected.abs().max()
    mask = torch.ones_like(TEXT)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(adapted.generate(input_ids=TEXT, **options), model.generate(TEXT, **options))
    assert {name: (parts.keeps, parts.drops) for name, parts in contents.items()} == {
        "compressed-tensors": (["weights", "activations"], ["prefix"]),
        "peft": (["prefix"], []),
    }
    assert AutoTokenizer.from_pretrained(folder / "compressed-tensors")("a")["input_ids"]


def test_adapter_is_refused_for_sliding_layers(imported, tmp_path):
    formats = ("compressed-tensors", "peft")
    with pytest.raises(FormatError, match=rf"layers that slide \(sliding_window={WINDOW}\).*Remove peft"):
        write(imported, tmp_path, "gemma2", {"activations.bits": 8}, formats=formats, prefix=(5, 9, 0))


def test_tokenizers_add_no_start_token_to_a_prefix_that_ends_in_it(imported, tmp_path):
    """Once, writing the adapter's base gave the exported folder, written next, a tokenizer that adds one."""
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", PLAIN, (5, 9, 0), r4="identity")
    tokenizer = checkpoint.tokenizer
    plain = tokenizer("The house")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(checkpoint.folder)
    prefix, _ = load_tensors(checkpoint.folder / "prefix.safetensors", checkpoint.stage)
    header, formats = make_header("export", {}), ["compressed-tensors", "peft"]
    sizes = {"max_shard_size": "5GB", "header": header}
    write_formats(checkpoint, prefix["kv"], tmp_path / "formats", formats=formats, drop=[], **sizes)
    export_model(
        checkpoint,
        prefix,
        tmp_path / "export",
        original=imported["llama_tied"],
        results={},
        **sizes,
    )
    for folder in (tmp_path / "formats/compressed-tensors", tmp_path / "export"):
        assert AutoTokenizer.from_pretrained(folder)("The house")["input_ids"] == plain
    write_formats(checkpoint, prefix["kv"], tmp_path / "alone", formats=formats[:1], drop=["prefix"], **sizes)
    alone = AutoTokenizer.from_pretrained(tmp_path / "alone/compressed-tensors")
    assert alone("The house")["input_ids"] == [0, *plain]


def test_lost_parts_are_refused_together_or_listed(imported, tmp_path):
    changes = {"activations.bits": 4, "activations.centered": True, "keys.bits": 4, "values.bits": 4}
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", PLAIN | changes, r4="identity")
    with pytest.raises(FormatError) as error:
        compare_formats(checkpoint, True, ["compressed-tensors"], [])
    for problem in (
        "activations: the format has no centered",
        "keys: ",
        "values: ",
        "prefix: compressed-tensors has no",
    ):
        assert problem in str(error.value)
    drop = ["activations", "keys", "values", "prefix"]
    parts = compare_formats(checkpoint, True, ["compressed-tensors"], drop)["compressed-tensors"]
    assert (parts.keeps, parts.drops) == (["weights"], drop)
    assert compare_formats(checkpoint, True, [], []) == {}


def test_drop_cannot_excuse_a_broken_model(imported, tmp_path):
    drop = ["activations", "keys", "values", "prefix"]
    with pytest.raises(FormatError, match=r"rotation\.r4: down_proj expects a rotated input.*Use identity"):
        write(imported, tmp_path / "r4", "llama_tied", {}, drop=drop, r4="hadamard", r5="identity")
    with pytest.raises(FormatError, match=r"rotation\.r5: o_proj expects a rotated input.*Use identity"):
        write(imported, tmp_path / "r5", "llama_tied", {}, drop=drop, r5="hadamard")
    with pytest.raises(FormatError, match=r"biases to o_proj, gate_proj, up_proj, down_proj, and qwen2 models have"):
        write(imported, tmp_path / "bias", "qwen2", {"weights.centered": True, "activations.bits": 8}, drop=drop)
    with pytest.raises(FormatError, match=r"weights\.bits=16: the formats hold quantized weights"):
        write(imported, tmp_path / "none", "llama_tied", {"weights.bits": 16})
    with pytest.raises(FormatError, match=r"peft holds the prefix, and this model has none"):
        write(imported, tmp_path / "peft", "llama_tied", {}, formats=("compressed-tensors", "peft"))
    for changes, reason in {
        "static by groups": ({"activations.group_size": 4}, "no static ranges by groups"),
        "clipped": (
            {"activations.mode": "dynamic", "activations.symmetric": False, "activations.bits": 3},
            "never clipped",
        ),
        "asymmetric weights": ({"weights.symmetric": False}, "asymmetric weights only without"),
        "unquantized weights": ({"overrides": [{"sites": ["k_proj"], "bits": 16}]}, "weights of 16 bits"),
    }.values():
        folder = tmp_path / reason.replace(" ", "")
        with pytest.raises(FormatError, match=reason):
            write(imported, folder, "llama_tied", {"activations.bits": 8} | changes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_words_match_the_library(bits, symmetric):
    low, high = integer_range(bits, symmetric)
    integers = torch.randint(low, high + 1, (5, 37), generator=torch.Generator().manual_seed(bits))
    packed = pack_words(integers.to(torch.int8 if symmetric else torch.uint8), bits, symmetric)
    signed = integers if symmetric else integers + integer_range(bits)[0]
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((5, 37))).long(), signed)


def test_only_safetensors_and_json_are_written(imported, tmp_path):
    _, folder, _ = write(imported, tmp_path, "llama_tied", {})
    names = {path.name for path in (folder / "compressed-tensors").iterdir()}
    assert {path.rsplit(".", 1)[1] for path in names} <= {"safetensors", "json", "jinja"}
    config = json.loads((folder / "compressed-tensors" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "prefixquant" not in config


EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe"]
MIXTRAL_NAMES = ("mixtral", "minimax_m2")
ENGINE_INPUTS = {"activations.bits": 8, "activations.mode": "dynamic", "activations.clipping": False}


@pytest.mark.parametrize("changes", [{}, {"weights.group_size": 8}])
@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_experts_are_read_back_with_the_same_logits(imported, tmp_path, family, changes):
    model, folder, contents = write(imported, tmp_path, family, changes)
    folder = folder / "compressed-tensors"
    assert "dequantize=True" in contents["compressed-tensors"].load
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] | info["unexpected_keys"] | set(info["mismatched_keys"])
    expected = model(TEXT).logits
    assert (loaded(TEXT).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", EXPERTS)
def test_each_expert_and_projection_has_a_tensor_under_its_published_name(imported, tmp_path, family):
    changes = {"weights.bits": 8, "activations.symmetric": True} | ENGINE_INPUTS
    _, folder, contents = write(imported, tmp_path, family, changes)
    folder = folder / "compressed-tensors"
    assert contents["compressed-tensors"].keeps == ["weights", "activations"]
    assert contents["compressed-tensors"].load == "vllm.LLM(folder)"
    tensors = load_file(folder / "model-00001-of-00001.safetensors")
    checkpoint = Checkpoint(imported[family], "model")
    config, parts = checkpoint.config, ("w1", "w3", "w2") if family in MIXTRAL_NAMES else PROJECTIONS
    module = "block_sparse_moe" if family in MIXTRAL_NAMES else "mlp"
    gate = "gate.wg" if family == "hunyuan_v1_moe" else "gate"
    sparse = [index for index in range(3) if f"model.layers.{index}.{module}.{gate}.weight" in tensors]
    assert len(sparse) == {"qwen2_moe": 1, "glm4_moe": 1, "ernie4_5_moe": 1, "mixtral": 3, "olmoe": 3}.get(family, 2)
    for index in sparse:
        for expert in range(count_experts(config)):
            for part in parts:
                name = f"model.layers.{index}.{module}.experts.{expert}.{part}"
                weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
                assert (weight.dtype, scale.shape) == (torch.int8, (len(weight), 1))
    statics = {name for name in tensors if ".moe_statics." in name}
    places = {"model.layers.1.mlp.moe_statics.e_score_correction_bias"} if family == "ernie4_5_moe" else set()
    assert statics == places
    described = read_json(folder / "config.json")["quantization_config"]
    routers = {f"model.layers.{index}.{module}.{gate}" for index in sparse}
    assert routers | {"lm_head"} <= set(described["ignore"])
    inputs = described["config_groups"]["group_0"]["input_activations"]
    assert (inputs["dynamic"], inputs["symmetric"], inputs["strategy"]) == (True, True, "token")


def test_settings_that_engines_have_not_for_experts_are_refused_by_name(imported, tmp_path):
    with pytest.raises(FormatError, match="inputs of experts in int are dynamic, symmetric, of 8 bits and per token"):
        write(imported, tmp_path / "static", "olmoe", {"activations.bits": 8})
    with pytest.raises(FormatError, match="in block 0 the experts' gate_proj, up_proj and down_proj have different"):
        write(imported, tmp_path / "mixed", "olmoe", {"overrides": [{"sites": ["down_proj"], "bits": 8}]})
    with pytest.raises(FormatError, match="biases to gate_proj, up_proj, down_proj, and olmoe models have none"):
        write(imported, tmp_path / "bias", "olmoe", {"weights.centered": True})


def test_experts_with_a_clamped_gate_are_refused_by_name(imported, tmp_path):
    with pytest.raises(FormatError, match="model_type='gpt_oss' have biases and a gate of their own"):
        write(imported, tmp_path, "gpt_oss", {})


@pytest.mark.parametrize("formats", [["gguf"], ["compressed-tensors", "peft"]])
def test_other_formats_of_models_with_experts_are_refused_by_name(formats, imported):
    checkpoint = Checkpoint(imported["qwen3_moe"], "model")
    message = rf"model_type='qwen3_moe' has experts, and {formats[-1]} are written for dense models only"
    with pytest.raises(FormatError, match=message):
        compare_formats(checkpoint, False, formats, [])

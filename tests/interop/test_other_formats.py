"""Formats of others, read back by their own libraries: the same logits, or an error that says what would be lost."""

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from peft import PeftModel
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.export.folder import export_model
from pipeline.inference.prefixed_model import assemble_model
from pipeline.interop.compressed_tensors import pack_words
from pipeline.interop.other_formats import FormatError, plan_formats, write_formats
from pipeline.numerics.quantizer import integer_range
from pipeline.runtime.artifacts import load_tensors, make_header
from tests.conftest import WINDOW, read_json
from tests.export.test_folder import NEEDS_PROC, check_parts, collect_parts
from tests.inference.test_prefixed_model import make_quantized

TEXT = torch.randint(2, 320, (2, 14), generator=torch.Generator().manual_seed(3))
# Nothing that the format cannot express: no R4, no quantized cache, nothing centered.
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


def write(imported, folder, family, changes, formats=("compressed-tensors",), drop=(), prefix=(), **rotation):
    checkpoint, _ = make_quantized(imported, folder, family, PLAIN | changes, prefix, **{"r4": "identity"} | rotation)
    kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    place = folder / "formats", list(formats), list(drop)
    plans = write_formats(checkpoint, kv, *place, "5GB", make_header("export", {}))
    return assemble_model(checkpoint, kv), folder / "formats", plans


@NEEDS_PROC
def test_what_waits_for_a_full_shard_keeps_no_file_in_memory(imported, tmp_path, monkeypatch):
    collected = collect_parts(monkeypatch, "pipeline.interop.compressed_tensors")
    write(imported, tmp_path, "llama_untied_biases", {})
    check_parts(collected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", READ)
@torch.no_grad()
def test_compressed_tensors_computes_the_same_logits(imported, tmp_path, family, kind):
    ours, folder, plans = write(imported, tmp_path, family, KINDS[kind])
    asymmetric = kind == "W3 asymmetric groups"
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if asymmetric else {}
    theirs = AutoModelForCausalLM.from_pretrained(folder / "compressed-tensors", **options)
    described = read_json(folder / "compressed-tensors" / "config.json")["quantization_config"]
    assert described["format"] == ("int-quantized" if kind.startswith("W8A8") else "pack-quantized")
    expected = ours(TEXT).logits
    # Measured: at most 7e-7 of the largest logit.
    same = ((theirs(TEXT).logits - expected).abs() <= 1e-5 * expected.abs().max()).all(-1)
    if kind != "W2A8 dynamic":
        assert same.all()
    else:  # scales from other sums: what lies between two integers may go to the other one
        assert same.float().mean() > 0.4  # measured: 0.5 to 0.96 of the tokens
        return
    plan = plans["compressed-tensors"]
    assert read_json(folder / "manifest.json") == {"compressed-tensors": vars(plan)}
    assert (plan.keeps, plan.drops) == (["weights", *(["activations"] if "A" in kind else [])], [])
    assert ("dequantize=True" in plan.load) == asymmetric
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(TEXT, **options), ours.generate(TEXT, **options))


@torch.no_grad()
def test_biases_that_correct_the_mean_error_of_weights_find_a_place_in_llama(imported, tmp_path):
    changes = {"weights.centered": True, "activations.bits": 8}
    ours, folder, _ = write(imported, tmp_path, "llama_tied", changes)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "compressed-tensors")
    assert theirs.config.attention_bias
    assert theirs.config.mlp_bias
    expected = ours(TEXT).logits
    assert (theirs(TEXT).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "olmo2"])
@torch.no_grad()
def test_the_prefix_travels_as_an_adapter(imported, tmp_path, family):
    formats = ("compressed-tensors", "peft")
    ours, folder, plans = write(imported, tmp_path, family, {"activations.bits": 8}, formats, prefix=(5, 9, 0))
    base = AutoModelForCausalLM.from_pretrained(folder / "compressed-tensors")
    without = base(TEXT).logits
    theirs = PeftModel.from_pretrained(base, folder / "peft")
    expected = ours(TEXT).logits
    assert (theirs(TEXT).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (without - expected).abs().max() > 1e-2 * expected.abs().max()
    mask = torch.ones_like(TEXT)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(input_ids=TEXT, **options), ours.generate(TEXT, **options))
    assert {name: (plan.keeps, plan.drops) for name, plan in plans.items()} == {
        "compressed-tensors": (["weights", "activations"], ["prefix"]),
        "peft": (["prefix"], []),
    }
    assert AutoTokenizer.from_pretrained(folder / "compressed-tensors")("a")["input_ids"]


def test_an_adapter_is_refused_where_its_prefix_would_slide(imported, tmp_path):
    formats = ("compressed-tensors", "peft")
    with pytest.raises(FormatError, match=rf"layers that slide \(sliding_window={WINDOW}\).*remove peft"):
        write(imported, tmp_path, "gemma2", {"activations.bits": 8}, formats, prefix=(5, 9, 0))


def test_every_folder_with_the_prefix_has_a_tokenizer_without_start_token(imported, tmp_path):
    """Writing the adapter's base once left the exported folder, written next, with the tokenizer that adds one."""
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", PLAIN, (5, 9, 0), r4="identity")
    tokenizer = checkpoint.tokenizer
    plain = tokenizer("The house")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(checkpoint.folder)
    prefix, _ = load_tensors(checkpoint.folder / "prefix.safetensors", checkpoint.stage)
    header, formats = make_header("export", {}), ["compressed-tensors", "peft"]
    write_formats(checkpoint, prefix["kv"], tmp_path / "formats", formats, [], "5GB", header)
    export_model(
        checkpoint,
        prefix,
        tmp_path / "export",
        original=imported["llama_tied"],
        max_shard_size="5GB",
        header=header,
        results={},
    )
    for folder in (tmp_path / "formats/compressed-tensors", tmp_path / "export"):
        assert AutoTokenizer.from_pretrained(folder)("The house")["input_ids"] == plain
    write_formats(checkpoint, prefix["kv"], tmp_path / "alone", formats[:1], ["prefix"], "5GB", header)
    alone = AutoTokenizer.from_pretrained(tmp_path / "alone/compressed-tensors")
    assert alone("The house")["input_ids"] == [0, *plain]


def test_what_would_be_lost_is_refused_all_at_once_or_named_in_the_manifest(imported, tmp_path):
    changes = {"activations.bits": 4, "activations.centered": True, "keys.bits": 4, "values.bits": 4}
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", PLAIN | changes, r4="identity")
    with pytest.raises(FormatError) as error:
        plan_formats(checkpoint, True, ["compressed-tensors"], [])
    for what in (
        "activations: the format knows no centered",
        "keys: ",
        "values: ",
        "prefix: compressed-tensors has no",
    ):
        assert what in str(error.value)
    drop = ["activations", "keys", "values", "prefix"]
    plan = plan_formats(checkpoint, True, ["compressed-tensors"], drop)["compressed-tensors"]
    assert (plan.keeps, plan.drops) == (["weights"], drop)
    assert plan_formats(checkpoint, True, [], []) == {}


def test_what_cannot_be_left_out_is_refused_whatever_may_be_dropped(imported, tmp_path):
    drop = ["activations", "keys", "values", "prefix"]
    with pytest.raises(FormatError, match=r"rotation\.r4=hadamard.*\n?.*set rotation\.r4: identity"):
        write(imported, tmp_path / "r4", "llama_tied", {}, drop=drop, r4="hadamard", r5="identity")
    with pytest.raises(FormatError, match=r"rotation\.r5=hadamard.*\n?.*set rotation\.r5: identity"):
        write(imported, tmp_path / "r5", "llama_tied", {}, drop=drop, r5="hadamard")
    with pytest.raises(FormatError, match=r"biases of o_proj, gate_proj, up_proj, down_proj: qwen2 models have none"):
        write(imported, tmp_path / "bias", "qwen2", {"weights.centered": True, "activations.bits": 8}, drop=drop)
    with pytest.raises(FormatError, match=r"weights: none are quantized"):
        write(imported, tmp_path / "none", "llama_tied", {"weights.bits": 16})
    with pytest.raises(FormatError, match=r"peft: there is no prefix"):
        write(imported, tmp_path / "peft", "llama_tied", {}, ("compressed-tensors", "peft"))
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
def test_words_are_those_of_the_library(bits, symmetric):
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

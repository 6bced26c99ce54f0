"""Models that the ONNX format refuses, by name. `write_onnx` is tested in test_onnx_session.py."""

import pytest

from pipeline.export.params import OnnxParams
from pipeline.interop.onnx_folder import MissingExtraError, describe_for_genai, find_onnx_obstacles, write_onnx
from pipeline.interop.other_formats import FormatError, compare_formats
from pipeline.runtime.artifacts import make_header
from tests.inference.test_prefixed_model import make_quantized

EIGHT = {f"{group}.bits": 8 for group in ("weights", "activations", "keys", "values")}
MERGED = {"r3": "identity", "r4": "identity", "r5": "identity"}


def refuse(checkpoint, **settings):
    """Return the message of the refusal."""
    with pytest.raises(FormatError) as error:
        compare_formats(checkpoint, True, ["onnx"], [], OnnxParams(**settings))
    return str(error.value)


def test_settings_without_a_pair_are_refused_by_name(imported, tmp_path):
    changes = EIGHT | {
        "weights.bits": 4,
        "activations.bits": 4,
        "keys.mode": "dynamic",
        "keys.range": "max",
        "values.group_size": 4,
    }
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", changes, (), r4="identity", r3="identity")
    message = refuse(checkpoint)
    for reason in (
        "quantizer_init: bits=4, format='int' of mlp_hidden: the onnx format has integers of 8 and 16 bits. Use bits: "
        "8, or format: int16 with bits: 16.",
        "quantizer_init: mode='dynamic' of key: a QDQ pair has a static scale. Use static.",
        "quantizer_init: group_size=4 of value: the onnx format has one scale per tensor, or per head",
    ):
        assert reason in message
    assert "q_proj" not in message


def test_online_rotations_wider_than_allowed_are_refused(imported, tmp_path):
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", EIGHT, ())
    message = refuse(checkpoint)
    assert "rotation.r3: it acts online, and its matrix [12, 12] is wider than export.onnx.widest_rotation=0" in message
    message = refuse(checkpoint, widest_rotation=48)
    assert "rotation.r4: it acts online, and its matrix [96, 96] is wider than" in message
    assert "rotation.r3" not in message
    assert "rotation.r5" not in message
    contents = compare_formats(checkpoint, True, ["onnx"], [], OnnxParams(widest_rotation=96))
    assert contents["onnx"].keeps == ["weights", "activations", "keys", "values", "prefix"]
    assert contents["onnx"].drops == []


def test_a_past_of_integers_needs_keys_that_are_integers(imported, tmp_path):
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", EIGHT | {"values.bits": 16}, (), **MERGED)
    message = refuse(checkpoint, cache="integer")
    assert "export.onnx.cache='integer': values are not quantized. Set quantizer_init.values.bits: 8" in message
    assert "keys that are centered, rotated by R3 or quantized before RoPE" in message
    assert find_onnx_obstacles(checkpoint, [], OnnxParams()) == []


def test_other_families_are_refused(imported, tmp_path):
    checkpoint, _ = make_quantized(imported, tmp_path, "gemma3_text", EIGHT, (), **MERGED, r1="identity")
    assert "model_type='gemma3_text' was never compared in ONNX Runtime; compared are llama, mistral," in refuse(
        checkpoint
    )


def test_without_the_extra_the_export_names_it(imported, tmp_path, monkeypatch):
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", EIGHT, (), **MERGED)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onnx, onnxscript, onnx_ir not installed\. Install the extra"):
        write_onnx(checkpoint, None, tmp_path, params=OnnxParams(), header=make_header("export", {}))


def test_genai_config_has_the_sizes_and_names_of_the_graph(imported, tmp_path):
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", EIGHT, (), **MERGED)
    model = describe_for_genai(checkpoint)["model"]
    assert model["decoder"]["head_size"] == 12
    assert model["decoder"]["num_key_value_heads"] == 2
    assert model["decoder"]["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert (model["eos_token_id"], model["pad_token_id"]) == (1, 1)

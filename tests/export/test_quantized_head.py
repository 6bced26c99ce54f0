"""With `quantizer_init.lm_head_bits: 8`, the loaded export is the evaluated model; other formats refuse it."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import pipeline.hf  # noqa: F401
from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.evaluation.perplexity import evaluate_model, evaluate_windows
from pipeline.importing.import_model import import_model
from pipeline.inference.loading import load
from pipeline.interop.other_formats import FormatError, compare_formats
from pipeline.models.checkpoint import LM_HEAD, Checkpoint
from pipeline.models.lm_head import QuantizedHead, quantize_head
from pipeline.planning.disk import OtherFiles
from tests.conftest import read_json
from tests.export.test_folder import TEXT, make_export
from tests.inference.test_prefixed_model import make_quantized

EIGHT = {"lm_head_bits": 8}
FAMILIES = ["llama_tied", "llama_untied_biases", "qwen2", "gemma2"]


@pytest.mark.parametrize("r1", ["online", "hadamard"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_loaded_model_is_the_evaluated_model(imported, tmp_path, family, r1):
    if family == "gemma2" and r1 == "hadamard":
        pytest.skip("R1 is not merged into blocks with norms after their outputs")
    folder, evaluated, _ = make_export(imported, tmp_path, family, changes=EIGHT, r1=r1)
    settings = read_json(folder / "config.json")
    assert settings["quantization_config"][LM_HEAD] == {"bits": 8, "rotate": r1 == "online"}
    assert not settings["tie_word_embeddings"]
    model, _ = load(folder)
    assert isinstance(model.lm_head, QuantizedHead)
    assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TEXT).logits, evaluated(TEXT).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(TEXT, **options), evaluated.generate(TEXT, **options))
    hidden = torch.randn(3, model.config.hidden_size)
    integer, _ = load(folder, arithmetic="integer")
    expected = model.lm_head(hidden)
    assert (integer.lm_head(hidden) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(copy.deepcopy(integer).lm_head(hidden), integer.lm_head(hidden))


@torch.no_grad()
def test_head_is_the_models_own_rounded_and_the_embedding_stays(imported, tmp_path):
    """The tied head gets weights of its own."""
    exact, _ = make_quantized(imported, tmp_path / "16")
    checkpoint, _runner = make_quantized(imported, tmp_path / "8", changes=EIGHT, prefix=[])
    names = checkpoint.architecture
    embedding = checkpoint.load_tensor(names.embedding)
    assert torch.equal(embedding, exact.load_tensor(names.embedding))
    rotated = Checkpoint(tmp_path / "8/rotation", "rotation").load_tensor(names.lm_head)
    integers, scale = quantize_head(rotated, checkpoint.settings[LM_HEAD]["rotate"])
    assert torch.equal(checkpoint.load_tensor(names.lm_head), integers)
    assert torch.equal(checkpoint.load_tensor(f"{names.lm_head}_scale"), scale)
    assert LM_HEAD not in exact.settings
    files = OtherFiles.measure(checkpoint)
    assert files.distinct_tables == files.tables >= integers.numel() * 3 + scale.numel() * 4


@torch.no_grad()
def test_evaluation_of_the_checkpoint_equals_that_of_the_export(imported, tmp_path):
    folder, _, _ = make_export(imported, tmp_path, changes=EIGHT)
    checkpoint = Checkpoint(tmp_path / "quantized", "quantizer_init")
    _, runner = make_quantized(imported, tmp_path / "other")
    kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    walked, tensors, _ = evaluate_windows(checkpoint, {"text": TEXT}, runner, prefix_kv=kv)
    model, _ = load(folder)
    loaded, loaded_tensors, _ = evaluate_model(model, {"text": TEXT}, 2, None)
    assert torch.equal(tensors["loss.text"], loaded_tensors["loss.text"])
    assert walked["perplexity"] == loaded["perplexity"]
    exact, _ = make_quantized(imported, tmp_path / "exact")
    plain, _, _ = evaluate_windows(exact, {"text": TEXT}, runner, prefix_kv=kv)
    assert 0 < abs(plain["perplexity"]["text"] - walked["perplexity"]["text"]) < 0.01 * plain["perplexity"]["text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_models_imported_in_a_dtype_are_loaded_as_evaluated(model_folders, tmp_path, dtype):
    imported = {"qwen3": tmp_path / "model"}
    import_model(str(model_folders["qwen3"]), None, dtype, imported["qwen3"])
    folder, evaluated, _ = make_export(imported, tmp_path, "qwen3", changes=EIGHT, dtype=dtype)
    model, _ = load(folder)
    assert model.dtype == dtype
    assert torch.equal(model(TEXT).logits, evaluated(TEXT).logits)
    narrow, _ = load(folder, dtype=torch.bfloat16)
    assert narrow.lm_head.weight_scale.dtype == torch.float32
    assert narrow(TEXT).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf", "onnx"])
def test_other_formats_refuse_it_by_name(imported, tmp_path, name):
    changes = EIGHT | {f"{group}.bits": 16 for group in ("activations", "keys", "values")}
    rotations = {"r1": "hadamard", "r3": "identity", "r4": "identity", "r5": "identity"}
    checkpoint, _ = make_quantized(
        imported, tmp_path, changes=changes | {"weights.centered": False}, prefix=[], **rotations
    )
    with pytest.raises(FormatError, match=rf"quantizer_init.lm_head_bits=8: {name} cannot hold lm_head"):
        compare_formats(checkpoint, False, [name], [])

import functools
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_gguf import write_gguf
from pipeline.importing import folder_source, gguf_source
from pipeline.importing.import_model import import_model
from pipeline.importing.rewriting import rewrite_checkpoint
from pipeline.inspection import import_gate
from pipeline.inspection.import_gate import ImportGateError, check_import
from pipeline.models.checkpoint import CheckpointWriter
from tests.conftest import FAMILIES, NEAR_FAMILIES, make_model, make_tokenizer

ROOMY, NARROW = (functools.partial(check_import, limit=limit) for limit in (1e15, 0))


@pytest.mark.parametrize("family", [*FAMILIES, *NEAR_FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_and_by_block_every_family_passes_and_the_metrics_say_which(family, dtype, model_folders, tmp_path):
    for gate, name in ((ROOMY, "whole"), (NARROW, "by block")):
        metrics = import_model(str(model_folders[family]), None, dtype, tmp_path / "out", check_result=gate)
        assert metrics["import_gate"] == name
        assert metrics["max_logit_deviation"] < 1e-5  # measured: 0; 4e-7 where linears are taken apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama_untied_biases", "gemma3_text"])
def test_gguf_files_pass_by_block(family, dtype, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(family), make_tokenizer())
    metrics = import_model(str(path), None, dtype, tmp_path / "out", check_result=ROOMY)
    assert metrics["import_gate"] == "by block"
    assert metrics["max_logit_deviation"] < 1e-5  # measured: 0


def assert_refused(source, folder, gate):
    with pytest.raises(
        ImportGateError, match=r"not what transformers reads .* allowed are 1e-04\. Nothing was written"
    ):
        import_model(str(source), None, torch.float32, folder / "out", check_result=gate)
    assert not (folder / "out").exists()
    assert not (folder / ".out.partial").exists()


@pytest.mark.parametrize("gate", [ROOMY, NARROW])
def test_weights_that_overflow_float32_are_refused(gate, model_folders, tmp_path):
    """In float64, which tells rounding from mistakes, both sides agree; nobody could use the model."""
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = 2e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ImportGateError, match="logits are not finite in float32; its weights are damaged"):
        import_model(str(folder), None, torch.float32, tmp_path / "out", check_result=gate)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "function", "wrong"),
    [
        ("llama_tied", "_unpermute", lambda tensor, heads: tensor),
        ("gemma3_text", "_read_tensor", lambda file, name, config: file.read(name)),
        ("qwen2", "_read_tensor", lambda file, name, config: file.read(name.replace("blk.2.", "blk.1."))),
    ],
)
def test_a_gguf_file_read_wrongly_is_refused(family, function, wrong, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", make_model(family), make_tokenizer())
    monkeypatch.setattr(gguf_source, function, wrong)
    assert_refused(path, tmp_path, ROOMY)


@pytest.mark.parametrize("gate", [ROOMY, NARROW])
def test_parts_of_a_fused_linear_in_another_order_are_refused(gate, model_folders, tmp_path, monkeypatch):
    other = {"k_proj": "v_proj", "v_proj": "k_proj"}

    def swap(config, names, read):
        plain = rewrite_checkpoint(config, names, read)

        def read_swapped(name):
            return plain.read(next((name.replace(part, to) for part, to in other.items() if part in name), name))

        return replace(plain, read=read_swapped)

    monkeypatch.setattr("pipeline.importing.import_model.rewrite_checkpoint", swap)
    assert_refused(model_folders["phi3"], tmp_path, gate)


def test_other_files_than_transformers_reads_are_refused(model_folders, tmp_path, monkeypatch):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    tensors = dict(make_model("llama_tied", seed=1).named_parameters())
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, folder / "other.safetensors")
    monkeypatch.setattr(folder_source, "_list_shards", lambda source, folder: [folder / "other.safetensors"])
    assert_refused(folder, tmp_path, ROOMY)


@pytest.mark.parametrize("gate", [ROOMY, NARROW])
def test_a_wrongly_written_tensor_is_refused(gate, model_folders, tmp_path, monkeypatch):
    right = CheckpointWriter.write_embeddings

    def write(self, tensors):
        right(self, tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1.1})

    monkeypatch.setattr(CheckpointWriter, "write_embeddings", write)
    assert_refused(model_folders["qwen2"], tmp_path, gate)


@pytest.mark.parametrize("family", ["phi3", "gemma2"])
@pytest.mark.parametrize("gate", [ROOMY, NARROW])
def test_rounding_that_float32_blows_up_is_told_from_an_error_in_float64(
    gate, family, model_folders, tmp_path, monkeypatch
):
    right, seen = import_gate._embed, []

    def blow_up(checkpoint, token_ids, dtype):
        seen.append(dtype)
        return right(checkpoint, token_ids, dtype) * (1 + 1e-3 * (dtype == torch.float32))

    monkeypatch.setattr(import_gate, "_embed", blow_up)
    metrics = import_model(str(model_folders[family]), None, torch.float32, tmp_path / "out", check_result=gate)
    assert seen == [torch.float32, torch.float64]
    assert metrics["max_logit_deviation"] < 1e-6  # measured: 4e-8: logits are rounded to float32


def test_nan_is_no_agreement():
    expected = torch.ones(3)
    assert import_gate._relative_deviation(torch.tensor([1.0, float("nan"), 1.0]), expected) == float("inf")
    assert import_gate._relative_deviation(torch.tensor([1.0, 1.5, 1.0]), expected * 2) == 0.5

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.importing.import_model import ModelImportError, import_model
from pipeline.importing.leftovers import find_ignored
from tests.conftest import read_json

CONFIG = SimpleNamespace(num_hidden_layers=3, num_nextn_predict_layers=1)


def add_tensors(folder, tensors, settings=()):
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
    config = read_json(folder / "config.json") | dict(settings)
    (folder / "config.json").write_text(json.dumps(config))


def test_heads_for_multi_token_prediction_are_dropped_and_reported(model_folders, imported, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    extra = {
        "mtp.layers.0.fc.weight": torch.ones(4, 2),
        "model.layers.3.eh_proj.weight": torch.ones(2, dtype=torch.bfloat16),
    }
    add_tensors(folder, extra, {"num_nextn_predict_layers": 1})
    metrics = import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert metrics["dropped_tensors"] == 2
    assert read_json(tmp_path / "out/report.json") == {
        "dropped": {"multi-token prediction": {"tensors": 2, "bytes": 4 * 2 * 4 + 2 * 2}}
    }
    name = "block-00002.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (imported["llama_tied"] / name).read_bytes()


def test_without_left_overs_there_is_no_report(imported):
    assert not (imported["llama_tied"] / "report.json").exists()


def test_tensors_that_the_model_class_ignores_are_dropped():
    class Skeleton(nn.Module):
        _keys_to_ignore_on_load_unexpected = (r"model\.layers\.46.*",)

    names = {"model.layers.46.eh_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.9.x", "y"}
    assert find_ignored(names, CONFIG, Skeleton()) == {
        "model.layers.46.eh_proj.weight": "ignored by the model class",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "tables of RoPE",
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "LoRA adapters must be merged first: with peft",
        ),
        ("model.layers.0.self_attn.q_proj.weight_scale", "look like scales of quantized weights"),
        ("model.layers.3.mlp.up_proj.weight", "has no place for the unexpected ones"),  # the config announces none
        ("score.weight", "has no place for the unexpected ones"),
    ],
)
def test_other_left_overs_are_refused_with_a_remedy(name, message, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    add_tensors(folder, {name: torch.ones(2, 2)})
    with pytest.raises(ModelImportError, match=message) as error:
        import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert name in str(error.value)
    assert not (tmp_path / "out").exists()

"""The gate refuses a wrong rotation, and neither rounding nor a narrower dtype counts as wrong."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.blocks.quantized import fill_block
from pipeline.importing.import_model import import_model
from pipeline.rotation import gate, merging
from pipeline.rotation.gate import RotationError, compute_exactly_
from tests.conftest import open_model
from tests.rotation.test_merging import rotate


def test_a_narrower_dtype_is_reported_but_not_judged(imported, tmp_path):
    rotated, _, metrics = rotate(imported["llama_tied"], tmp_path / "out", dtype=torch.bfloat16)
    assert rotated.dtype == torch.bfloat16
    assert metrics["max_logit_deviation"] < 1e-12
    assert metrics["float32_logit_deviation"] < 1e-5 < metrics["dtype_logit_deviation"] < 0.1


@pytest.mark.parametrize("r1", ["hadamard", "online"])
def test_rope_in_float32_is_judged_in_float64(r1, imported, tmp_path, monkeypatch):
    """ernie4_5_moe rounds queries and keys to float32 in a model of any dtype."""
    _, _, metrics = rotate(imported["ernie4_5_moe"], tmp_path / "out", r1=r1)
    assert metrics["max_logit_deviation"] < 1e-12  # measured: 4e-15
    checkpoint, runner = open_model(imported["ernie4_5_moe"])
    hidden = torch.randn(1, 40, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run():
        block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), None, dtype=torch.float64)
        compute_exactly_(block)
        return runner.run(block, hidden)

    exact = run()
    monkeypatch.setattr(gate, "_turn_exactly_", lambda attention: None)
    deviation = (run() - exact).abs().max() / exact.abs().max()
    assert 1e-9 < deviation < 1e-6  # measured: 5e-8


@pytest.mark.parametrize(
    ("description", "damage"),
    [
        ("a reader off by one percent", lambda t: t["self_attn.q_proj.weight"].mul_(1.01)),
        ("a bias of v_proj in another basis", lambda t: t["self_attn.v_proj.bias"].add_(0.1)),
        (
            "another R4 merged than applied",
            lambda t: t.update({"mlp.down_proj.weight": t["mlp.down_proj.weight"].flip(1)}),
        ),
    ],
)
def test_the_gate_stops_a_wrong_rotation_and_writes_nothing(description, damage, imported, tmp_path, monkeypatch):
    rotate_block = merging.rotate_block

    def rotate_wrongly(tensors, architecture, **settings):
        rotated = dict(rotate_block(tensors, architecture, **settings))
        damage(rotated)
        yield from rotated.items()

    monkeypatch.setattr(merging, "rotate_block", rotate_wrongly)
    with pytest.raises(RotationError, match="is not the original: logits differ by"):
        rotate(imported["llama_untied_biases"], tmp_path / "out")
    assert not list(tmp_path.iterdir()), description


def test_rounding_of_massive_activations_passes_the_gate(model_folders, tmp_path):
    """With hidden states in the tens of thousands, float32 alone differs by more than 1e-4."""
    folder = shutil.copytree(model_folders["llama_untied_biases"], tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][5] *= 1e4
    tensors["model.norm.weight"][5] = 1e-6  # so that the massive channel does not decide the logits
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import_model(str(folder), None, torch.float32, tmp_path / "model")
    _, _, metrics = rotate(tmp_path / "model", tmp_path / "out", r5="identity")
    assert metrics["float32_logit_deviation"] > 1e-4  # measured: 1.7e-4
    # The original deviates as much: measured 1.15 times.
    assert 0.5 < metrics["float32_original_deviation"] / metrics["float32_logit_deviation"] < 2
    assert metrics["max_logit_deviation"] < 1e-9

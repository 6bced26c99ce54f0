"""Blocks are initialised one after the other, on the outputs of their quantized predecessors."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from pipeline.blocks.quantized import fill_block, load_block
from pipeline.importing.import_model import import_model
from pipeline.quantization.quantizer_init import init_blocks, resolve_settings
from pipeline.runtime.artifacts import load_tensors, make_header
from tests.conftest import init_params
from tests.quantization.test_statistics import MAX, record
from tests.rotation.test_merging import rotate


def run_blocks(checkpoint, runner, token_ids, work, changes=None):
    hidden = checkpoint.embed(token_ids)
    init_blocks(
        checkpoint,
        hidden,
        None,
        params=init_params(changes or MAX),
        runner=runner,
        work_folder=work,
        header=make_header("q", {}),
    )
    return [load_tensors(work / f"block-{index:05d}.safetensors", "q")[0] for index in range(3)]


def test_scales_do_not_depend_on_the_order_of_windows(rotated, token_ids, tmp_path):
    checkpoint, runner = rotated
    first = run_blocks(checkpoint, runner, token_ids, tmp_path / "a")
    second = run_blocks(checkpoint, runner, token_ids.flip(0), tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        for name, tensor in one.items():
            assert torch.allclose(tensor.float(), other[name].float(), rtol=1e-5), name


@torch.no_grad()
def test_each_block_is_initialised_on_the_output_of_its_quantized_predecessors(rotated, token_ids, tmp_path):
    checkpoint, runner = rotated
    blocks = run_blocks(checkpoint, runner, token_ids, tmp_path / "a")
    hidden = checkpoint.embed(token_ids)
    quantized = {name.removeprefix("model.layers.0."): tensor for name, tensor in blocks[0].items()}
    runner.advance_(fill_block(checkpoint, 0, quantized, resolve_settings(init_params(MAX), checkpoint, 0)[0]), hidden)

    def scale_of(statistics):
        channels = statistics.sites["attention_input"].channels
        return torch.maximum(channels.high.max(), -channels.low.min()) / 7

    expected = scale_of(record(checkpoint, runner, hidden)[1])
    assert torch.allclose(blocks[1]["model.layers.1.input_layernorm.quantizer.scale"], expected, rtol=1e-5)
    unquantized = checkpoint.embed(token_ids)
    runner.advance_(load_block(checkpoint, 0), unquantized)
    assert not torch.allclose(scale_of(record(checkpoint, runner, unquantized)[1]), expected, rtol=1e-3)


def test_settings_combine_params_and_overrides_with_the_online_rotations_of_the_model(rotated):
    checkpoint, _ = rotated
    override = {"sites": ["down_proj", "mlp_hidden"], "blocks": [2], "bits": 8}
    params = init_params(
        {"overrides": [override], "keys.bits": 16, "values.mode": "dynamic", "values.symmetric": False}
    )
    settings, site_settings = resolve_settings(params, checkpoint, 1)
    assert settings.online_r3
    assert settings.online_r4
    assert settings.online_r5
    assert "key" not in site_settings
    assert not settings.spec("key").enabled
    assert settings.spec("value").dynamic
    assert not settings.spec("value").symmetric
    assert settings.spec("down_proj").bits == 4
    other, _ = resolve_settings(params, checkpoint, 2)
    assert (other.spec("down_proj").bits, other.spec("mlp_hidden").bits, other.spec("up_proj").bits) == (8, 8, 4)


def test_group_sizes_give_a_scale_per_group(imported, token_ids, tmp_path):
    checkpoint, runner, _ = rotate(imported["llama_tied"], tmp_path / "rotation")
    off = {f"{group}.bits": 16 for group in ("activations", "keys", "values")}
    changes = off | {"weights.bits": 3, "weights.group_size": 12, "weights.centered": False, "equalize": []}
    tensors = run_blocks(checkpoint, runner, token_ids, tmp_path, changes)[2]
    assert tensors["model.layers.2.mlp.down_proj.weight_scale"].shape == (48, 8)
    assert tensors["model.layers.2.mlp.down_proj.weight"].dtype == torch.int8
    assert tensors["model.layers.2.mlp.down_proj.weight"].abs().max() <= 4
    assert not any("quantizer" in name for name in tensors)


def test_large_key_biases_do_not_enlarge_the_error_of_centered_keys(model_folders, tmp_path):
    """As in Qwen2's first block: after RoPE a constant varies with the position and fills the range."""
    folder = shutil.copytree(model_folders["llama_untied_biases"], tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    for index in range(3):
        tensors[f"model.layers.{index}.self_attn.k_proj.bias"] *= 300
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import_model(str(folder), None, torch.float32, tmp_path / "model")
    checkpoint, runner, _ = rotate(tmp_path / "model", tmp_path / "rotation")
    hidden = torch.randn(4, 48, 48, generator=torch.Generator().manual_seed(1))
    errors = {}
    for centered in (True, False):
        reports = init_blocks(
            checkpoint,
            hidden.clone(),
            None,
            params=init_params({"keys.centered": centered}),
            runner=runner,
            work_folder=tmp_path / f"work-{centered}",
            header=make_header("quantizer_init", {"centered": centered}),
        )
        errors[centered] = max(report["sites"]["key"]["relative_error"] for report in reports)
    assert errors[True] < 0.02  # measured: 0.004
    assert errors[False] > 5 * errors[True]

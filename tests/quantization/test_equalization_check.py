import copy
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import SIZES, make_tokenizer, randomize_
from pipeline.blocks.quantized import block_settings, fill_block
from pipeline.importing.import_model import import_model
from pipeline.models.architectures import ARCHITECTURES, Architecture
from pipeline.quantization.equalization import Equalizer
from pipeline.quantization.equalization_check import EqualizationError, check_equalization
from pipeline.rotation.matrices import load_rotation
from tests.rotation.test_merging import rotate


def check(checkpoint, runner, rows=8, **changes):
    """Choose scales of block 1 from random text, and check them."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, rows, checkpoint.config.hidden_size, generator=generator)
    settings, r2 = block_settings(checkpoint, 1), load_rotation(checkpoint.folder, "r2")
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), settings)
    equalizer = Equalizer(block, checkpoint.architecture, settings, r2)
    sums = equalizer.make_sums()
    equalizer.add_(sums, hidden, torch.randn(hidden.shape, generator=generator), None, runner)
    scales = equalizer.choose({name: total / hidden[..., 0].numel() for name, total in sums.items()}, runner)
    kv = torch.randn(2, equalizer.kv_heads, 3, equalizer.head_dim, generator=generator)
    exact = type(runner)(checkpoint, runner.device, 1)
    return check_equalization(
        checkpoint, 1, scales | changes, settings=settings, r2=r2, hidden=hidden, prefix_kv=kv, runner=exact
    )


@pytest.mark.parametrize(
    "family",
    [
        "llama_untied_biases",
        "gemma3_text",
        "olmo2",
        "hunyuan_v1_dense",
        "arcee",
        "apertus",
        "gpt_oss",
        "ernie4_5_moe",
        "hunyuan_v1_moe",
    ],
)
def test_scaling_that_cancels_passes(family, imported, tmp_path):
    checkpoint, runner, _ = rotate(imported[family], tmp_path / "out", r1="online")
    assert check(checkpoint, runner) < 1e-10  # measured: 1e-13


def test_channels_of_a_pair_with_different_scales_are_refused(imported, tmp_path):
    checkpoint, runner, _ = rotate(imported["llama_tied"], tmp_path / "out")
    with pytest.raises(EqualizationError, match="block 1: scaling the channels of key changes the block's output"):
        check(checkpoint, runner, key=torch.linspace(0.5, 2, 24).view(2, 12))


def test_scales_of_the_wrong_pairs_are_refused(imported, tmp_path, monkeypatch):
    """ernie4_5_moe turns channels 2i and 2i + 1 together."""
    checkpoint, runner, _ = rotate(imported["ernie4_5_moe"], tmp_path / "out")
    check(checkpoint, runner, key=torch.linspace(0.5, 2, 12).view(2, 6).repeat_interleave(2, dim=1))
    halves = torch.arange(6).repeat(2)
    monkeypatch.setattr("pipeline.quantization.equalization.find_rope_groups", lambda block, runner: halves)
    with pytest.raises(EqualizationError, match="block 1: scaling the channels of key changes the block's output"):
        check(checkpoint, runner)


def test_a_gate_that_adds_one_to_up_is_not_scaled(imported, tmp_path, monkeypatch):
    """gpt_oss multiplies its gate by up + 1, within limits."""
    checkpoint, runner, _ = rotate(imported["gpt_oss"], tmp_path / "out", r1="online")
    name = "mlp_hidden.experts.1"
    with pytest.raises(AssertionError, match="mlp_hidden cannot be scaled in this family"):
        check(checkpoint, runner, **{name: torch.linspace(0.5, 2, 32)})
    monkeypatch.setattr(checkpoint, "architecture", replace(checkpoint.architecture, hidden_degree=1))
    with pytest.raises(EqualizationError, match=r"block 1: scaling the channels of mlp_hidden.* changes"):
        check(checkpoint, runner)


def test_an_mlp_without_a_gate_needs_its_degree(tmp_path, monkeypatch):
    """relu squared squares the scale of up_proj; the import of an entry without `hidden_degree` is right."""
    monkeypatch.setitem(ARCHITECTURES, "arcee", Architecture(mlp_readers=("mlp.up_proj",)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(transformers.ArceeConfig(**SIZES)))
    randomize_(model).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "model")
    checkpoint, runner, _ = rotate(tmp_path / "model", tmp_path / "out")
    with pytest.raises(EqualizationError, match="block 1: scaling the channels of mlp_hidden changes"):
        check(checkpoint, runner)

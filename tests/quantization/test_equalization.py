"""Equalized blocks compute what they computed, and lose less to quantization."""

import pytest
import torch

from pipeline.blocks.quantized import BlockSettings, block_settings, fill_block
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.quantization.equalization import equalize_mlp_
from tests.conftest import FAMILIES, open_model
from tests.rotation.test_merging import rotate

GENERATOR = torch.Generator().manual_seed(2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("centered", [True, False])
@torch.no_grad()
def test_the_block_computes_what_it_computed(family, centered, imported, tmp_path):
    checkpoint, runner, _ = rotate(imported[family], tmp_path / "out")
    hidden = torch.randn(3, 8, checkpoint.config.hidden_size, generator=GENERATOR)
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), block_settings(checkpoint, 1))
    expected = runner.run(block, hidden)
    scales = equalize_mlp_(block, checkpoint.architecture, hidden, None, runner, centered)
    assert scales.log().mean().abs() < 0.05
    assert scales.max() / scales.min() > 1.2
    found = runner.run(block, hidden)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # measured: 6e-7


@pytest.mark.parametrize("online", [True, False])
@torch.no_grad()
def test_scales_balance_channels_and_columns(online, imported):
    """After it, the energy of each hidden channel is that of its column up to one common factor."""
    checkpoint, runner = open_model(imported["llama_untied_biases"])
    settings = BlockSettings(online_r4=online)
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), settings)
    if online:  # as the rotation stage leaves it
        block.mlp.down_proj.weight = hadamard_transform(block.mlp.down_proj.weight)
    hidden = torch.randn(3, 8, 48, generator=GENERATOR)
    seen = []
    block.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))

    def product():
        seen.clear()
        runner.run(block, hidden)
        x = torch.cat(seen)
        columns = block.mlp.down_proj.weight
        columns = hadamard_transform(columns, inverse=True) if online else columns
        energy = (x - x.mean(0)).square().mean(0)
        return energy, columns.square().sum(0)

    channels, columns = product()
    before = channels.sum() * columns.sum()
    least = (channels.sqrt() * columns.sqrt()).sum().square()
    equalize_mlp_(block, checkpoint.architecture, hidden, None, runner, centered=True)
    channels, columns = product()
    assert (channels.sum() * columns.sum()).item() == pytest.approx(least.item(), rel=1e-3)
    assert least < 0.95 * before
    ratio = channels / columns
    assert ratio.max() / ratio.min() < 1.001


@torch.no_grad()
def test_silent_channels_keep_their_scale(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    tensors = checkpoint.load_block_tensors(1)
    tensors["mlp.up_proj.weight"][5] = 0
    block = fill_block(checkpoint, 1, tensors, BlockSettings())
    hidden = torch.randn(1, 8, 48, generator=GENERATOR)
    scales = equalize_mlp_(block, checkpoint.architecture, hidden, None, runner, centered=False)
    assert scales[5] == 1
    assert torch.isfinite(scales).all()
    block.mlp.up_proj.weight.zero_()
    assert (equalize_mlp_(block, checkpoint.architecture, hidden, None, runner, centered=False) == 1).all()

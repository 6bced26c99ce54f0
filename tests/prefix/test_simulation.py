"""Simulated static quantizers: the best scale, gradients, and the rotations of the rotated model."""

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import load_block
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.prefix.frozen_model import FrozenModel
from pipeline.prefix.losses import QuantizationMeasure
from pipeline.rotation.matrices import load_rotation
from tests.conftest import open_model
from tests.prefix.setup import setup, training
from tests.rotation.test_merging import rotate


def test_quantization_error_equals_the_best_static_scale(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    measure = QuantizationMeasure(checkpoint, training(bits=3))
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(5)) + 4
    centered = x - x.mean((0, 1))
    errors = []
    for factor in torch.linspace(0.1, 1, 200):
        scale = centered.abs().max() * factor / 3
        errors.append(((centered / scale).round().clamp(-4, 3) * scale - centered).square().sum())
    expected = (min(errors) / centered.square().sum()).item()
    mean, varying, quantized = measure.quantizers.quantize(x)
    assert torch.equal(varying, x - mean)
    quantized, error = quantized + mean, (quantized - varying).square().sum() / varying.square().sum()
    assert error.item() == pytest.approx(expected, rel=0.1)
    assert error.item() >= expected * 0.999
    assert ((quantized - x).square().sum() / centered.square().sum()).item() == pytest.approx(error.item(), rel=1e-4)
    # Each head has its own scale: two heads of very different size cost no more than each alone.
    heads = torch.stack((x.squeeze(), x.squeeze() * 1000), dim=1)
    _, varying, quantized = measure.quantizers.quantize(heads)
    error_of_heads = (quantized - varying).square().sum() / varying.square().sum()
    assert error_of_heads.item() == pytest.approx(error.item(), rel=1e-3)


def test_only_values_beyond_the_range_get_a_gradient_from_quantization(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    x = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(5))
    x[0, 0, 0] = 20.0
    x.requires_grad_()
    measure = QuantizationMeasure(checkpoint, training(bits=4, weights={"quantization": 1.0}))
    _, varying, quantized = measure.quantizers.quantize(x)
    (quantized - varying).square().sum().backward()
    moved = x.grad.abs() > 1e-5 * x.grad.abs().max()
    assert moved[0, 0, 0]
    assert x.grad[0, 0, 0] > 0  # smaller is better
    assert moved.float().mean() < 0.2


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "llama_odd_sizes", "gemma2", "olmo2"])
@torch.no_grad()
def test_many_bits_cause_hardly_any_divergence(family, imported, windows):
    """Values are rotated and rotated back at every site: 8 bits cause 1e-3 of the divergence that 3 bits cause."""
    checkpoint, runner, prefix, _ = setup(imported, family)
    reference, prefix_kv = checkpoint.embed(windows[0]), compute_prefix_kv(checkpoint, prefix, runner)
    for index in range(checkpoint.block_count):
        runner.advance_(load_block(checkpoint, index), reference, prefix_kv[index])
    divergence = {}
    for bits in (3, 8):
        model = FrozenModel(checkpoint, runner, training(bits=bits, simulate=True, weights={"kl": 1.0}))
        divergence[bits] = model.losses(prefix, windows[0], reference)["kl"]
    assert divergence[3] > 0.01
    assert 0 < divergence[8] < 0.005 * divergence[3]


def test_the_seed_of_rotation_gives_the_signs_of_its_r1(imported, tmp_path):
    checkpoint, _ = open_model(imported["llama_tied"])
    for seed in (0, 5):
        rotated, _, _ = rotate(imported["llama_tied"], tmp_path / str(seed), seed=seed)
        x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        measure = QuantizationMeasure(checkpoint, training(seed=seed))
        expected = load_rotation(rotated.folder, "r1").apply(x)
        assert torch.allclose(hadamard_transform(x * measure.quantizers.signs), expected)

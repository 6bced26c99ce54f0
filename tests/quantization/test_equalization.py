"""Equalizing a block preserves its output; scales follow the energy and the sensitivity of the channels."""

from dataclasses import replace

import pytest
import torch

from pipeline.blocks.quantized import block_settings, fill_block
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import RESIDUAL_SITES, base_site
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.numerics.quantizer import QuantizerSpec
from pipeline.quantization.equalization import EQUALIZED_SITES, Equalizer, choose_scales, scale_prefix, select_block
from pipeline.rotation.gate import compute_exactly_
from pipeline.rotation.matrices import load_rotation
from tests.conftest import FAMILIES, open_model
from tests.rotation.test_merging import rotate

GENERATOR = torch.Generator().manual_seed(2)


def open_block(checkpoint: Checkpoint, sites=EQUALIZED_SITES, tensors=None, specs=None):
    """Return a block in float64 and its equalizer."""
    settings = replace(block_settings(checkpoint, 1), sites=specs or {})
    block = fill_block(checkpoint, 1, tensors or checkpoint.load_block_tensors(1), settings, dtype=torch.float64)
    compute_exactly_(block)
    return block, Equalizer(block, checkpoint.architecture, settings, load_rotation(checkpoint.folder, "r2"), sites)


def draw(checkpoint: Checkpoint, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, checkpoint.config.hidden_size, dtype=torch.float64, generator=GENERATOR)


def measure(equalizer: Equalizer, runner, hidden, gradient) -> dict[str, torch.Tensor]:
    sums = equalizer.make_sums()
    equalizer.add_(sums, hidden, gradient, None, runner)
    return {name: total / hidden[..., 0].numel() for name, total in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("r1", "r5", "online_signs"),
    [("online", "hadamard", False), (None, "identity", False), ("online", "hadamard", True)],
)
def test_equalizing_preserves_the_output_of_a_block(family, r1, r5, online_signs, imported, tmp_path):
    checkpoint, runner, _ = rotate(imported[family], tmp_path / "out", r1=r1, r5=r5, online_signs=online_signs)
    hidden, gradient = draw(checkpoint, 3, 8), draw(checkpoint, 3, 8)
    block, equalizer = open_block(checkpoint)
    prefix_kv = torch.randn(2, equalizer.kv_heads, 3, equalizer.head_dim, dtype=torch.float64, generator=GENERATOR)
    with torch.no_grad():
        expected = runner.run(block, hidden, prefix_kv)
    scales = equalizer.choose(measure(equalizer, runner, hidden, gradient), runner)
    normed = set(RESIDUAL_SITES) if r1 == "online" and checkpoint.architecture.attention_norm else set()
    assert {base_site(site) for site in scales} == set(EQUALIZED_SITES) - set(RESIDUAL_SITES) | normed
    equalizer.scale_(scales)
    for site, s in scales.items():
        assert s.log().mean().abs() < 0.05, site
        assert s.max() / s.min() > 1.1, site
    heads = scales["value"].double().log().mean(1)
    assert (heads.abs().max() < 1e-6) == (r5 == "identity")  # heads differ where they are spread over each other
    compute_exactly_(block)  # with the scaled norms
    scaled = scale_prefix(prefix_kv, scales, equalizer.r2)
    with torch.no_grad():
        output = runner.run(block, hidden, scaled)
        wrong = runner.run(block, hidden, prefix_kv)
    assert (output - expected).abs().max() < 1e-12 * expected.abs().max()  # measured: 7e-14 / 4
    assert (wrong - expected).abs().max() > 1e-3 * expected.abs().max()  # a prefix that is not scaled
    assert torch.allclose(scale_prefix(scaled, scales, equalizer.r2, inverse=True), prefix_kv, atol=1e-12)


@pytest.mark.parametrize("site", EQUALIZED_SITES)
@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma3_text", "olmo2"])
def test_equalizing_twice_changes_nothing_more(site, family, imported, tmp_path):
    """After one pass, energy and sensitivity have the same ratio in every channel."""
    checkpoint, runner, _ = rotate(imported[family], tmp_path / "out", r1="online")
    hidden, gradient = draw(checkpoint, 4, 8), draw(checkpoint, 4, 8)
    block, equalizer = open_block(checkpoint, (site,))
    if not equalizer.sites:
        assert family == "olmo2"
        return
    first = equalizer.choose(measure(equalizer, runner, hidden, gradient), runner)
    equalizer.scale_(first)
    compute_exactly_(block)
    second = equalizer.choose(measure(equalizer, runner, hidden, gradient), runner)
    assert first[site].max() / first[site].min() > 1.2
    assert torch.allclose(second[site], torch.ones_like(second[site]), atol=1e-5)


def test_moments_and_gradients_are_measured_in_the_basis_that_is_scaled(imported, tmp_path):
    """Compare with plain hooks on the linears of the original model."""
    checkpoint, runner, _ = rotate(imported["llama_untied_biases"], tmp_path / "out", r1="online")
    hidden, gradient = draw(checkpoint, 2, 8), draw(checkpoint, 2, 8)
    _, equalizer = open_block(checkpoint)
    channels = measure(equalizer, runner, hidden, gradient)
    plain, plain_runner = open_model(imported["llama_untied_biases"])
    block = fill_block(plain, 1, plain.load_block_tensors(1), None, dtype=torch.float64)
    compute_exactly_(block)
    gains = {"attention_input": block.input_layernorm.weight, "mlp_input": block.post_attention_layernorm.weight}
    names = {"attention_output": "self_attn.o_proj", "mlp_hidden": "mlp.down_proj"}
    recorded, find = {}, block.get_submodule
    for site, name in names.items():
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, site=site: recorded.update({site: args[0]})
        )
    for site, norm in (("attention_input", "input_layernorm"), ("mlp_input", "post_attention_layernorm")):
        find(norm).register_forward_hook(lambda module, args, out, site=site: recorded.update({site: out}))
    block.self_attn.k_proj.register_forward_hook(lambda module, args, out: recorded.update(key=out))
    output = plain_runner.run(block, hidden.clone().requires_grad_())
    slopes = torch.autograd.grad(output, list(recorded.values()), gradient)
    assert channels.keys() == recorded.keys()
    for (site, x), slope in zip(recorded.items(), slopes, strict=True):
        gain = gains.get(site, torch.ones(())).detach()  # folded into the readers: x / gain is what is scaled
        x, slope = (x.detach() / gain).flatten(0, 1), (slope * gain).flatten(0, 1)
        expected = torch.stack((x.mean(0), x.square().mean(0), slope.square().mean(0)))
        assert torch.allclose(channels[site], expected, rtol=1e-4, atol=1e-6), site


def test_a_constant_counts_only_where_a_site_is_not_centered(imported, tmp_path):
    """A constant in one channel of the values makes its scale small only where the integers must carry it."""
    checkpoint, runner, _ = rotate(imported["llama_untied_biases"], tmp_path / "out")
    hidden, gradient = draw(checkpoint, 4, 8), draw(checkpoint, 4, 8)
    scales = {}
    for centered in (True, False):
        for constant in (0.0, 100.0):
            tensors, bias = checkpoint.load_block_tensors(1), torch.zeros(2, 12, dtype=torch.float64)
            bias[0, 3] = constant
            rotated = load_rotation(checkpoint.folder, "r2").apply(bias).flatten()
            tensors["self_attn.v_proj.bias"] = tensors["self_attn.v_proj.bias"].double() + rotated
            specs = {"attention_output": QuantizerSpec(4, centered=centered)}
            _, equalizer = open_block(checkpoint, ("value",), tensors, specs)
            scales[centered, constant] = equalizer.choose(measure(equalizer, runner, hidden, gradient), runner)["value"]
    changed = {centered: scales[centered, 100.0] / scales[centered, 0.0] for centered in (True, False)}
    assert changed[False][0, 3] < 0.2 * changed[False][1, 3]
    assert changed[True][0, 3] > 0.5 * changed[True][1, 3]


def test_silent_channels_are_not_scaled(imported, tmp_path):
    checkpoint, runner, _ = rotate(imported["llama_tied"], tmp_path / "out", r4="identity")
    tensors = checkpoint.load_block_tensors(1)
    tensors["mlp.up_proj.weight"][5] = 0
    hidden, gradient = draw(checkpoint, 1, 8), draw(checkpoint, 1, 8)
    block, equalizer = open_block(checkpoint, ("mlp_hidden",), tensors)
    scales = equalizer.choose(measure(equalizer, runner, hidden, gradient), runner)["mlp_hidden"]
    assert scales[5] == 1
    assert torch.isfinite(scales).all()
    block.mlp.up_proj.weight.zero_()
    scales = equalizer.choose(measure(equalizer, runner, hidden, gradient), runner)["mlp_hidden"]
    assert (scales == 1).all()


def test_scales_stay_within_a_factor_of_32_of_their_mean():
    scales = choose_scales(torch.tensor([1.0, 1.0, 1.0, 1.0]).double(), torch.tensor([1e-30, 1.0, 1.0, 1e30]).double())
    assert (scales[0].item(), scales[3].item()) == (1 / 32, 32)


def test_select_block_finds_tensors_by_block_index():
    stored = {"1.key": torch.ones(1), "11.key": torch.zeros(1), "1.mlp_hidden": torch.ones(2)}
    assert select_block(stored, 1).keys() == {"key", "mlp_hidden"}
    assert torch.equal(select_block(stored, 11)["key"], torch.zeros(1))
    assert select_block(stored, 2) == {}


def test_columns_of_down_proj_are_divided_in_the_basis_before_r4(imported, tmp_path):
    checkpoint, _, _ = rotate(imported["llama_tied"], tmp_path / "out")
    block, equalizer = open_block(checkpoint)
    scales = torch.linspace(0.5, 2, 96).double()
    before = hadamard_transform(block.mlp.down_proj.weight, inverse=True)
    equalizer.scale_({"mlp_hidden": scales})
    after = hadamard_transform(block.mlp.down_proj.weight, inverse=True)
    assert torch.allclose(after, before / scales, atol=1e-12)

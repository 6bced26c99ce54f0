"""A block with quantizers: exact at 16 bits, equal to a slow reference below, the same after a round trip to disk."""

from dataclasses import asdict

import pytest
import torch
from conftest import FAMILIES, open_model
from test_rotation import rotate

from pipeline.hadamard import hadamard_matrix
from pipeline.kv_cache import KeyQuantizer, PrefixLayer
from pipeline.quantized_block import (
    BlockSettings,
    count_expected_quantizers,
    count_fired_quantizers,
    fill_block,
    find_site_quantizers,
    linear_widths,
    load_block,
)
from pipeline.quantizer import StaticQuantizer, fake_quantize, quantize_weight
from pipeline.walk import compute_prefix_kv

WEIGHT_SCALE = 0.0471728  # integers of weights times integers of inputs must not fall between two integers of values
ACTIVATION_SCALE = 0.05


def quantized_block(checkpoint, settings, dtype=torch.float32):
    """Block 1 with arbitrary but fixed scales everywhere."""
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), settings, dtype=dtype)
    for quantizer in find_site_quantizers(block, checkpoint.architecture).values():
        if quantizer.bits < 16:
            quantizer.set_scale_(torch.full(quantizer.scale.shape, ACTIVATION_SCALE))
    for name in checkpoint.architecture.linears:
        linear = block.get_submodule(name)
        if settings.weight_bits < 16:
            scale = torch.full((linear.out_features, 1), WEIGHT_SCALE)
            linear.set_integers_(quantize_weight(linear.weight, scale, settings.weight_bits), scale)
    return block


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_everywhere_is_the_plain_block(family, imported):
    checkpoint, runner = open_model(imported[family])
    hidden = torch.randn(2, 10, checkpoint.config.hidden_size)
    plain = runner.run(load_block(checkpoint, 1), hidden)
    assert torch.equal(runner.run(quantized_block(checkpoint, BlockSettings()), hidden), plain)


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3"])
@torch.no_grad()
def test_every_site_equals_a_reference_written_out(family, imported, tmp_path):
    """The whole quantized block against formulas that share no code with it, both in float64.

    In float32 a value near a rounding boundary would fall to the other side somewhere, and change all that follows.
    """
    generator = torch.Generator().manual_seed(6)
    checkpoint, runner, _ = rotate(imported[family], tmp_path / "out")
    settings = BlockSettings(4, -1, 4, 4, 4, online_r3=True, online_r4=True)
    block = quantized_block(checkpoint, settings, dtype=torch.float64)
    prefix_kv = compute_prefix_kv(checkpoint, torch.randn(2, 48, generator=generator), runner)[1]
    hidden = torch.randn(1, 9, 48, generator=generator, dtype=torch.float64)
    found = runner.run(block, hidden, prefix_kv)

    config, tensors = checkpoint.config, {n: t.double() for n, t in checkpoint.load_block_tensors(1).items()}
    quantize = lambda x, s=ACTIVATION_SCALE: (x / s).round().clamp(-8, 7) * s  # noqa: E731
    linear = lambda n, x: x @ quantize(tensors[n + ".weight"], WEIGHT_SCALE).T + tensors.get(n + ".bias", 0)  # noqa: E731
    norm = lambda x: x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()  # noqa: E731
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    d = block.self_attn.head_dim
    split = lambda x, count: x.view(9, count, d).transpose(0, 1)  # noqa: E731

    x = hidden[0].double()
    inputs = quantize(norm(x))
    q, k, v = (
        split(linear(f"self_attn.{n}_proj", inputs), c) for n, c in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    if family == "qwen3":
        q, k = (norm(z) * tensors[f"self_attn.{n}_norm.weight"] for n, z in (("q", q), ("k", k)))
    angle = torch.arange(2, 11)[:, None] / config.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2) / d)
    cos, sin = (torch.cat((f(angle.double()),) * 2, dim=-1) for f in (torch.cos, torch.sin))
    turn = lambda z: z * cos + torch.cat((-z[..., d // 2 :], z[..., : d // 2]), -1) * sin  # noqa: E731
    q, k, r3 = turn(q), turn(k), hadamard_matrix(d)
    k, v = quantize(k @ r3) @ r3.T, quantize(v)
    k, v = (torch.cat((p.double(), z), dim=1) for p, z in zip(prefix_kv, (k, v), strict=True))
    k, v = (z.repeat_interleave(heads // kv_heads, dim=0) for z in (k, v))
    scores = q @ k.transpose(1, 2) / d**0.5
    scores = scores.masked_fill(torch.ones(9, 11, dtype=torch.bool).triu(3), -torch.inf)
    attention = (scores.softmax(-1) @ v).transpose(0, 1).reshape(9, heads * d)
    x = x + linear("self_attn.o_proj", quantize(attention))
    inputs = quantize(norm(x))
    gate, up = linear("mlp.gate_proj", inputs), linear("mlp.up_proj", inputs)
    x = x + linear("mlp.down_proj", quantize((gate * gate.sigmoid() * up) @ hadamard_matrix(96)))
    assert (found[0] - x).abs().max() / x.abs().max() < 1e-6  # measured: 2e-7


def test_counts_of_what_fired_match_what_is_asked_for(imported):
    checkpoint, runner = open_model(imported["qwen2"])
    hidden = torch.randn(1, 6, 48)
    for settings in (
        BlockSettings(4, -1, 8, 4, 2),
        BlockSettings(16, -1, 4, 16, 16),
        BlockSettings(4),
        BlockSettings(16, -1, 16, 3, 16),
        BlockSettings(),
    ):
        block = quantized_block(checkpoint, settings)
        nothing = {"weights": 0, "activations": 0, "keys": 0, "values": 0}
        assert count_fired_quantizers(block, checkpoint.architecture) == nothing
        runner.run(block, hidden)
        assert count_fired_quantizers(block, checkpoint.architecture) == count_expected_quantizers(settings)
    assert count_expected_quantizers(BlockSettings(4, -1, 4, 4, 4)) == {
        "weights": 7,
        "activations": 4,
        "keys": 1,
        "values": 1,
    }
    assert count_expected_quantizers(None) == nothing


@pytest.mark.parametrize(
    "settings", [BlockSettings(4, 4, 4, 4, 4, True, True), BlockSettings(8, -1, 16, 4, 16), BlockSettings(16, -1, 4)]
)
def test_what_is_loaded_computes_what_was_saved(settings, imported, tmp_path):
    checkpoint, runner = open_model(imported["llama_untied_biases"])
    block = quantized_block(checkpoint, settings)
    if settings.weight_group_size != -1:
        for name in checkpoint.architecture.linears:
            linear = block.get_submodule(name)
            original = checkpoint.load_block_tensors(1)[name + ".weight"]
            scale = torch.rand(linear.out_features, linear.in_features // 4) / 10 + 0.01
            linear.set_integers_(quantize_weight(original, scale, 4), scale)
    hidden = torch.randn(2, 10, 48)
    expected = runner.run(block, hidden)
    loaded = fill_block(checkpoint, 1, block.state_dict(), settings)
    assert torch.equal(runner.run(loaded, hidden), expected)
    assert not torch.equal(expected, runner.run(load_block(checkpoint, 1), hidden))


def test_missing_and_unexpected_tensors_are_errors(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    settings = BlockSettings(4, -1, 4, 4, 4)
    tensors = quantized_block(checkpoint, settings).state_dict()
    for name in ("mlp.down_proj.weight_scale", "self_attn.value_quantizer.scale", "input_layernorm.weight"):
        with pytest.raises(RuntimeError, match=rf"missing tensors .*{name}"):
            fill_block(checkpoint, 1, {key: tensor for key, tensor in tensors.items() if key != name}, settings)
    with pytest.raises(RuntimeError, match=r"unexpected .*surplus"):
        fill_block(checkpoint, 1, tensors | {"surplus": torch.zeros(1)}, settings)


def test_r3_inside_the_key_quantizer_equals_rotating_queries_and_keys():
    generator = torch.Generator().manual_seed(6)
    q, k = torch.randn(2, 1, 2, 5, 16, generator=generator).double().unbind(0)
    quantizer = KeyQuantizer(4, 2, rotate=True)
    quantizer.quantizer.set_scale_(torch.tensor([0.3, 0.2]))
    r3 = hadamard_matrix(16)
    scale = torch.tensor([0.3, 0.2]).view(2, 1, 1)
    expected = (q @ r3) @ fake_quantize(k @ r3, scale, 4).transpose(-1, -2)
    assert torch.allclose(q @ quantizer(k).transpose(-1, -2), expected, atol=1e-6)
    unrotated = KeyQuantizer(4, 2, rotate=False)
    unrotated.quantizer.set_scale_(torch.tensor([0.3, 0.2]))
    assert torch.equal(unrotated(k), fake_quantize(k, scale, 4))


def test_cache_quantizes_what_is_appended_and_never_the_prefix():
    prefix = torch.randn(2, 2, 3, 8)
    quantizer = StaticQuantizer(4, (2, 1, 1))
    quantizer.set_scale_(torch.tensor([0.5, 0.5]))
    layer = PrefixLayer(prefix, quantizer, quantizer)
    assert layer.get_seq_length() == 3
    keys, values = torch.randn(2, 4, 2, 5, 8).unbind(0)
    found = layer.update(keys, values)
    assert layer.get_seq_length() == 8
    for whole, own, appended in zip(found, prefix, (keys, values), strict=True):
        assert torch.equal(whole[:, :, :3], own.expand(4, -1, -1, -1))
        assert torch.equal(whole[:, :, 3:], fake_quantize(appended, torch.tensor(0.5), 4))
    layer.reset()
    assert layer.get_seq_length() == 3


def test_widths_of_linears_for_the_plan(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    widths = linear_widths(checkpoint)
    assert widths["model.layers.0.mlp.down_proj"] == 96
    assert widths["model.layers.0.self_attn.q_proj"] == 48
    assert len(widths) == 7
    assert asdict(BlockSettings())["weight_bits"] == 16

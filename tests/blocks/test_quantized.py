"""A block with quantizers: exact at 16 bits, equal to a slow reference below, the same after a round trip to disk."""

import json

import pytest
import torch
from torch import nn

from pipeline.blocks.kv_cache import KeyQuantizer, find_key_source
from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import (
    BlockSettings,
    block_settings,
    count_expected_quantizers,
    count_fired_quantizers,
    describe_blocks,
    fill_block,
    find_site_quantizers,
    load_block,
)
from pipeline.models.sites import INPUT_SITES
from pipeline.numerics.hadamard import hadamard_matrix
from pipeline.numerics.quantizer import QuantizerSpec, fake_quantize, quantize_weight
from tests.conftest import FAMILIES, POST_NORMS, open_model
from tests.rotation.test_merging import rotate

WEIGHT_SCALE = 0.0471728  # integers of weights times integers of inputs must not fall between two integers of values
ACTIVATION_SCALE = 0.05


WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def settings_of(weights=16, activations=16, key=16, value=16, online=False, before_rope=False, **mode):
    """Bits per kind of site, all in one mode."""
    bits = dict.fromkeys(WEIGHTS, weights) | dict.fromkeys(INPUT_SITES, activations) | {"key": key, "value": value}
    sites = {}
    for site, number in bits.items():
        if number < 16:
            own = {name: v for name, v in mode.items() if not (site in WEIGHTS and name == "dynamic")}
            sites[site] = QuantizerSpec(number, **own)
    return BlockSettings(online and not before_rope, online, before_rope, sites, online_r5=online)


def quantized_block(checkpoint, settings, dtype=torch.float32):
    """Block 1 with arbitrary but fixed scales everywhere."""
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), settings, dtype=dtype)
    values = {"scale": ACTIVATION_SCALE, "zero_point": 6.0, "clip_factor": 0.9, "shift": 0.03}
    for quantizer in find_site_quantizers(block, checkpoint.architecture).values():
        if quantizer.spec.enabled:
            buffers = quantizer.named_buffers()
            quantizer.calibrate_(**{name: torch.full(buffer.shape, values[name]) for name, buffer in buffers})
    if block.self_attn.key_quantizer.mean_taken_out:
        block.self_attn.key_quantizer.mean.fill_(0.07)
    for name in checkpoint.architecture.of_block(block).linears:
        linear = block.get_submodule(name)
        if linear.spec.enabled:
            scale = torch.full((linear.out_features, linear.spec.count_groups(linear.in_features)), WEIGHT_SCALE)
            zero_point = None if linear.spec.symmetric else torch.full_like(scale, 7.0)
            integers = quantize_weight(linear.weight, scale, linear.spec.bits, zero_point)
            linear.set_integers_(integers, scale, zero_point)
            if linear.spec.centered:
                linear.correct_bias_(torch.linspace(0, 0.1, linear.out_features))
    return block


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_everywhere_is_the_plain_block(family, imported):
    checkpoint, runner = open_model(imported[family])
    hidden = torch.randn(2, 10, checkpoint.config.hidden_size)
    plain = runner.run(load_block(checkpoint, 1), hidden)
    assert torch.equal(runner.run(quantized_block(checkpoint, BlockSettings()), hidden), plain)


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma2", "gemma3_text", "olmo2"])
@torch.no_grad()
def test_every_site_equals_a_reference_written_out(family, imported, tmp_path):
    """Compare the whole quantized block with formulas that share no code with it, both in float64.

    In float32 a value near a rounding boundary would fall to the other side somewhere, and change all that follows.
    """
    generator = torch.Generator().manual_seed(6)
    checkpoint, runner, _ = rotate(imported[family], tmp_path / "out")
    block = quantized_block(checkpoint, settings_of(4, 4, 4, 4, online=True), dtype=torch.float64)
    prefix_kv = compute_prefix_kv(checkpoint, torch.randn(2, 48, generator=generator), runner)[1]
    hidden = torch.randn(1, 9, 48, generator=generator, dtype=torch.float64)
    found = runner.run(block, hidden, prefix_kv)

    config, tensors = checkpoint.config, {n: t.double() for n, t in checkpoint.load_block_tensors(1).items()}
    quantize = lambda x, s=ACTIVATION_SCALE: (x / s).round().clamp(-8, 7) * s  # noqa: E731
    linear = lambda n, x: x @ quantize(tensors[n + ".weight"], WEIGHT_SCALE).T + tensors.get(n + ".bias", 0)  # noqa: E731
    unit = lambda x: x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()  # noqa: E731
    gemma = family.startswith("gemma")

    def norm(x, name):
        """Apply the norm of that name where the family has it. Gemma's weights are added to 1."""
        weight = tensors.get(name + ".weight")
        return x if weight is None else unit(x) * (gemma + weight)

    before, behind_attention, before_mlp, behind_mlp = (
        ("input_layernorm", "", "post_attention_layernorm", "")
        if family not in POST_NORMS
        else ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    d = block.self_attn.head_dim
    split = lambda x, count: x.view(9, count, d).transpose(0, 1)  # noqa: E731

    x = hidden[0].double()
    inputs = quantize(norm(x, before))
    q, k, v = (linear(f"self_attn.{n}_proj", inputs) for n in "qkv")
    if family == "olmo2":  # of all heads together
        q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")
    q, k, v = split(q, heads), split(k, kv_heads), split(v, kv_heads)
    if family != "olmo2":
        q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")
    rope = config.rope_parameters.get(getattr(block.self_attn, "layer_type", None), config.rope_parameters)
    angle = torch.arange(2, 11)[:, None] / rope["rope_theta"] ** (torch.arange(0, d, 2) / d)
    cos, sin = (torch.cat((f(angle.double()),) * 2, dim=-1) for f in (torch.cos, torch.sin))
    turn = lambda z: z * cos + torch.cat((-z[..., d // 2 :], z[..., : d // 2]), -1) * sin  # noqa: E731
    q, k, r3 = turn(q), turn(k), hadamard_matrix(d)
    k, v = quantize(k @ r3) @ r3.T, quantize(v)
    k, v = (torch.cat((p.double(), z), dim=1) for p, z in zip(prefix_kv, (k, v), strict=True))
    k, v = (z.repeat_interleave(heads // kv_heads, dim=0) for z in (k, v))
    scores = q @ k.transpose(1, 2) / getattr(config, "query_pre_attn_scalar", d) ** 0.5
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(torch.ones(9, 11, dtype=torch.bool).triu(3), -torch.inf)
    attention = (scores.softmax(-1) @ v).transpose(0, 1).reshape(9, heads * d)
    mixed = attention @ hadamard_matrix(heads * d)
    x = x + norm(linear("self_attn.o_proj", quantize(mixed)), behind_attention)
    inputs = quantize(norm(x, before_mlp))
    gate, up = linear("mlp.gate_proj", inputs), linear("mlp.up_proj", inputs)
    gate = nn.functional.gelu(gate, approximate="tanh") if gemma else gate * gate.sigmoid()
    x = x + norm(linear("mlp.down_proj", quantize((gate * up) @ hadamard_matrix(96))), behind_mlp)
    assert (found[0] - x).abs().max() / x.abs().max() < 1e-6  # measured: 2e-7


def test_fired_quantizers_match_the_settings(imported):
    checkpoint, runner = open_model(imported["qwen2"])
    hidden = torch.randn(1, 6, 48)
    for settings in (settings_of(4, 8, 4, 2), settings_of(16, 4), settings_of(4), settings_of(key=3), BlockSettings()):
        block = quantized_block(checkpoint, settings)
        assert not count_fired_quantizers(block, checkpoint.architecture)
        runner.run(block, hidden)
        assert count_fired_quantizers(block, checkpoint.architecture) == count_expected_quantizers(settings)
    expected = {"weights": 7, "activations": 4, "keys": 1, "values": 1}
    assert count_expected_quantizers(settings_of(4, 4, 4, 4)) == expected
    assert not count_expected_quantizers(None)
    only = BlockSettings(sites={"down_proj": QuantizerSpec(8), "mlp_hidden": QuantizerSpec(4)})
    block = quantized_block(checkpoint, only)
    runner.run(block, hidden)
    assert count_fired_quantizers(block, checkpoint.architecture) == {"weights": 1, "activations": 1}


MODES = [
    {"online": True},
    {"symmetric": False},
    {"group_size": 4},
    {"centered": True},
    {"dynamic": True},
    {"before_rope": True},
    {"symmetric": False, "group_size": 4, "dynamic": True, "centered": True, "online": True},
]


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_loaded_block_equals_the_saved_one(mode, family, imported):
    checkpoint, runner = open_model(imported[family])
    settings = settings_of(4, 4, 4, 4, **mode)
    assert BlockSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    block = quantized_block(checkpoint, settings)
    hidden = torch.randn(2, 10, 48)
    expected = runner.run(block, hidden)
    loaded = fill_block(checkpoint, 1, block.state_dict(), settings)
    assert torch.equal(runner.run(loaded, hidden), expected)
    assert not torch.equal(expected, runner.run(load_block(checkpoint, 1), hidden))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keys_before_rope_are_quantized_between_the_projection_and_rope(family, imported):
    """Against the plain block with its k_proj (or k_norm) output quantized by hand; values and queries untouched."""
    checkpoint, runner = open_model(imported[family])
    settings = settings_of(key=4, before_rope=True)
    block, plain = quantized_block(checkpoint, settings), load_block(checkpoint, 1)
    hidden = torch.randn(2, 7, checkpoint.config.hidden_size)
    attention = plain.self_attn
    source = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
    source.register_forward_hook(lambda module, args, out: fake_quantize(out, torch.tensor(ACTIVATION_SCALE), 4))
    assert torch.allclose(runner.run(block, hidden), runner.run(plain, hidden), atol=1e-5)
    exact = runner.run(load_block(checkpoint, 1), hidden)
    assert not torch.allclose(runner.run(block, hidden), exact, atol=1e-3)


def test_settings_of_blocks_that_differ_are_recorded_and_found(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    common, other = settings_of(4, 4), settings_of(8, 4, 4, 4)
    recorded = describe_blocks([common, other, common])
    assert recorded.keys() == {"block", "overrides"}
    checkpoint.settings = json.loads(json.dumps(recorded))
    assert [block_settings(checkpoint, index) for index in range(3)] == [common, other, common]
    assert "overrides" not in describe_blocks([common, common])


def test_missing_and_unexpected_tensors_are_errors(imported):
    checkpoint, _ = open_model(imported["llama_tied"])
    settings = settings_of(4, 4, 4, 4)
    tensors = quantized_block(checkpoint, settings).state_dict()
    for name in ("mlp.down_proj.weight_scale", "self_attn.value_quantizer.scale", "input_layernorm.weight"):
        with pytest.raises(RuntimeError, match=rf"missing tensors .*{name}"):
            fill_block(checkpoint, 1, {key: tensor for key, tensor in tensors.items() if key != name}, settings)
    with pytest.raises(RuntimeError, match=r"unexpected .*surplus"):
        fill_block(checkpoint, 1, tensors | {"surplus": torch.zeros(1)}, settings)


def test_r3_inside_the_key_quantizer_equals_rotating_queries_and_keys():
    generator = torch.Generator().manual_seed(6)
    q, k = torch.randn(2, 1, 2, 5, 16, generator=generator).double().unbind(0)
    quantizer = KeyQuantizer(QuantizerSpec(4), 2, 16, rotate=True, before_rope=False)
    quantizer.quantizer.calibrate_(scale=torch.tensor([0.3, 0.2]))
    r3 = hadamard_matrix(16)
    scale = torch.tensor([0.3, 0.2]).view(2, 1, 1)
    expected = (q @ r3) @ fake_quantize(k @ r3, scale, 4).transpose(-1, -2)
    assert torch.allclose(q @ quantizer(k).transpose(-1, -2), expected, atol=1e-6)
    unrotated = KeyQuantizer(QuantizerSpec(4), 2, 16, rotate=False, before_rope=False)
    unrotated.quantizer.calibrate_(scale=torch.tensor([0.3, 0.2]))
    assert torch.equal(unrotated(k), fake_quantize(k, scale, 4))


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma2", "gemma3_text", "olmo2", "ernie4_5_moe"])
@torch.no_grad()
def test_the_mean_of_keys_is_taken_out_before_rope_and_put_back_turned(family, imported):
    """Compare with RoPE(m) + R3^T Q(R3 RoPE(k - m)), written out with complex numbers; k from what RoPE is given."""
    checkpoint, runner = open_model(imported[family])
    settings = settings_of(key=4, online=True, centered=True)
    block = quantized_block(checkpoint, settings)
    attention = block.self_attn
    mean = torch.randn(attention.key_quantizer.mean.shape, generator=torch.Generator().manual_seed(2))
    attention.key_quantizer.mean = mean
    hidden = torch.randn(2, 9, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(3))
    seen = []
    find_key_source(attention).register_forward_hook(lambda module, args, output: seen.append(output))
    _, found, _ = runner.run_with_kv(block, hidden)
    before = attention.key_quantizer.split_heads(seen[0], checkpoint.architecture.heads_first).double()
    cos, sin = (table[0, :, : before.shape[-1] // 2].double() for table in runner.rotary_tables(block, hidden, 0))

    neighbours = family == "ernie4_5_moe"

    def turn(x):
        low, high = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, dim=-1)
        turned = torch.complex(low, high) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2) if neighbours else torch.cat((turned.real, turned.imag), dim=-1)

    r3 = hadamard_matrix(before.shape[-1])
    varying = turn(before - mean[:, None].double()) @ r3
    scale = torch.tensor(ACTIVATION_SCALE, dtype=torch.float64)
    expected = fake_quantize(varying, scale, 4) @ r3.T + turn(mean[:, None].double())
    # float32 may round a value on the edge between two integers the other way: one step of one in a thousand.
    wrong = (found - expected).abs() > 1e-5
    assert wrong.double().mean() < 0.02
    assert (found - turn(before)).abs().max() > 0.01  # it acted


def test_widths_of_sites_for_the_plan(imported):
    checkpoint, _ = open_model(imported["qwen3"])
    widths = checkpoint.architecture.site_widths(checkpoint.build_block(0))
    assert widths == dict.fromkeys(WEIGHTS, 48) | {
        "down_proj": 96,
        "o_proj": 64,
        "attention_input": 48,
        "attention_output": 64,
        "mlp_input": 48,
        "mlp_hidden": 96,
        "key": 16,
        "value": 16,
    }

"""The parts that replace vLLM's linears, RoPE and attention compute the evaluated model. They do not need vLLM."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pipeline.blocks.kv_cache import KeyQuantizer
from pipeline.blocks.quantized import find_settings, find_site_quantizers
from pipeline.inference.loading import load
from pipeline.kernels.compiler import find_kernels
from pipeline.kernels.integer_product import IntegerProduct
from pipeline.models.architectures import find_architecture
from pipeline.numerics.hadamard import CPU
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec
from pipeline.serving import attention
from pipeline.serving.attention import CachedValues, PackedKeys, PackedValues, TurnedKeys
from pipeline.serving.experts import Share, has_experts, take_mixture
from pipeline.serving.linear import WHOLE, LayerPart, ServedLinear
from tests.export.test_folder import make_export
from tests.gpu_double import CUDA, GpuDouble
from tests.inference.test_prefixed_model import PREFIX, QUANTIZERS

HEADS, WIDTH, TOKENS = 2, 12, 9  # of the tiny Llama's keys


class DenseProduct(nn.Module):
    """Computes products of integers in float64, on any device."""

    def __init__(self, operands, dtype):
        super().__init__()
        self.dtype, self.scale, self.zero_point = dtype, operands.scale, operands.zero_point
        for name in ("integers", "weight_scale", "constant"):
            self.register_buffer(name, getattr(operands, name))

    def forward(self, codes):
        sums = (codes.double() - self.zero_point) @ self.integers.double().T
        return (sums * self.weight_scale * self.scale + self.constant).to(self.dtype)


def load_block(imported, folder, family="llama_tied", kind="static"):
    """Return block 1 of an exported model, the config, its settings and its prefix KV."""
    model, _ = load(make_export(imported, folder, family, kind)[0])
    settings = find_settings(model.config.quantization_config.blocks, 1)
    return model.model.layers[1], model.config, settings, model.prefix_kv[1]


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("family", ["llama_tied", "llama_untied_biases"])
@pytest.mark.parametrize("integers", [True, False])
@torch.no_grad()
def test_fused_linears_equal_exported_ones(imported, tmp_path, integers, family, kind):
    """Each output channel keeps its scale. Integers are multiplied where the settings allow it."""
    block, config, settings, _ = load_block(imported, tmp_path, family, kind)
    architecture = find_architecture(config)
    quantizers = find_site_quantizers(block, architecture)
    block.self_attn.k_proj._forward_hooks.clear()  # the hook quantizes keys before RoPE, as `TurnedKeys` does
    for site, readers in architecture.site_readers.items():
        parts = [block.get_submodule(name) for name in readers]
        x = torch.randn(7, parts[0].in_features, generator=torch.Generator().manual_seed(5))
        inputs = x if parts[0].input_quantizer is not None else quantizers[site](x)  # norms quantize for their readers
        expected = torch.cat([part(inputs) for part in parts], dim=-1)
        rotate = {"attention_output": settings.online_r5, "mlp_hidden": settings.online_r4}.get(site, False)
        options = {"rotate": rotate, "dtype": torch.float32, "make_product": IntegerProduct if integers else None}
        served = ServedLinear(parts, quantizers[site], **options)
        assert (served.product is not None) == (integers and kind in ("static", "keys before RoPE"))
        assert (served(x) - expected).abs().max() <= 1e-5 * expected.abs().max()  # measured: 4e-7


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("integers", [True, False])
@torch.no_grad()
def test_parts_of_two_processes_are_the_whole(imported, tmp_path, integers, kind):
    """Outputs of split inputs add up, and outputs of split rows lie side by side."""
    block, config, settings, _ = load_block(imported, tmp_path, "llama_untied_biases", kind)
    architecture = find_architecture(config)
    quantizers = find_site_quantizers(block, architecture)
    block.self_attn.k_proj._forward_hooks.clear()
    for site, readers in architecture.site_readers.items():
        parts = [block.get_submodule(name) for name in readers]
        rotate = {"attention_output": settings.online_r5, "mlp_hidden": settings.online_r4}.get(site, False)
        options = {"rotate": rotate, "dtype": torch.float64, "make_product": DenseProduct if integers else None}

        def serve(layer_part, parts=parts, site=site, options=options):
            return ServedLinear(parts, copy.deepcopy(quantizers[site]), **options, layer_part=layer_part)

        half, x = parts[0].in_features // 2, torch.randn(7, parts[0].in_features, dtype=torch.float64)
        expected = serve(WHOLE)(x)
        rows = torch.arange(expected.shape[1])
        rows_of_rank = [rows[::2], rows[1::2]]
        outputs = [serve(LayerPart(rows=rows))(x) for rows in rows_of_rank]
        for rows, output in zip(rows_of_rank, outputs, strict=True):
            assert torch.equal(output, expected[:, rows])
        columns = [slice(half), slice(half, None)]
        total = sum(
            serve(LayerPart(columns=part, adds_bias=rank == 0, gather=lambda own, x=x: x))(x[:, part])
            for rank, part in enumerate(columns)
        )
        assert (total - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("make_product", [None, DenseProduct])
@torch.no_grad()
def test_linears_compute_on_the_gpu(imported, tmp_path, make_product, kind):
    """All tensors are on the engine's device, and the host never waits for it."""
    block, config, settings, _ = load_block(imported, tmp_path, "llama_untied_biases", kind)
    architecture = find_architecture(config)
    quantizers = find_site_quantizers(block, architecture)
    block.self_attn.k_proj._forward_hooks.clear()
    for site, readers in architecture.site_readers.items():
        parts = [block.get_submodule(name) for name in readers]
        x = torch.randn(7, parts[0].in_features, generator=torch.Generator().manual_seed(5))
        rotate = {"attention_output": settings.online_r5, "mlp_hidden": settings.online_r4}.get(site, False)
        options = {"rotate": rotate, "dtype": torch.float32, "make_product": make_product}
        expected = ServedLinear(parts, copy.deepcopy(quantizers[site]), **options)(x)
        with GpuDouble() as gpu:
            served = ServedLinear(parts, quantizers[site], **options, device=CUDA)
            gpu.waits.clear()
            output = served(x.to(CUDA))
            assert not gpu.waits
            assert output.device == CUDA
            assert (output.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe", "minimax_m2"])
@pytest.mark.parametrize("integers", [True, False])
@torch.no_grad()
def test_served_experts_equal_exported_ones(imported, tmp_path, integers, family, kind):
    """The parts of two processes add up, and no tensor is a view of the mapped file."""
    block, *_ = load_block(imported, tmp_path, family, kind)
    assert has_experts(block)
    x = torch.randn(1, 40, 48, generator=torch.Generator().manual_seed(5))
    expected, routed = block.mlp(x), list(block.mlp.experts.hits)
    assert sum(routed) == 80
    make_product = IntegerProduct if integers else None
    served = take_mixture(copy.deepcopy(block), torch.float32, make_product)
    gathers_codes = all(mlp.gate_up.product is not None for mlp in served.experts.mlps.values())
    assert gathers_codes == (integers and kind in ("static", "keys before RoPE"))
    largest = expected.abs().max()
    assert (served(x) - expected).abs().max() <= 1e-5 * largest  # measured: 1e-6
    assert (served(x[:, :1]) - expected[:, :1]).abs().max() <= 1e-5 * largest
    halves = [take_mixture(copy.deepcopy(block), torch.float32, make_product, Share(rank, 2)) for rank in (0, 1)]
    assert [sorted(half.experts.mlps) for half in halves] == [["0", "2"], ["1", "3"]]
    assert (sum(half(x) for half in halves) - expected).abs().max() <= 1e-5 * largest
    narrow = take_mixture(copy.deepcopy(block), torch.bfloat16, make_product)
    biases = [name for name, _ in narrow.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == (family in ("glm4_moe", "minimax_m2"))
    assert all(narrow.get_buffer(name).dtype == torch.float32 for name in biases)
    assert narrow.gate.weight.dtype == torch.bfloat16
    assert torch.isfinite(narrow(x.bfloat16())).all()


class Rope(nn.Module):
    """Offers transformers' RoPE through vLLM's interface."""

    def __init__(self, width=WIDTH, dtype=torch.float32):
        super().__init__()
        self.width = width
        angles = torch.arange(64)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("cos_sin_cache", torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))

    def tables(self, positions):
        return (half.repeat(1, 1, 2) for half in self.cos_sin_cache[positions][None].chunk(2, dim=-1))

    def forward(self, positions, queries, keys):
        split = (x.unflatten(-1, (-1, self.width)).transpose(0, 1)[None] for x in (queries, keys))
        turned = apply_rotary_pos_emb(*split, *self.tables(positions))
        return tuple(x[0].transpose(0, 1).flatten(1) for x in turned)


class Attention(nn.Module):
    """Keeps the keys and values that it gets, and returns the queries."""

    def forward(self, queries, keys, values):
        self.received = keys, values
        return queries


@pytest.mark.parametrize("kind", QUANTIZERS)
@torch.no_grad()
def test_cache_receives_quantized_keys_and_values_and_the_prefix(imported, tmp_path, kind):
    block, _, _, prefix_kv = load_block(imported, tmp_path, kind=kind)
    keys_, values_ = block.self_attn.key_quantizer, block.self_attn.value_quantizer
    generator = torch.Generator().manual_seed(6)
    queries, keys, values = (torch.randn(TOKENS, heads * WIDTH, generator=generator) for heads in (4, HEADS, HEADS))
    positions = torch.tensor([2, 3, 4, 0, 1, 2, 3, 40, 1])  # pieces of several texts in one batch
    rope, engine = Rope(), Attention()
    turned = TurnedKeys(rope, keys_, torch.float32, prefix_tokens=len(PREFIX))
    assert not turned.in_one_pass  # no Sylvester matrix has order 12
    served = CachedValues(engine, values_, HEADS, prefix_kv)
    served_queries, served_keys = turned(positions, queries, keys)
    served(served_queries, served_keys, values)

    def split(x):
        return x.unflatten(-1, (HEADS, WIDTH)).transpose(0, 1)[None]

    tables = tuple(rope.tables(positions))
    if kind == "keys before RoPE":
        before = keys_(split(keys))[0].transpose(0, 1).flatten(1)
        expected_keys = split(rope(positions, queries, before)[1])
    else:
        expected_keys = keys_(split(rope(positions, queries, keys)[1]), tables)
    expected = torch.stack((expected_keys, values_(split(values))))[:, 0].clone()
    for row, position in enumerate(positions.tolist()):
        if position < len(PREFIX):
            expected[:, :, row] = prefix_kv[:, :, position]
    cached = torch.stack([split(x)[0] for x in engine.received])
    assert torch.allclose(cached, expected, atol=1e-5)
    assert torch.equal(served_queries, rope(positions, queries, keys)[0])
    with GpuDouble() as gpu:
        engine = Attention()
        turned = TurnedKeys(Rope().to(CUDA), keys_, torch.float32, CUDA, len(PREFIX))
        served = CachedValues(engine, values_, HEADS, prefix_kv, CUDA)
        positions, queries, keys, values = (x.to(CUDA) for x in (positions, queries, keys, values))
        gpu.waits.clear()
        served_queries, served_keys = turned(positions, queries, keys)
        assert served(served_queries, served_keys, values).device == CUDA
        assert not gpu.waits
        cached = torch.stack([split(x.cpu())[0] for x in engine.received])
    assert torch.allclose(cached, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_travel_with_the_keys(dtype):
    keys, positions = torch.randn(5, 6).to(dtype), torch.tensor([0, 2, 299, 300, 70_000])
    split_keys, places = attention.split_places(attention.append_places(keys, positions, 300))
    assert torch.equal(split_keys, keys)
    assert places.tolist() == [0, 2, 299, 300, 300]


def make_keys(width, spec, rotate, dtype):
    """Return a calibrated key quantizer of `HEADS` heads, with one scale for each, and its RoPE."""
    generator = torch.Generator().manual_seed(7)
    keys = KeyQuantizer(spec, HEADS, width, rotate, before_rope=False)
    values = {"scale": torch.tensor([0.25, 0.4])}
    if not spec.symmetric:
        values["zero_point"] = torch.tensor([6.0, 9.0])
    keys.quantizer.calibrate_(**values)
    if spec.centered:
        keys.mean = 20 * torch.randn(HEADS, width, generator=generator)
    return keys, TurnedKeys(Rope(width, dtype), keys, dtype)


@pytest.mark.skipif(not find_kernels(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "rotate"), [(8, True), (64, True), (128, True), (12, False)])
@torch.no_grad()
def test_keys_of_one_pass_equal_their_quantizer(width, rotate, symmetric, centered, dtype):
    spec = QuantizerSpec(4, symmetric, centered=centered)
    _, turned = make_keys(width, spec, rotate, dtype)
    assert turned.in_one_pass
    generator = torch.Generator().manual_seed(8)
    tokens = 200
    queries, states = (torch.randn(tokens, HEADS * width, generator=generator).to(dtype) for _ in range(2))
    positions = torch.randint(0, 64, (tokens,), generator=generator)
    served_queries, served_keys = turned(positions, queries, states)
    plain_queries, after_rope = turned.rope(positions, queries, states)
    expected = turned.quantize(after_rope, tuple(turned.rope.tables(positions)))
    assert torch.equal(served_queries, plain_queries)
    assert served_keys.dtype == dtype
    # Few values lie on the edge between two integers. Each changes its head by one step of one channel.
    step = 0.4 + 0.02 * expected.abs().max().item() * (dtype == torch.bfloat16)
    difference = (served_keys - expected).float().abs().view(tokens, HEADS, width)
    assert difference.amax() <= 1.01 * step
    same = difference.amax(-1) <= (1e-5 if dtype == torch.float32 else 2**-7) * expected.abs().max()
    assert same.float().mean() >= (0.99 if dtype == torch.float32 or centered else 0.5)


@pytest.mark.skipif(not find_kernels(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "rotate"), [(8, True), (64, True), (12, False), (12, True)])
@torch.no_grad()
def test_key_codes_stand_for_the_keys_that_a_cache_of_states_gets(width, rotate, symmetric, centered, dtype):
    keys, turned = make_keys(width, QuantizerSpec(4, symmetric, centered=centered), rotate, dtype)
    packed = PackedKeys(turned.rope, keys, dtype)
    generator = torch.Generator().manual_seed(8)
    queries, states = (torch.randn(50, HEADS * width, generator=generator).to(dtype) for _ in range(2))
    positions = torch.randint(0, 64, (50,), generator=generator)
    served_queries, codes = packed(positions, queries, states)
    expected_queries, expected = turned(positions, queries, states)
    assert torch.equal(served_queries, expected_queries)
    assert codes.shape == (50, HEADS * -(-width // 2))
    decoded = keys.quantizer.decode(attention.as_heads(codes, HEADS), width, torch.float32 if centered else dtype)
    tables = turned.find_tables(positions, expected)
    constant = keys.turn_mean(*tables) if centered else None
    states = attention.as_rows(keys.join(decoded, constant, dtype))
    # measured: 2e-6; in bfloat16 without a mean, torch's transforms are rounded to bfloat16
    assert (states - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-6) * expected.abs().max()


@pytest.mark.skipif(not find_kernels(), reason="no C++ compiler")
@torch.no_grad()
def test_codes_are_compiled_for_any_number_of_tokens():
    """`len(x)` in the description of an operator would fix the number, and vLLM could not start."""
    keys, turned = make_keys(8, QuantizerSpec(4, centered=True), True, torch.float32)
    quantizer = ActivationQuantizer(QuantizerSpec(4), 8, HEADS)
    quantizer.calibrate_(scale=torch.rand(quantizer.scale.shape))
    packed, values = PackedKeys(turned.rope, keys, torch.float32), PackedValues(quantizer, HEADS, torch.float32, CPU)

    def encode(positions, queries, states):
        return *packed(positions, queries, states), values(states)

    compiled = torch.compile(encode, backend="eager", fullgraph=True)
    for tokens in (5, 9):
        operands = torch.arange(tokens), *(torch.randn(tokens, HEADS * 8) for _ in range(2))
        for tensor in operands:
            torch._dynamo.mark_dynamic(tensor, 0)
        for output, expected in zip(compiled(*operands), encode(*operands), strict=True):
            assert torch.equal(output, expected)


@torch.no_grad()
def test_value_codes_are_those_of_the_quantizer():
    for options in ({}, {"symmetric": False, "centered": True}, {"group_size": 4}):
        quantizer = ActivationQuantizer(QuantizerSpec(4, **options), 8, HEADS)
        quantizer.calibrate_(**{name: torch.rand(buffer.shape) for name, buffer in quantizer.named_buffers()})
        values = torch.randn(5, HEADS * 8)
        codes = PackedValues(quantizer, HEADS, torch.float32, torch.device("cpu"))(values)
        assert torch.equal(codes, attention.as_rows(quantizer.encode(attention.as_heads(values, HEADS))))


def test_settings_without_codes_are_named():
    def explain(keys, values, before_rope=False):
        quantizers = KeyQuantizer(keys, HEADS, 8, False, before_rope), ActivationQuantizer(values, 8, HEADS)
        for quantizer in (quantizers[0].quantizer, quantizers[1]):
            quantizer.calibrated = True
        return attention.explain_no_codes(*quantizers)

    static = QuantizerSpec(4)
    assert explain(static, static) is None
    assert explain(static, QuantizerSpec(8, format="fp8_e4m3")) is None
    assert "keys.before_rope=true" in explain(static, static, before_rope=True)
    assert "keys.bits=16" in explain(QuantizerSpec(16), static)
    assert "values.mode=dynamic" in explain(static, QuantizerSpec(4, dynamic=True))
    assert "values.format=nvfp4" in explain(static, QuantizerSpec(4, format="nvfp4"))


def test_keys_of_other_settings_are_not_quantized_in_one_pass():
    specs = [
        (QuantizerSpec(4), True),
        (QuantizerSpec(16), False),
        (QuantizerSpec(4, dynamic=True), False),
        (QuantizerSpec(4, group_size=4), False),
        (QuantizerSpec(8, format="fp8_e4m3"), False),
    ]
    for spec, fits in specs:
        assert attention.fits_one_pass(KeyQuantizer(spec, HEADS, 8, True, before_rope=False)) == fits
        assert not attention.fits_one_pass(KeyQuantizer(spec, HEADS, 8, False, before_rope=True))
        assert not attention.fits_one_pass(KeyQuantizer(spec, HEADS, 12, True, before_rope=False))


@pytest.mark.skipif(not find_kernels(), reason="no C++ compiler")
@torch.no_grad()
def test_keys_of_wrong_shapes_are_refused():
    keys, turned = make_keys(64, QuantizerSpec(4, centered=True), True, torch.float32)
    states, positions = torch.zeros(3, HEADS * 64), torch.arange(3)
    expected = turned.quantize_in_one_pass(states, positions)
    assert expected.shape == states.shape
    for wrong in (positions[:1], positions + 62, positions - 1):
        with pytest.raises(RuntimeError, match="position"):
            turned.quantize_in_one_pass(states, wrong)
    for wrong in (states[:, :-1], states.double(), states[None]):
        with pytest.raises(RuntimeError):
            turned.quantize_in_one_pass(wrong, positions)
    keys.mean = keys.mean[:1]
    with pytest.raises(RuntimeError, match="mean needs 128 values"):
        turned.quantize_in_one_pass(states, positions)
    turned.rope.cos_sin_cache = None  # without a mean, the table is not read
    turned.quantizer = make_keys(64, QuantizerSpec(4), True, torch.float32)[0]
    assert turned.quantize_in_one_pass(states, positions).shape == states.shape

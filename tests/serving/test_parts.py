"""What vLLM is given in place of its linears, RoPE and attention; these parts need no vLLM."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pipeline.blocks.quantized import find_settings, find_site_quantizers
from pipeline.export.loading import load
from pipeline.models.architectures import find_architecture
from pipeline.numerics.integer_product import IntegerProduct
from pipeline.serving.attention import CachedValues, TurnedKeys
from pipeline.serving.linear import ServedLinear
from tests.export.test_folder import make_export
from tests.export.test_prefixed_model import PREFIX, QUANTIZERS

HEADS, WIDTH, TOKENS = 2, 12, 9  # of the tiny Llama's keys


def load_block(imported, folder, family="llama_tied", kind="static"):
    """Block 1 of an exported model, its config, its settings and its share of the prefix."""
    model, _ = load(make_export(imported, folder, family, kind)[0])
    settings = find_settings(model.config.quantization_config.blocks, 1)
    return model.model.layers[1], model.config, settings, model.prefix_kv[1]


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("family", ["llama_tied", "llama_untied_biases"])
@pytest.mark.parametrize("integers", [True, False])
@torch.no_grad()
def test_fused_linears_compute_what_the_exported_ones_do(imported, tmp_path, integers, family, kind):
    """Side by side, each output channel with its own scale; integers where the settings allow it."""
    block, config, settings, _ = load_block(imported, tmp_path, family, kind)
    architecture = find_architecture(config)
    quantizers = find_site_quantizers(block, architecture)
    block.self_attn.k_proj._forward_hooks.clear()  # quantizes keys before RoPE; `TurnedKeys` does
    for site, readers in architecture.site_readers.items():
        parts = [block.get_submodule(name) for name in readers]
        x = torch.randn(7, parts[0].in_features, generator=torch.Generator().manual_seed(5))
        own = x if parts[0].input_quantizer is not None else quantizers[site](x)  # norms quantize for their readers
        expected = torch.cat([part(own) for part in parts], dim=-1)
        rotate = {"attention_output": settings.online_r5, "mlp_hidden": settings.online_r4}.get(site, False)
        served = ServedLinear(parts, quantizers[site], rotate, torch.float32, IntegerProduct if integers else None)
        assert (served.product is not None) == (integers and kind in ("static", "keys before RoPE"))
        assert (served(x) - expected).abs().max() <= 1e-5 * expected.abs().max()  # measured: 4e-7


class Rope(nn.Module):
    """vLLM's interface over transformers' function."""

    def __init__(self):
        super().__init__()
        angles = torch.arange(64)[:, None] * 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
        self.register_buffer("cos_sin_cache", torch.cat((angles.cos(), angles.sin()), dim=-1))

    def tables(self, positions):
        return (half.repeat(1, 1, 2) for half in self.cos_sin_cache[positions][None].chunk(2, dim=-1))

    def forward(self, positions, queries, keys):
        split = (x.unflatten(-1, (-1, WIDTH)).transpose(0, 1)[None] for x in (queries, keys))
        turned = apply_rotary_pos_emb(*split, *self.tables(positions))
        return tuple(x[0].transpose(0, 1).flatten(1) for x in turned)


class Attention(nn.Module):
    def forward(self, queries, keys, values):
        self.seen = keys, values
        return queries


@pytest.mark.parametrize("kind", QUANTIZERS)
@torch.no_grad()
def test_cache_gets_quantized_keys_and_values_and_the_prefix_at_its_positions(imported, tmp_path, kind):
    block, _, _, prefix_kv = load_block(imported, tmp_path, kind=kind)
    keys_, values_ = block.self_attn.key_quantizer, block.self_attn.value_quantizer
    generator = torch.Generator().manual_seed(6)
    queries, keys, values = (torch.randn(TOKENS, heads * WIDTH, generator=generator) for heads in (4, HEADS, HEADS))
    positions = torch.tensor([2, 3, 4, 0, 1, 2, 3, 40, 1])  # pieces of several texts, as they come in a batch
    rope, attention = Rope(), Attention()
    turned = TurnedKeys(rope, keys_, torch.float32)
    served = CachedValues(attention, turned, values_, prefix_kv)
    own_queries, own_keys = turned(positions, queries, keys)
    served(own_queries, own_keys, values)

    def split(x):
        return x.unflatten(-1, (HEADS, WIDTH)).transpose(0, 1)[None]

    keys_.positions = tuple(rope.tables(positions))
    if kind == "keys before RoPE":
        before = keys_(split(keys))[0].transpose(0, 1).flatten(1)
        expected_keys = split(rope(positions, queries, before)[1])
    else:
        expected_keys = keys_(split(rope(positions, queries, keys)[1]))
    expected = torch.stack((expected_keys, values_(split(values))))[:, 0].clone()
    for row, position in enumerate(positions.tolist()):
        if position < len(PREFIX):
            expected[:, :, row] = prefix_kv[:, :, position]
    found = torch.stack([split(x)[0] for x in attention.seen])
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(own_queries, rope(positions, queries, keys)[0])

"""The recorded statistics of a block cover exactly the values that will be quantized, whatever the batches."""

import pytest
import torch

from pipeline.blocks.kv_cache import find_key_source
from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import fill_block, load_block
from pipeline.models.sites import CACHE_SITES
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.quantization.quantizer_init import resolve_settings
from pipeline.quantization.statistics import choose_windows, record_block
from tests.conftest import init_params, open_model

PLAIN = {f"{group}.centered": False for group in ("weights", "activations", "keys", "values")}
MAX = PLAIN | {f"{group}.range": "max" for group in ("weights", "activations", "keys", "values")}
MAX |= {"weights.rounding": "rtn", "equalize": []}


def record(checkpoint, runner, hidden, prefix_kv=None, *, mse_samples=2, changes=None, percentile_sites=frozenset()):
    """Return block 1 and its statistics."""
    settings, _ = resolve_settings(init_params(changes or MAX), checkpoint, 1)
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), settings)
    return block, record_block(
        block,
        checkpoint.architecture,
        hidden,
        prefix_kv,
        runner=runner,
        mse_samples=mse_samples,
        percentile_sites=percentile_sites,
    )


def record_inputs(block, name, runner, hidden, prefix_kv=None):
    """Return the inputs of a module of the block in one forward over all windows."""
    inputs = []
    block.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    runner.run(block, hidden, prefix_kv)
    return torch.cat(inputs)


@torch.no_grad()
def test_statistics_are_of_the_values_that_are_quantized(rotated):
    """Gram matrices, extrema and means cover all tokens, after R5 and R4, whatever the batches."""
    checkpoint, runner = rotated
    hidden = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(0))
    _, statistics = record(checkpoint, runner, hidden, mse_samples=5)
    plain = load_block(checkpoint, 1)
    for site, name, change in (
        ("attention_input", "self_attn.q_proj", lambda x: x),
        ("attention_output", "self_attn.o_proj", hadamard_transform),
        ("mlp_input", "mlp.up_proj", lambda x: x),
        ("mlp_hidden", "mlp.down_proj", hadamard_transform),
    ):
        x = change(record_inputs(plain, name, runner, hidden)).flatten(0, 1)
        recorded = statistics.sites[site]
        assert torch.allclose(recorded.channels.low, x.amin(0), atol=1e-5), site
        assert torch.allclose(recorded.channels.high, x.amax(0), atol=1e-5), site
        assert torch.allclose(recorded.channels.mean, x.mean(0), atol=1e-5), site
        hessian = recorded.take_hessian()
        assert torch.allclose(hessian, x.T @ x / 60, rtol=1e-4, atol=1e-4), site
        assert torch.allclose(recorded.center_(hessian), torch.cov(x.T, correction=0), rtol=1e-3, atol=1e-4), site
        assert recorded.channels.count == 60
        assert torch.allclose(recorded.sample, x, atol=1e-5), site
    expected = runner.run(plain, hidden)
    assert torch.allclose(statistics.outputs, expected, atol=1e-5)
    assert torch.equal(statistics.inputs, hidden)


@torch.no_grad()
def test_samples_do_not_depend_on_the_batch_size(rotated):
    checkpoint, runner = rotated
    hidden = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(0))
    samples = []
    for batch_size in (1, 2, 5):
        runner.batch_size = batch_size
        _, statistics = record(checkpoint, runner, hidden, mse_samples=2)
        sites = {site: statistics.sites[site].sample for site in ("mlp_input", "key", "value")}
        samples.append(sites | {"queries": statistics.queries, "keys": statistics.keys, "outputs": statistics.outputs})
    assert samples[0]["mlp_input"].shape == (30, 48)  # every second of 60 tokens
    assert samples[0]["key"].shape == (2, 2, 12, 12)  # two whole windows
    for other in samples[1:]:
        for site, sample in samples[0].items():
            assert torch.allclose(sample, other[site], atol=1e-5), site


def test_windows_are_spread_evenly():
    assert choose_windows(64, 4) == [0, 21, 42, 63]
    assert choose_windows(3, 8) == [0, 1, 2]
    assert choose_windows(5, 1) == [0]


@torch.no_grad()
def test_recording_attention_is_causal_and_reads_the_prefix(rotated):
    """The recording forward equals the ordinary one, prefix and mask included."""
    checkpoint, runner = rotated
    hidden = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(1))
    prefix_kv = compute_prefix_kv(checkpoint, torch.randn(3, 48), runner)[1]
    block, statistics = record(checkpoint, runner, hidden, prefix_kv)
    plain = load_block(checkpoint, 1)
    expected = record_inputs(plain, "self_attn.o_proj", runner, hidden, prefix_kv).flatten(0, 1)
    assert torch.allclose(statistics.sites["attention_output"].sample, hadamard_transform(expected), atol=1e-5)
    assert statistics.queries.shape == (2, 4, 12, 12)
    assert torch.allclose(hadamard_transform(statistics.keys), statistics.sites["key"].sample, atol=1e-5)
    assert block.self_attn.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_prefix_positions_enter_no_statistic(rotated):
    checkpoint, runner = rotated
    hidden = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(1))
    huge = torch.randn(2, 2, 3, 12) * 1000
    _, statistics = record(checkpoint, runner, hidden, huge, percentile_sites=frozenset(CACHE_SITES))
    for site in CACHE_SITES:
        recorded = statistics.sites[site]
        assert recorded.channels.high.max() < 100
        assert recorded.channels.count == 24
        assert recorded.sample.shape == (2, 2, 12, 12)
        assert recorded.histogram.counts.sum() == 2 * 12 * 2 * 12


@torch.no_grad()
def test_histograms_are_of_the_values_less_their_means(rotated):
    checkpoint, runner = rotated
    hidden = torch.randn(4, 12, 48, generator=torch.Generator().manual_seed(1)) + 1
    centered = MAX | {"activations.centered": True, "keys.centered": True}
    sites = frozenset(("mlp_input", "key"))
    _, statistics = record(checkpoint, runner, hidden, changes=centered, percentile_sites=sites, mse_samples=4)
    for site, over in (("mlp_input", 0), ("key", (0, 2))):
        recorded = statistics.sites[site]
        values = recorded.sample
        if site != "key":  # the mean of the keys before RoPE is already taken out
            values = values - values.mean(over, keepdim=True)
        flat = values.flatten().unsqueeze(0) if site == "mlp_input" else values.transpose(0, 1).flatten(1)
        low, high = recorded.histogram.find_range(98)
        # bfloat16's resolution
        assert torch.allclose(high, torch.quantile(flat, 0.98, dim=1, interpolation="higher"), rtol=1 / 256)
        assert torch.allclose(low, torch.quantile(flat, 0.02, dim=1, interpolation="lower"), rtol=1 / 256)


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen2", "qwen3", "gemma3_text", "olmo2", "ernie4_5_moe"])
@torch.no_grad()
def test_the_mean_of_keys_is_taken_before_rope(family, imported):
    checkpoint, runner = open_model(imported[family])
    hidden = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(1)) + 1
    block, statistics = record(checkpoint, runner, hidden, changes=MAX | {"keys.centered": True})
    quantizer, outputs = block.self_attn.key_quantizer, []
    find_key_source(block.self_attn).register_forward_hook(lambda module, args, output: outputs.append(output))
    runner.run(block, hidden)
    keys = quantizer.split_heads(outputs[0], checkpoint.architecture.heads_first)
    assert torch.allclose(quantizer.mean, keys.mean((0, 2)), atol=1e-5)
    # The recorded keys are the rest, after RoPE and R3, which keep its energy.
    varying = keys - keys.mean((0, 2), keepdim=True)
    assert statistics.sites["key"].sample.square().sum() < varying.square().sum() * 1.001

"""What is recorded before the scales are chosen, and how blocks follow one another."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.blocks.kv_cache import find_key_source
from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import fill_block, load_block
from pipeline.importing.import_model import import_model
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.quantization.quantizer_init import init_blocks, plan_block
from pipeline.quantization.statistics import choose_windows, record_block
from pipeline.runtime.artifacts import load_tensors, make_header
from tests.conftest import init_params, open_model
from tests.rotation.test_merging import rotate

PLAIN = {f"{group}.centered": False for group in ("weights", "activations", "keys", "values")}
MAX = PLAIN | {f"{group}.range": "max" for group in ("weights", "activations", "keys", "values")}
MAX |= {"weights.rounding": "rtn", "equalize": []}


@pytest.fixture
def rotated(imported, tmp_path):
    return rotate(imported["llama_untied_biases"], tmp_path / "rotation")[:2]


def record(checkpoint, runner, hidden, prefix_kv=None, mse_samples=2, changes=None, percentiles=frozenset()):
    settings, _ = plan_block(init_params(changes or MAX), checkpoint, 1)
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), settings)
    return block, record_block(block, checkpoint.architecture, hidden, prefix_kv, runner, mse_samples, percentiles)


def watch(block, name, runner, hidden, prefix_kv=None):
    """Inputs of a module of the block in one forward over all windows."""
    seen = []
    block.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    runner.run(block, hidden, prefix_kv)
    return torch.cat(seen)


@torch.no_grad()
def test_statistics_are_of_what_each_quantizer_will_see(rotated):
    """Gram matrices, extrema and means over all tokens, behind R5 and R4, whatever the batches."""
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
        x = change(watch(plain, name, runner, hidden)).flatten(0, 1)
        found = statistics.sites[site]
        assert torch.allclose(found.channels.low, x.amin(0), atol=1e-5), site
        assert torch.allclose(found.channels.high, x.amax(0), atol=1e-5), site
        assert torch.allclose(found.channels.mean, x.mean(0), atol=1e-5), site
        hessian = found.take_hessian()
        assert torch.allclose(hessian, x.T @ x / 60, rtol=1e-4, atol=1e-4), site
        assert torch.allclose(found.center_(hessian), torch.cov(x.T, correction=0), rtol=1e-3, atol=1e-4), site
        assert found.channels.count == 60
        assert torch.allclose(found.sample, x, atol=1e-5), site
    expected = runner.run(plain, hidden)
    assert torch.allclose(statistics.outputs, expected, atol=1e-5)
    assert torch.equal(statistics.inputs, hidden)


@torch.no_grad()
def test_samples_are_the_same_tokens_whatever_the_batch_size(rotated):
    checkpoint, runner = rotated
    hidden = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(0))
    samples = []
    for batch_size in (1, 2, 5):
        runner.batch_size = batch_size
        _, statistics = record(checkpoint, runner, hidden, mse_samples=2)
        own = {site: statistics.sites[site].sample for site in ("mlp_input", "key", "value")}
        samples.append(own | {"queries": statistics.queries, "keys": statistics.keys, "outputs": statistics.outputs})
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
def test_recording_attention_is_causal_and_sees_the_prefix(rotated):
    """The forward that records gives what the ordinary one gives, prefix and mask included."""
    checkpoint, runner = rotated
    hidden = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(1))
    prefix_kv = compute_prefix_kv(checkpoint, torch.randn(3, 48), runner)[1]
    block, statistics = record(checkpoint, runner, hidden, prefix_kv)
    plain = load_block(checkpoint, 1)
    expected = watch(plain, "self_attn.o_proj", runner, hidden, prefix_kv).flatten(0, 1)
    assert torch.allclose(statistics.sites["attention_output"].sample, hadamard_transform(expected), atol=1e-5)
    assert statistics.queries.shape == (2, 4, 12, 12)
    assert torch.allclose(hadamard_transform(statistics.keys), statistics.sites["key"].sample, atol=1e-5)
    assert block.self_attn.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_prefix_positions_enter_no_statistic(rotated):
    checkpoint, runner = rotated
    hidden = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(1))
    huge = torch.randn(2, 2, 3, 12) * 1000
    _, statistics = record(checkpoint, runner, hidden, huge, percentiles=frozenset(("key", "value")))
    for site in ("key", "value"):
        kept = statistics.sites[site]
        assert kept.channels.high.max() < 100
        assert kept.channels.count == 24
        assert kept.sample.shape == (2, 2, 12, 12)
        assert kept.histogram.counts.sum() == 2 * 12 * 2 * 12


@torch.no_grad()
def test_histograms_are_of_the_values_less_their_means(rotated):
    checkpoint, runner = rotated
    hidden = torch.randn(4, 12, 48, generator=torch.Generator().manual_seed(1)) + 1
    centered = MAX | {"activations.centered": True, "keys.centered": True}
    sites = frozenset(("mlp_input", "key"))
    _, statistics = record(checkpoint, runner, hidden, changes=centered, percentiles=sites, mse_samples=4)
    for site, over in (("mlp_input", 0), ("key", (0, 2))):
        kept = statistics.sites[site]
        values = kept.sample  # of keys: the mean before RoPE is out already
        if site != "key":
            values = values - values.mean(over, keepdim=True)
        flat = values.flatten().unsqueeze(0) if site == "mlp_input" else values.transpose(0, 1).flatten(1)
        low, high = kept.histogram.find_range(98)
        # bfloat16's resolution
        assert torch.allclose(high, torch.quantile(flat, 0.98, dim=1, interpolation="higher"), rtol=1 / 256)
        assert torch.allclose(low, torch.quantile(flat, 0.02, dim=1, interpolation="lower"), rtol=1 / 256)


def run_blocks(checkpoint, runner, token_ids, work, changes=None):
    hidden = checkpoint.embed(token_ids)
    init_blocks(checkpoint, hidden, None, init_params(changes or MAX), runner, work, make_header("q", {}))
    return [load_tensors(work / f"block-{index:05d}.safetensors", "q")[0] for index in range(3)]


def test_scales_of_true_extrema_do_not_depend_on_the_order_of_windows(rotated, token_ids, tmp_path):
    checkpoint, runner = rotated
    first = run_blocks(checkpoint, runner, token_ids, tmp_path / "a")
    second = run_blocks(checkpoint, runner, token_ids.flip(0), tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        for name, tensor in one.items():
            assert torch.allclose(tensor.float(), other[name].float(), rtol=1e-5), name


@torch.no_grad()
def test_each_block_is_initialised_on_what_its_quantized_predecessors_produce(rotated, token_ids, tmp_path):
    checkpoint, runner = rotated
    blocks = run_blocks(checkpoint, runner, token_ids, tmp_path / "a")
    hidden = checkpoint.embed(token_ids)
    quantized = {name.removeprefix("model.layers.0."): tensor for name, tensor in blocks[0].items()}
    runner.advance_(fill_block(checkpoint, 0, quantized, plan_block(init_params(MAX), checkpoint, 0)[0]), hidden)

    def scale_of(statistics):
        channels = statistics.sites["attention_input"].channels
        return torch.maximum(channels.high.max(), -channels.low.min()) / 7

    expected = scale_of(record(checkpoint, runner, hidden)[1])
    assert torch.allclose(blocks[1]["model.layers.1.input_layernorm.quantizer.scale"], expected, rtol=1e-5)
    on_exact = checkpoint.embed(token_ids)
    runner.advance_(load_block(checkpoint, 0), on_exact)
    assert not torch.allclose(scale_of(record(checkpoint, runner, on_exact)[1]), expected, rtol=1e-3)


def test_plans_combine_bits_modes_and_overrides_with_the_models_online_rotations(rotated):
    checkpoint, _ = rotated
    override = {"sites": ["down_proj", "mlp_hidden"], "blocks": [2], "bits": 8}
    init = init_params({"overrides": [override], "keys.bits": 16, "values.mode": "dynamic", "values.symmetric": False})
    settings, own = plan_block(init, checkpoint, 1)
    assert settings.online_r3
    assert settings.online_r4
    assert settings.online_r5
    assert "key" not in own
    assert not settings.spec("key").enabled
    assert settings.spec("value").dynamic
    assert not settings.spec("value").symmetric
    assert settings.spec("down_proj").bits == 4
    other, _ = plan_block(init, checkpoint, 2)
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


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen2", "qwen3", "gemma3_text", "olmo2"])
@torch.no_grad()
def test_the_mean_of_keys_is_that_of_what_rope_is_given(family, imported):
    checkpoint, runner = open_model(imported[family])
    hidden = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(1)) + 1
    block, statistics = record(checkpoint, runner, hidden, changes=MAX | {"keys.centered": True})
    keys, seen = block.self_attn.key_quantizer, []
    find_key_source(block.self_attn).register_forward_hook(lambda module, args, output: seen.append(output))
    runner.run(block, hidden)
    whole = keys.split_heads(seen[0], checkpoint.architecture.heads_first)
    assert torch.allclose(keys.mean, whole.mean((0, 2)), atol=1e-5)
    # What varies is what is recorded, behind RoPE and R3, which keep its energy.
    varying = whole - whole.mean((0, 2), keepdim=True)
    assert statistics.sites["key"].sample.square().sum() < varying.square().sum() * 1.001


def test_biases_of_a_hundred_leave_keys_their_range(model_folders, tmp_path):
    """As in Qwen2's first block: behind RoPE a constant is none any more, and fills the range."""
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
        work, header = tmp_path / f"work-{centered}", make_header("quantizer_init", {"centered": centered})
        own = init_params({"keys.centered": centered})
        reports = init_blocks(checkpoint, hidden.clone(), None, own, runner, work, header)
        errors[centered] = max(report["sites"]["key"]["relative_error"] for report in reports)
    assert errors[True] < 0.02  # measured: 0.004
    assert errors[False] > 5 * errors[True]

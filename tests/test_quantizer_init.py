"""What is recorded before the scales are chosen, and how blocks follow one another."""

import pytest
import torch
from conftest import open_model
from test_rotation import rotate

from pipeline.artifacts import load_tensors, make_header
from pipeline.hadamard import hadamard_transform
from pipeline.quantized_block import BlockSettings, block_settings, fill_block, load_block
from pipeline.quantizer_init import InitSettings, _record, init_blocks
from pipeline.walk import compute_prefix_kv

INIT = InitSettings(4, -1, 4, 4, 4, "rtn", 0.01, "minmax", 64, torch.float32)


@pytest.fixture
def rotated(imported, tmp_path):
    return rotate(imported["llama_untied_biases"], tmp_path / "rotation")[:2]


def settings_of(checkpoint, init=INIT):
    return init.block_settings(block_settings(checkpoint))


def record(checkpoint, runner, hidden, prefix_kv=None, search_tokens=64):
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), settings_of(checkpoint))
    return block, _record(checkpoint, block, hidden, prefix_kv, runner, search_tokens, 1)


def watch(block, name, runner, hidden, prefix_kv=None):
    """Inputs of a module of the block in one forward over all windows."""
    seen = []
    block.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    runner.run(block, hidden, prefix_kv)
    return torch.cat(seen)


@torch.no_grad()
def test_statistics_are_of_what_each_quantizer_will_see(rotated):
    """Gram matrices and maxima over all tokens; mlp_hidden behind R4, whatever the batches."""
    checkpoint, runner = rotated
    hidden = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(0))
    _, statistics = record(checkpoint, runner, hidden)
    plain = load_block(checkpoint, 1)
    for site, name, change in (
        ("attention_input", "self_attn.q_proj", lambda x: x),
        ("attention_output", "self_attn.o_proj", lambda x: x),
        ("mlp_input", "mlp.up_proj", lambda x: x),
        ("mlp_hidden", "mlp.down_proj", hadamard_transform),
    ):
        x = change(watch(plain, name, runner, hidden)).flatten(0, 1)
        found = statistics[site]
        assert found.max_abs == pytest.approx(x.abs().max().item(), rel=1e-5), site
        assert torch.allclose(found.gram, x.T @ x, rtol=1e-4, atol=1e-3), site
        assert found.tokens == 60
        assert torch.allclose(found.sample, x[::1], atol=1e-5), site


@torch.no_grad()
def test_samples_are_the_same_tokens_whatever_the_batch_size(rotated):
    checkpoint, runner = rotated
    hidden = torch.randn(5, 12, 48, generator=torch.Generator().manual_seed(0))
    samples = []
    for batch_size in (1, 2, 5):
        runner.batch_size = batch_size
        _, statistics = record(checkpoint, runner, hidden, search_tokens=17)
        samples.append({site: statistics[site].sample for site in ("mlp_input", "key", "query", "value")})
    assert samples[0]["mlp_input"].shape == (20, 48)  # every third of 60 tokens
    assert samples[0]["key"].shape == (1, 2, 12, 12)  # one whole window
    for other in samples[1:]:
        for site, sample in samples[0].items():
            assert torch.allclose(sample, other[site], atol=1e-5), site


@torch.no_grad()
def test_recording_attention_is_causal_and_sees_the_prefix(rotated):
    """The forward that records gives what the ordinary one gives, prefix and mask included."""
    checkpoint, runner = rotated
    hidden = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(1))
    prefix_kv = compute_prefix_kv(checkpoint, torch.randn(3, 48), runner)[1]
    block, statistics = record(checkpoint, runner, hidden, prefix_kv)
    plain = load_block(checkpoint, 1)
    expected = watch(plain, "self_attn.o_proj", runner, hidden, prefix_kv).flatten(0, 1)
    assert torch.allclose(statistics["attention_output"].sample, expected, atol=1e-5)
    assert statistics["query"].sample.shape == (2, 4, 12, 12)
    assert block.self_attn.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_prefix_positions_enter_no_statistic(rotated):
    checkpoint, runner = rotated
    hidden = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(1))
    huge = torch.randn(2, 2, 3, 12) * 1000
    _, statistics = record(checkpoint, runner, hidden, huge)
    assert statistics["key"].max_abs.max() < 100
    assert statistics["value"].max_abs.max() < 100
    assert statistics["key"].sample.shape == (2, 2, 12, 12)


def run_blocks(checkpoint, runner, token_ids, work, init=INIT):
    hidden = checkpoint.embed(token_ids)
    init_blocks(checkpoint, hidden, None, settings_of(checkpoint, init), init, runner, work, make_header("q", {}))
    return [load_tensors(work / f"block-{index:05d}.safetensors", "q")[0] for index in range(3)]


def test_minmax_scales_do_not_depend_on_the_order_of_windows(rotated, token_ids, tmp_path):
    checkpoint, runner = rotated
    first = run_blocks(checkpoint, runner, token_ids, tmp_path / "a")
    second = run_blocks(checkpoint, runner, token_ids.flip(0), tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        for name, tensor in one.items():
            assert torch.allclose(tensor, other[name], rtol=1e-5), name


@torch.no_grad()
def test_each_block_is_initialised_on_what_its_quantized_predecessors_produce(rotated, token_ids, tmp_path):
    checkpoint, runner = rotated
    blocks = run_blocks(checkpoint, runner, token_ids, tmp_path / "a")
    hidden = checkpoint.embed(token_ids)
    quantized = {name.removeprefix("model.layers.0."): tensor for name, tensor in blocks[0].items()}
    runner.advance_(fill_block(checkpoint, 0, quantized, settings_of(checkpoint)), hidden)
    _, statistics = record(checkpoint, runner, hidden)
    expected = statistics["attention_input"].max_abs / 7
    assert torch.allclose(blocks[1]["model.layers.1.input_layernorm.quantizer.scale"], expected, rtol=1e-5)
    on_exact = checkpoint.embed(token_ids)
    runner.advance_(load_block(checkpoint, 0), on_exact)
    _, statistics = record(checkpoint, runner, on_exact)
    assert not torch.allclose(statistics["attention_input"].max_abs / 7, expected, rtol=1e-3)


def test_settings_combine_bits_with_the_models_online_rotations():
    combined = INIT.block_settings(BlockSettings(online_r3=True, online_r4=False))
    assert combined == BlockSettings(4, -1, 4, 4, 4, online_r3=True, online_r4=False)


def test_group_sizes_give_a_scale_per_group(imported, token_ids, tmp_path):
    checkpoint, runner = open_model(imported["llama_tied"])
    init = InitSettings(3, 12, 16, 16, 16, "gptq", 0.01, "mse", 64, torch.float32)
    hidden = checkpoint.embed(token_ids)
    settings = init.block_settings(BlockSettings())
    init_blocks(checkpoint, hidden, None, settings, init, runner, tmp_path, make_header("q", {}))
    tensors, _ = load_tensors(tmp_path / "block-00002.safetensors", "q")
    assert tensors["model.layers.2.mlp.down_proj.weight_scale"].shape == (48, 8)
    assert tensors["model.layers.2.mlp.down_proj.weight"].dtype == torch.int8
    assert tensors["model.layers.2.mlp.down_proj.weight"].abs().max() <= 4
    assert not any("quantizer" in name for name in tensors)

"""Statistics and outliers of activations equal transformers' own forward, without prefix positions."""

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.pictures.activations import BIN_EDGES, STATISTICS, count_values, measure_activations
from tests.conftest import make_model, open_model
from tests.rotation.test_merging import rotate


def measure(imported, family="llama_tied", prefix=(), threshold=1.5):
    """Return a checkpoint, windows and the activations of the model on them."""
    checkpoint, runner = open_model(imported[family])
    token_ids = torch.randint(0, 320, (3, 20), generator=torch.Generator().manual_seed(1))
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(torch.tensor(prefix, dtype=torch.int64)), runner)
    options = {"prefix_kv": prefix_kv, "threshold": threshold, "surface_blocks": [0, 2]}
    return checkpoint, token_ids, measure_activations(checkpoint, token_ids, runner, **options)


@pytest.mark.parametrize("prefix", [(), (7, 0)])
@torch.no_grad()
def test_statistics_equal_transformers_own_forward(imported, prefix):
    _, token_ids, activations = measure(imported, prefix=prefix)
    model, tensors = make_model("llama_tied"), {}
    layer, start = model.model.layers[1], len(prefix)
    take = lambda name: lambda m, args, output: tensors.__setitem__(name, output[:, start:])  # noqa: E731
    for name in ("q_proj", "v_proj"):
        getattr(layer.self_attn, name).register_forward_hook(take(name))
    layer.mlp.down_proj.register_forward_hook(take("down_proj"))
    layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: tensors.__setitem__("mlp_hidden", args[0][:, start:]))
    layer.input_layernorm.register_forward_hook(take("attention_input"))
    layer.register_forward_hook(take("block_output"))
    model(torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(3, -1), token_ids), dim=1))
    for site, x in tensors.items():
        maxima = x.abs().amax(-1).flatten().sort(descending=True).values
        expected = torch.stack((*maxima[:3], maxima.median(), maxima[-1]))
        assert torch.allclose(activations.statistics[site][1], expected, rtol=1e-4), site
    assert len(STATISTICS) == 5
    names = [f"{name}.{block}" for block in (0, 2) for name in ("input", "mlp_hidden", "output")]
    assert sorted(activations.surfaces) == sorted(names)
    assert activations.surfaces["input.2"].shape == (20, 48)  # nothing to pool


def test_outliers_are_counted_with_positions_and_contents(imported):
    _, token_ids, activations = measure(imported)
    total = sum(row["count"] for row in activations.outliers) * len(token_ids)
    assert sum(activations.positions.values()) == pytest.approx(total)
    assert total > 0
    assert set(activations.contents) <= set(token_ids.flatten().tolist())
    assert not measure(imported, threshold=1e6)[2].positions


def test_inputs_of_down_proj_are_measured_after_r4(imported, tmp_path):
    checkpoint, runner, _ = rotate(imported["llama_tied"], tmp_path)
    _, token_ids, plain = measure(imported)
    rotated = measure_activations(checkpoint, token_ids, runner, prefix_kv=None, threshold=64.0, surface_blocks=[0])
    assert torch.allclose(rotated.statistics["q_proj"], plain.statistics["q_proj"], rtol=1e-3)
    assert not torch.allclose(rotated.statistics["mlp_hidden"], plain.statistics["mlp_hidden"], rtol=1e-2)


def test_values_are_counted_by_sign_and_magnitude():
    x = torch.tensor([[0.0, 1e-4, -1e-4, 1.0001, -1.0001], [1e9, -1e9, 2.0, 1.01, 5e-4]])
    counts = count_values(x)
    one = 128 + int(torch.searchsorted(BIN_EDGES, torch.tensor(1.0001, dtype=torch.float64)))
    assert counts.sum() == x.numel()
    assert counts[128] == 4  # zero, and magnitudes up to 1e-3
    assert (counts[0], counts[256]) == (1, 1)
    assert (counts[one], counts[256 - one]) == (2, 1)


@torch.no_grad()
def test_histograms_hold_every_value_of_the_site(imported):
    checkpoint, token_ids, activations = measure(imported)
    assert sorted(activations.histograms) == [0, 2]
    width = checkpoint.config.intermediate_size
    assert all(counts.sum() == token_ids.numel() * width for counts in activations.histograms.values())

"""Activations are measured where they are, and drawn."""

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.pictures.activations import STATISTICS, measure_activations, read_outliers, write_activations
from pipeline.pictures.plots import draw_all, read_measured
from pipeline.runtime.artifacts import make_header
from tests.conftest import make_model, open_model
from tests.rotation.test_merging import rotate

HEADER = make_header("activation_plots", {})


def measure(imported, family="llama_tied", prefix=(), threshold=1.5):
    checkpoint, runner = open_model(imported[family])
    token_ids = torch.randint(0, 320, (3, 20), generator=torch.Generator().manual_seed(1))
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(torch.tensor(prefix, dtype=torch.int64)), runner)
    return checkpoint, token_ids, measure_activations(checkpoint, token_ids, runner, prefix_kv, threshold, [0, 2])


@pytest.mark.parametrize("prefix", [(), (7, 0)])
@torch.no_grad()
def test_statistics_are_those_of_transformers_own_forward_behind_the_prefix(imported, prefix):
    _, token_ids, found = measure(imported, prefix=prefix)
    model, seen = make_model("llama_tied"), {}
    layer, cut = model.model.layers[1], len(prefix)
    take = lambda name: lambda m, args, output: seen.__setitem__(name, output[:, cut:])  # noqa: E731
    for name in ("q_proj", "v_proj"):
        getattr(layer.self_attn, name).register_forward_hook(take(name))
    layer.mlp.down_proj.register_forward_hook(take("down_proj"))
    layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.__setitem__("mlp_hidden", args[0][:, cut:]))
    layer.input_layernorm.register_forward_hook(take("attention_input"))
    layer.register_forward_hook(take("block_output"))
    model(torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(3, -1), token_ids), dim=1))
    for site, x in seen.items():
        maxima = x.abs().amax(-1).flatten().sort(descending=True).values
        expected = torch.stack((*maxima[:3], maxima.median(), maxima[-1]))
        assert torch.allclose(found.statistics[site][1], expected, rtol=1e-4), site
    assert len(STATISTICS) == 5
    assert set(found.surfaces) == {"input.0", "output.0", "input.2", "output.2"}
    assert found.surfaces["input.2"].shape == (20, 48)  # nothing to pool


def test_outliers_are_counted_with_positions_and_contents(imported):
    _, token_ids, found = measure(imported)
    total = sum(row["count"] for row in found.outliers) * len(token_ids)
    assert sum(found.positions.values()) == pytest.approx(total)
    assert total > 0
    assert set(found.contents) <= set(token_ids.flatten().tolist())
    assert not measure(imported, threshold=1e6)[2].positions


def test_rotated_inputs_are_taken_behind_r4(imported, tmp_path):
    rotated, runner, _ = rotate(imported["llama_tied"], tmp_path)
    _, token_ids, plain = measure(imported)
    turned = measure_activations(rotated, token_ids, runner, None, 64.0, [0])
    assert torch.allclose(turned.statistics["q_proj"], plain.statistics["q_proj"], rtol=1e-3)
    assert not torch.allclose(turned.statistics["mlp_hidden"], plain.statistics["mlp_hidden"], rtol=1e-2)


def test_pictures_are_drawn_for_all_variants_and_are_byte_identical(imported, tmp_path):
    folders = {}
    for variant, prefix in (("original", ()), ("prefixed", (7, 0))):
        checkpoint, _, found = measure(imported, prefix=prefix, threshold=1e6 if prefix else 1.5)
        folders[variant] = tmp_path / variant
        write_activations(folders[variant], found, checkpoint, HEADER)
    assert read_outliers(folders["prefixed"])["contents"] == []
    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        drawn.append(draw_all(read_measured(folders), tmp_path / name))
    names = [path.stem for path in drawn[0]]
    assert names[:6] == [
        *("token_maxima_inputs", "token_maxima_outputs", "token_maxima_blocks"),
        *("outlier_counts", "outlier_positions", "outlier_contents"),
    ]
    assert names[6:] == ["surface_input_0", "surface_input_2", "surface_output_0", "surface_output_2"]
    for one, two in zip(*drawn, strict=True):
        assert one.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert one.read_bytes() == two.read_bytes()

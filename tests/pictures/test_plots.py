"""Activations are measured where they are, and drawn; the report holds everything it shows."""

import re

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.pictures.activations import STATISTICS, measure_activations, read_outliers, write_activations
from pipeline.pictures.plots import draw_all, read_measured
from pipeline.pictures.report import build_page, draw_curves, summarise_run
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


def evaluation(perplexity, **more):
    settings = {"windows": {"prose": 2}, "targets_per_window": 47, "special_tokens": "none added"}
    return {"perplexity": {"prose": perplexity}, "settings": settings} | more


EVALUATIONS = {
    "original": evaluation(2.0, tasks={"colours": {"acc": 0.5}}),
    "export": evaluation(3.0, tasks={"colours": {"acc": 0.25}}, kl={"prose": 0.125}, average={"acc": 0.4}),
}
COSTS = {"model": {"seconds": 90.0, "peak_rss_gib": 0.5}, "export": {"seconds": 30.0, "peak_rss_gib": 1.25}}


def test_the_summary_of_a_hand_made_run():
    assert summarise_run("W4A4KV4 static", "found (3 tokens)", EVALUATIONS, COSTS, 12.5) == {
        "bits": "W4A4KV4 static",
        "prefix": "found (3 tokens)",
        "ppl": {"prose": 3.0},
        "ratio": {"prose": 1.5},
        "accuracy": {"colours": 0.25},
        "average_accuracy": 0.4,
        "minutes": 2.0,
        "gib": 1.25,
        "mib": 12.5,
    }


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(tmp_path):
    picture = tmp_path / "curve.png"
    rows = [{"epoch": "0", "train": "", "validation": "2.0"}, {"epoch": "1", "train": "1.5", "validation": "1.0"}]
    assert draw_curves(picture, rows, "epoch", ("train", "validation"), ("a", "b", "c"))
    assert not draw_curves(tmp_path / "none.png", [], "epoch", ("train",), ("a", "b", "c"))
    prefix = {
        "prefix_texts": [" the", "<s>"],
        "outlier_tokens_per_window": 1.0,
        "outlier_tokens_per_window_with_prefix": 0.0,
        "top1_median_ratio": 2000.0,
        "top1_median_ratio_with_prefix": 40.0,
    }
    saturation = [{"block": 3, "key_share": 0.02, "key_sqnr": 11.5, "value_share": 0.0, "value_sqnr": 30.0}]
    summary = summarise_run("W4A4KV4 static", "found", EVALUATIONS, COSTS, 12.5)
    page = build_page(summary, EVALUATIONS, prefix, saturation, COSTS, {"model": {"source": "a<b"}}, [picture])
    assert "&lt;s&gt;" in page
    assert "a&lt;b" in page
    assert "<s>" not in page
    assert "<td>export</td><td>3.00</td><td>1.50</td><td>0.125</td><td></td><td>0.25</td>" in page
    assert "<td>block 3 key</td><td>11.5</td><td>2.00%</td>" in page
    assert page.index("block 3 key") < page.index("block 3 value")
    assert re.findall(r'src="([^"]{,22})', page) == ["data:image/png;base64,"]
    assert "http" not in page

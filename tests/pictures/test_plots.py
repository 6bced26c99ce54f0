"""Pictures are drawn for all variants, and the same measurements give the same bytes."""

import pytest
import torch

from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec
from pipeline.pictures.activations import read_outliers, write_activations
from pipeline.pictures.plots import draw_all, draw_site_quality, find_levels, read_measured
from pipeline.runtime.artifacts import make_header
from tests.pictures.test_activations import measure

HEADER = make_header("activation_plots", {})


def test_pictures_of_all_variants_are_byte_identical(imported, tmp_path):
    folders = {}
    for variant, prefix in (("original", ()), ("prefixed", (7, 0))):
        checkpoint, _, activations = measure(imported, prefix=prefix, threshold=1e6 if prefix else 1.5)
        folders[variant] = tmp_path / variant
        write_activations(folders[variant], activations, checkpoint, HEADER)
    assert read_outliers(folders["prefixed"])["contents"] == []
    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        drawn.append(draw_all(read_measured(folders), tmp_path / name, {0: torch.linspace(-1, 1, 16)}))
    names = [path.stem for path in drawn[0]]
    assert names[:6] == [
        *("token_maxima_inputs", "token_maxima_outputs", "token_maxima_blocks"),
        *("outlier_counts", "outlier_positions", "outlier_contents"),
    ]
    surfaces = [f"surface_{name}_{block}" for name in ("input", "mlp_hidden", "output") for block in (0, 2)]
    assert names[6:] == [*surfaces, "histogram_0", "histogram_2"]
    for one, two in zip(*drawn, strict=True):
        assert one.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert one.read_bytes() == two.read_bytes()


def test_pictures_without_any_outlier_are_left_out(imported, tmp_path):
    checkpoint, _, activations = measure(imported, threshold=1e6)
    write_activations(tmp_path / "original", activations, checkpoint, HEADER)
    names = [path.stem for path in draw_all(read_measured({"original": tmp_path / "original"}), tmp_path, {})]
    assert not [name for name in names if name.startswith("outlier")]
    assert (tmp_path / "outlier_counts.png").is_file()  # `dvc plots` asks for it


@pytest.mark.parametrize(("symmetric", "expected"), [(True, [-4.0, -2.0, 0.0, 2.0]), (False, [-2.0, 0.0, 2.0, 4.0])])
def test_levels_are_the_values_that_a_quantizer_rounds_to(symmetric, expected):
    quantizer = ActivationQuantizer(QuantizerSpec(bits=2, symmetric=symmetric), 8)
    zero = {} if symmetric else {"zero_point": torch.tensor([1.0])}
    quantizer.calibrate_(scale=torch.tensor([2.0]), **zero)
    assert find_levels(quantizer, 10.0).tolist() == expected


@pytest.mark.parametrize("changes", [{"bits": 16}, {"dynamic": True}, {"group_size": 4}, {"centered": True}])
def test_quantizers_without_common_levels_have_none(changes):
    assert find_levels(ActivationQuantizer(QuantizerSpec(**{"bits": 4} | changes), 8), 10.0) is None


def test_heat_map_is_drawn_with_missing_values(tmp_path):
    rows = [{"block": 0, "key_sqnr": 12.0, "value_sqnr": None}, {"block": 1, "key_sqnr": 20.0}]
    draw_site_quality(tmp_path / "map.png", rows, ["key", "value"])
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

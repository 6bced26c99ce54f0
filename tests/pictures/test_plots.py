"""Pictures are drawn for all variants, and the same measurements give the same bytes."""

from pipeline.pictures.activations import read_outliers, write_activations
from pipeline.pictures.plots import draw_all, read_measured
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

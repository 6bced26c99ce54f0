"""The length and number of windows where `calibration.*.length` is `auto`."""

import pytest

from benchmarks.workspace import override, read_params
from pipeline.params import parse_params
from pipeline.text.lengths import DEFAULT_LENGTHS, choose_length, count_windows, find_short_windows, reach_beyond


def make_splits(changes=None):
    return parse_params(override(read_params(), changes or {})).calibration


def choose(calibration, window, room=100_000):
    """Return {split: (windows, length)}."""
    chosen = {}
    for name, split in calibration.splits().items():
        length = choose_length(name, split, window=window, room=room)
        chosen[name] = count_windows(name, split, split.windows, length), length
    return chosen


@pytest.mark.parametrize("window", [None, 128])
def test_default_lengths_hold_without_sliding_layers_and_with_narrow_ones(window):
    assert choose(make_splits(), window) == {
        "search": (64, 256),
        "train": (16, 512),
        "end_to_end": (96, 512),
        "validation": (4, 512),
        "evaluation": (4, 1024),
    }


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (512, {"search": (21, 768), "train": (8, 1024), "end_to_end": (48, 1024), "validation": (2, 1024)}),
        (4096, {"search": (4, 4352), "train": (2, 4608), "end_to_end": (11, 4608), "validation": (2, 4608)}),
    ],
)
def test_windows_go_beyond_a_sliding_window_with_as_many_tokens(window, expected):
    chosen = choose(make_splits(), window)
    assert chosen.items() >= expected.items()
    assert all(length > window for _, length in chosen.values())
    for name in ("search", "train", "end_to_end"):
        windows, length = chosen[name]
        usual = make_splits().splits()[name].windows * DEFAULT_LENGTHS[name]
        assert windows * length == pytest.approx(usual, rel=0.13)


def test_auto_stays_within_the_positions_of_the_model():
    assert choose(make_splits(), 512, room=700)["train"] == (12, 700)
    # The prefix never leaves a window that is as large as the longest text.
    assert choose(make_splits(), 4096, room=4090)["train"] == (16, 512)
    assert choose(make_splits(), None, room=300)["train"] == (16, 300)


def test_every_corpus_keeps_a_window():
    changes = {"calibration.train.corpora": {"wikipedia": 9, "news": 1}, "calibration.train.windows": 10}
    # 10 x 512 tokens are 1.1 windows of 4608; of 6 windows, a tenth is rounded to one.
    assert choose(make_splits(changes), 4096)["train"] == (6, 4608)
    assert choose(make_splits({"calibration.validation.windows": 1}), 512)["validation"] == (1, 1024)


def test_fixed_lengths_are_kept_and_short_ones_are_named():
    calibration = make_splits({"calibration.train.length": 512, "calibration.search.length": 513})
    assert choose(calibration, 512)["train"] == (16, 512)
    (line,) = find_short_windows(calibration, 512)
    assert line.startswith(
        "calibration.train.length=512: in layers with sliding_window=512, these windows read the prefix"
    )
    assert line.endswith("Use auto, or more than 512")
    assert find_short_windows(calibration, None) == find_short_windows(make_splits(), 512) == []


def test_lengths_beyond_a_window():
    assert [reach_beyond(*pair) for pair in ((None, 256), (512, 256), (512, 1024), (4096, 512), (100, 256))] == [
        256,
        768,
        1024,
        4608,
        256,
    ]

"""The number of windows that each corpus of a mix gives. Contradictions between keys: tests/test_params.py."""

import pytest

from pipeline.text.params import split_windows


@pytest.mark.parametrize(
    ("windows", "corpora", "expected"),
    [
        (5, ["a", "b"], {"a": 3, "b": 2}),
        (8, ["a", "b", "c"], {"a": 3, "b": 3, "c": 2}),
        (10, {"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 1, "b": 2, "c": 7}),
        (384, {"a": 324, "b": 60}, {"a": 324, "b": 60}),
        (7, {"a": 2, "b": 1}, {"a": 5, "b": 2}),  # 4.67 and 2.33
        (3, {"a": 1e9, "b": 1e-300}, {"a": 3, "b": 0}),
    ],
)
def test_proportions_become_whole_windows(windows, corpora, expected):
    assert split_windows(windows, corpora) == expected

"""Windows with and without a start token: what a model reads, and what the artifact holds."""

import pytest
import torch
from safetensors import safe_open

from pipeline.runtime.artifacts import make_header
from pipeline.text.windows import Windows, load_windows, put_in_front, save_windows, start_behind

IDS = torch.tensor([[5, 6, 7], [8, 9, 0]])
HEADER = make_header("calibration", {"windows": 2})


@pytest.mark.parametrize(
    ("start", "prefix", "expected"),
    [
        (0, [], 0),
        (0, [4, 0], None),  # the prefix ends in it
        (0, [0, 4], 0),  # it begins with it, and ends in something else
        (None, [], None),
        (None, [4, 0], None),
    ],
)
def test_a_prefix_that_ends_in_the_start_token_leaves_windows_alone(start, prefix, expected):
    assert start_behind(start, prefix) == expected
    assert start_behind(start, torch.tensor(prefix, dtype=torch.int64)) == expected
    read = Windows(IDS, HEADER).begin_with(start).behind(prefix)
    assert read.tolist() == ([[0, 5, 6, 7], [0, 8, 9, 0]] if expected == 0 else IDS.tolist())


def test_nothing_in_front_is_the_same_tensor():
    assert put_in_front(IDS, None) is IDS
    assert put_in_front(IDS, 3).dtype == torch.int64


@pytest.mark.parametrize("start", [None, 0, 3])
def test_the_artifact_holds_content_and_its_start_token(start, tmp_path):
    windows = Windows(IDS, HEADER).begin_with(start)
    save_windows(tmp_path / "windows.safetensors", windows)
    found = load_windows(tmp_path / "windows.safetensors")
    assert torch.equal(found.token_ids, IDS)
    assert (found.start_token, found.header) == (start, windows.header)
    # Without one, tensors and fingerprint are those of windows that know of no start token.
    with safe_open(tmp_path / "windows.safetensors", "pt") as file:
        assert set(file.keys()) == {"token_ids"} | ({"start_token"} if start is not None else set())
    assert (windows.header == HEADER) == (start is None)


def test_windows_with_another_start_token_have_another_fingerprint():
    found = {Windows(IDS, HEADER).begin_with(start).header.fingerprint for start in (None, 0, 1)}
    assert len(found) == 3

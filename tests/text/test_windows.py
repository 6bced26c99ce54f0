"""Windows with and without a start token: the tokens that a model reads, and the content of the artifact."""

import pytest
import torch
from safetensors import safe_open

from pipeline.runtime.artifacts import make_header
from pipeline.text.windows import Windows, find_text_start_token, load_windows, prepend_start_token, save_windows

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
def test_texts_have_no_start_token_after_a_prefix_that_ends_in_it(start, prefix, expected):
    assert find_text_start_token(start, prefix) == expected
    assert find_text_start_token(start, torch.tensor(prefix, dtype=torch.int64)) == expected
    inputs = Windows(IDS, HEADER).with_start_token(start).model_inputs(prefix)
    assert inputs.tolist() == ([[0, 5, 6, 7], [0, 8, 9, 0]] if expected == 0 else IDS.tolist())


def test_without_a_start_token_the_same_tensor_is_returned():
    assert prepend_start_token(IDS, None) is IDS
    assert prepend_start_token(IDS, 3).dtype == torch.int64


@pytest.mark.parametrize("start", [None, 0, 3])
def test_the_artifact_holds_content_and_its_start_token(start, tmp_path):
    windows = Windows(IDS, HEADER).with_start_token(start)
    save_windows(tmp_path / "windows.safetensors", windows)
    loaded = load_windows(tmp_path / "windows.safetensors")
    assert torch.equal(loaded.token_ids, IDS)
    assert (loaded.text_start_token_id, loaded.header) == (start, windows.header)
    # Without one, tensors and fingerprint are the same as in versions without start tokens.
    with safe_open(tmp_path / "windows.safetensors", "pt") as file:
        assert set(file.keys()) == {"token_ids"} | ({"start_token"} if start is not None else set())
    assert (windows.header == HEADER) == (start is None)


def test_windows_with_another_start_token_have_another_fingerprint():
    fingerprints = {Windows(IDS, HEADER).with_start_token(start).header.fingerprint for start in (None, 0, 1)}
    assert len(fingerprints) == 3

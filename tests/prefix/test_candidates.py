"""Reading a candidate prefix from its artifact."""

import pytest
import torch

from pipeline.prefix.candidates import load_prefix, resize_rows
from pipeline.runtime.artifacts import ArtifactError, make_header, save_tensors


def test_rows_are_cut_and_repeated_so_that_the_last_stays_last():
    rows = torch.tensor([1, 2, 3])
    assert resize_rows(rows, 2).tolist() == [2, 3]
    assert resize_rows(rows, 5).tolist() == [2, 3, 1, 2, 3]
    assert resize_rows(rows, None).tolist() == [1, 2, 3]
    assert resize_rows(rows[:0], 4).tolist() == []


@pytest.fixture
def artifact(tmp_path):
    """Write an artifact with a found and a trained prefix of three rows."""
    path = tmp_path / "prefix.safetensors"
    tensors = {
        "found.token_ids": torch.tensor([5, 7, 0]),
        "found.embeddings": torch.arange(6.0).view(3, 2),
        "trained.embeddings": -torch.arange(6.0).view(3, 2),
        "trained.initial_token_ids": torch.tensor([5, 7, 0]),
    }
    save_tensors(path, tensors, make_header("prefix_training", {"test": 1}))
    return path


def test_candidates_are_loaded_and_cut(artifact):
    prefix = load_prefix(artifact, "found", 2)
    assert prefix.token_ids.tolist() == prefix.initial_token_ids.tolist() == [7, 0]
    assert prefix.embeddings.tolist() == [[2, 3], [4, 5]]
    trained = load_prefix(artifact, "trained")
    assert (trained.token_ids.tolist(), trained.initial_token_ids.tolist()) == ([], [5, 7, 0])
    assert trained.embeddings.shape == (3, 2)
    nothing = load_prefix(artifact, "none", 4)
    assert (nothing.embeddings.shape, nothing.token_ids.tolist(), nothing.initial_token_ids.tolist()) == (
        (0, 2),
        [],
        [],
    )


def test_missing_candidates_are_refused(artifact):
    with pytest.raises(ArtifactError, match=r"holds no discretised prefix\. Set prefix_training\.enabled: true"):
        load_prefix(artifact, "discretised")

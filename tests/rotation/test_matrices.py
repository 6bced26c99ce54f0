"""Rotations are orthogonal, survive storage, and rotate a continuous prefix."""

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.rotation.matrices import ROTATIONS, compute_rotated_prefix_kv, load_rotation, make_rotation
from pipeline.runtime.artifacts import make_header, save_tensors
from tests.blocks.test_walk import assert_close, walked_logits
from tests.conftest import open_model
from tests.rotation.test_merging import rotate


def test_identity_changes_nothing_and_the_other_modes_keep_lengths():
    x = torch.randn(5, 20, dtype=torch.float64)
    assert torch.equal(make_rotation("identity", 20, torch.Generator()).apply(x), x)
    for mode in ("hadamard", "random"):
        y = make_rotation(mode, 20, torch.Generator().manual_seed(0)).apply(x)
        assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
        assert not torch.allclose(y, x)


@pytest.mark.parametrize("mode", ["hadamard", "block_hadamard", "random", "identity"])
@pytest.mark.parametrize("signs_after", [False, True])
def test_a_stored_rotation_is_loaded_and_undone(mode, signs_after, tmp_path):
    rotation = make_rotation(mode, 12, torch.Generator().manual_seed(0), block_size=4, signs_after=signs_after)
    tensors = rotation.to_tensors("r2") | {"r1.signs": torch.ones(1)}
    save_tensors(tmp_path / ROTATIONS, tensors, make_header("rotation", {}))
    loaded, x = load_rotation(tmp_path, "r2"), torch.randn(3, 12, dtype=torch.float64)
    assert torch.allclose(loaded.apply(x), rotation.apply(x))
    assert torch.allclose(loaded.undo(loaded.apply(x)), x)


def test_signs_after_r2_keep_r5_from_undoing_it():
    """With sizes that are powers of two, R5 contains R2: without signs, R5 collects a channel that R2 has spread."""
    eye, generator = torch.eye(8, dtype=torch.float64), torch.Generator().manual_seed(1)
    r5 = hadamard_transform(torch.eye(32, dtype=torch.float64))
    reached = {}
    for signs_after in (False, True):
        r2 = make_rotation("hadamard", 8, generator, signs_after=signs_after)
        assert torch.allclose(r2.undo(r2.apply(eye)), eye)
        spread = torch.block_diag(*[r2.apply(eye)] * 4) @ r5
        reached[signs_after] = (spread.abs() > 1e-9).sum(1)
    assert (reached[False] == 4).all()  # one channel of each head
    assert (reached[True] > 4).all()


def test_a_continuous_prefix_goes_through_r1(imported, tmp_path, token_ids):
    """Embeddings that belong to no token give the same logits in the rotated model."""
    embeddings = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    checkpoint, runner = open_model(imported["qwen3"])
    expected = walked_logits(checkpoint, runner, token_ids, compute_prefix_kv(checkpoint, embeddings, runner))
    rotated, runner, _ = rotate(imported["qwen3"], tmp_path / "out")
    prefix_kv = compute_rotated_prefix_kv(rotated, embeddings, runner)
    assert_close(walked_logits(rotated, runner, token_ids, prefix_kv), expected)

"""A rotated model that the tests of this room share."""

import pytest

from tests.rotation.test_merging import rotate


@pytest.fixture
def rotated(imported, tmp_path):
    """Return a rotated checkpoint and its runner."""
    return rotate(imported["llama_untied_biases"], tmp_path / "rotation")[:2]

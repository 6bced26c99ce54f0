"""`python -m benchmarks.quality.search`: the quantizers of one block are chosen as in the stage."""

import torch

from benchmarks.quality.search import measure
from pipeline.quantization.quantizer_init import measure_channels
from pipeline.rotation.matrices import compute_rotated_prefix_kv
from pipeline.runtime.artifacts import make_header
from pipeline.runtime.ranks import ALONE
from tests.conftest import init_params, open_model
from tests.rotation.test_merging import rotate


def test_a_block_is_equalized_and_measured(imported, tmp_path):
    rotation, runner, _ = rotate(imported["llama_tied"], tmp_path / "rotation")
    plain, _ = open_model(imported["llama_tied"])
    prefix_kv = compute_rotated_prefix_kv(rotation, plain.embed(torch.tensor([7, 9, 0])), runner)
    hidden = rotation.embed(torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(4)))
    (tmp_path / "work").mkdir()
    init = init_params({"weights.rounding": "rtn"})
    channels = measure_channels(
        rotation,
        hidden,
        prefix_kv,
        params=init,
        runner=runner,
        work_folder=tmp_path / "work",
        header=make_header("quantizer_init", {}),
        ranks=ALONE,
    )
    assert all(channels)
    cost, error = measure(
        rotation, 1, hidden=hidden, prefix_kv=prefix_kv[1], channels=channels[1], init=init, runner=runner
    )
    assert cost > 0
    assert 0.01 < error < 1

"""The benchmarks of sites and of rounding agree with the pipeline."""

import json
import math

import pytest
import torch

from benchmarks.quality.rounding import CALIBRATION, ROWS, measure_rounding
from benchmarks.quality.sites import EVERY, measure_rows
from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.evaluation.perplexity import evaluate_windows
from pipeline.models.checkpoint import REPORT, Checkpoint
from tests.inference.test_prefixed_model import make_quantized

# Weights, to nearest, are then the same whatever else is quantized.
PLAIN = {"equalize": [], "weights.centered": False, "weights.range": "tensor"}
OFF = PLAIN | {f"{group}.bits": 16 for group in ("activations", "keys", "values")}


def test_rows_equal_the_evaluation_with_these_quantizers(imported, tmp_path, token_ids):
    checkpoint, runner = make_quantized(imported, tmp_path / "all", changes=PLAIN)
    rows = measure_rows(checkpoint, {"a": token_ids})
    means = {row: losses["a"].mean().item() for row, losses in rows.items()}
    kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    metrics, _, _ = evaluate_windows(checkpoint, {"a": token_ids}, runner, prefix_kv=kv)
    assert math.exp(means["everything"]) == pytest.approx(metrics["perplexity"]["a"], rel=1e-4)
    assert len({round(mean, 6) for mean in means.values()}) == len(rows) == 2 + 2 * len(EVERY)  # all differ
    weights, runner = make_quantized(imported, tmp_path / "weights", changes=OFF)
    alone, _, _ = evaluate_windows(weights, {"a": token_ids}, runner, prefix_kv=kv)
    assert math.exp(means["weights alone"]) == pytest.approx(alone["perplexity"]["a"], rel=1e-4)
    assert len({losses["a"].mean().item() for losses in measure_rows(weights, {"a": token_ids}).values()}) == 1


def test_errors_of_rounding_are_those_that_the_stage_reports(imported, tmp_path):
    """Tested on block 0, whose inputs are the same in full precision as after quantized blocks."""
    changes = {"weights.rounding": "gptq", "weights.range": "layer", "weights.damping": 0.01}
    checkpoint, _ = make_quantized(imported, tmp_path, changes=changes)
    windows = torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(4))  # as there
    others = torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(5))
    rotated = Checkpoint(tmp_path / "rotation", "rotation")
    errors = measure_rounding(rotated, checkpoint, {CALIBRATION: windows, "other": others}, [0])
    sites = json.loads((checkpoint.folder / REPORT).read_text())["blocks"][0]["sites"]
    reported = [values["relative_error"] for site, values in sites.items() if site.endswith("_proj")]
    assert len(reported) == 7
    assert errors[ROWS[0]][CALIBRATION] == pytest.approx(sum(reported) / 7, rel=1e-3)
    for row in ROWS:
        assert 0 < errors[row][CALIBRATION] < errors[row]["other"] < 1
    damped = [errors["tensor", damping][CALIBRATION] for damping in (0.01, 0.3)]
    assert damped[0] < damped[1]

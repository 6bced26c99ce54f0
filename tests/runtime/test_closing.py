"""The line that closes a stage."""

import re

import pytest

from pipeline.runtime.closing import describe_end
from tests.conftest import ROOT, read_json

METRICS = [
    path
    for path in sorted((ROOT / "metrics").rglob("*.json"))
    if path.relative_to(ROOT / "metrics").parts[0] != "runtime" and read_json(path)  # generation writes {} at rest
]


@pytest.mark.parametrize("path", METRICS, ids=lambda path: path.relative_to(ROOT / "metrics").as_posix())
def test_closing_lines_have_at_most_six_results(path):
    metrics = {"seconds": 1.0, "peak_rss_gib": 1.0} | read_json(path)
    stage = path.relative_to(ROOT / "metrics").with_suffix("").as_posix().replace("/", "@")
    parts = re.split(r", ", describe_end(stage, metrics))
    assert 3 <= len(parts) <= 6
    assert all(re.search(r"\d", part) for part in parts)


def test_results_have_names_and_units():
    metrics = {"perplexity": {"a": 17.271, "b": 34.2469}, "kl": {"a": 0.26591}, "seconds": 206.2, "peak_rss_gib": 0.749}
    assert describe_end("evaluation@export", metrics) == (
        "done in 3:26, 0.75 GiB, perplexity 17.27 on a, perplexity 34.25 on b, KL 0.266 nats on a"
    )


def test_a_gpus_memory_takes_the_place_of_the_hosts():
    metrics = {"seconds": 1.0, "peak_rss_gib": 1.0, "peak_gpu_gib": 2.5}
    assert describe_end("rotation", metrics) == "done in 0:01, GPU 2.50 GiB"


def test_missing_results_are_left_out():
    assert describe_end("unknown", {"seconds": 61.0}) == "done in 1:01"

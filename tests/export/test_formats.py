"""Exports of earlier versions keep loading: one tiny folder of each format version, with the logits that it gave."""

from pathlib import Path

import pytest
import torch

from pipeline.inference.loading import load
from pipeline.inference.manifest import FORMAT_VERSION, ExportError, check_format
from tests.conftest import read_json

FORMATS = Path(__file__).with_name("formats")
VERSIONS = sorted(int(path.stem) for path in FORMATS.glob("*.json"))


def test_the_present_format_is_among_them():
    assert FORMAT_VERSION in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_an_export_of_each_format_gives_its_recorded_logits(version):
    recorded = read_json(FORMATS / f"{version}.json")
    model, _ = load(FORMATS / str(version))
    logits = model(torch.tensor([recorded["token_ids"]])).logits[0, -1]
    expected = torch.tensor(recorded["last_logits"])
    # 5e-6 by rounding of the record. Another CPU sums in another order, which may move a code by one step.
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
    assert logits.argmax() == expected.argmax()


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_format_is_read_or_the_version_that_reads_it_is_named(version):
    if version in VERSIONS:
        check_format("x", version)
        return
    with pytest.raises(ExportError, match=r"Use a version before \d+\.\d+\.\d+, or export the model again"):
        check_format("x", version)

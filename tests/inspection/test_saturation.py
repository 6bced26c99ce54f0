"""Shares beyond the static range and signal-to-noise ratios, against counts by hand."""

import json
import logging
import math

import pytest
import torch

from pipeline.blocks.quantized import fill_block, find_site_quantizers, load_block
from pipeline.inspection.saturation import SaturationProbe, count_beyond, summarise_saturation, write_saturation
from pipeline.models.sites import Site
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec
from pipeline.quantization.block_init import choose_quantizers_
from pipeline.quantization.quantizer_init import resolve_settings
from pipeline.quantization.statistics import record_block
from tests.conftest import init_params, open_model


def quantized(imported):
    checkpoint, runner = open_model(imported["qwen2"])
    hidden = torch.randn(3, 12, 48, generator=torch.Generator().manual_seed(0))
    settings, site_settings = resolve_settings(init_params(), checkpoint, 1)
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), settings)
    statistics = record_block(block, checkpoint.architecture, hidden, None, runner=runner, mse_samples=3)
    choose_quantizers_(
        block, checkpoint.architecture, statistics, prefix_kv=None, site_settings=site_settings, runner=runner
    )
    return checkpoint, runner, block, hidden


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("centered", [True, False])
def test_values_beyond_the_range_are_counted(symmetric, centered):
    quantizer = ActivationQuantizer(QuantizerSpec(3, symmetric, centered=centered), 4)
    buffers = {"scale": torch.tensor(1.0)} | ({} if symmetric else {"zero_point": torch.tensor(2.0)})
    buffers |= {"shift": torch.full((4,), 10.0)} if centered else {}
    quantizer.calibrate_(**buffers)
    low, high = (-4, 3) if symmetric else (-2, 5)  # what the ends stand for
    offset = 10 if centered else 0
    x = torch.tensor([[low - 0.6, low - 0.4, 0.0, high + 0.4], [high + 0.6, high + 9, low - 9, 1.0]]) + offset
    assert count_beyond(quantizer, x) == 4
    assert (quantizer(x) - x).abs().flatten()[[1, 2, 3, 7]].max() <= 0.5


@torch.no_grad()
def test_reports_equal_a_second_forward(imported):
    checkpoint, runner, block, hidden = quantized(imported)
    seen = {site: [] for site in find_site_quantizers(block, checkpoint.architecture)}
    with SaturationProbe(block, checkpoint.architecture) as probe:
        runner.advance_(block, hidden.clone())
    for site, quantizer in find_site_quantizers(block, checkpoint.architecture).items():
        quantizer.register_forward_hook(lambda module, args, out, site=site: seen[site].append((args[0], out)))
    runner.advance_(block, hidden.clone())
    report = probe.report()
    assert report.keys() == seen.keys()
    for site, pairs in seen.items():
        signal = sum(x.double().square().sum() for x, _ in pairs)
        noise = sum((out - x).double().square().sum() for x, out in pairs)
        assert report[site]["sqnr"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
        assert 0 <= report[site]["share"] < 0.2
    assert any(values["share"] > 0 for values in report.values())


@torch.no_grad()
def test_other_text_shows(imported):
    """A direction that calibration never saw lies beyond every range."""
    checkpoint, runner, block, hidden = quantized(imported)
    reports = []
    other = hidden.clone()
    other[:, :, 5] += 100
    for text in (hidden, other):
        with SaturationProbe(block, checkpoint.architecture) as probe:
            runner.advance_(block, text.clone())
        reports.append(probe.report())
    assert reports[0]["attention_input"]["share"] < 0.01
    assert reports[1]["attention_input"]["share"] > 0.02
    assert reports[1]["attention_input"]["sqnr"] < reports[0]["attention_input"]["sqnr"] - 5


def test_a_block_without_quantizers_reports_nothing(imported):
    checkpoint, runner = open_model(imported["llama_tied"])
    block = load_block(checkpoint, 0)
    with SaturationProbe(block, checkpoint.architecture) as probe:
        runner.advance_(block, torch.randn(1, 4, 48))
    assert probe.report() == {}
    assert summarise_saturation({"a": {0: {}}}) == {}


def test_the_worst_sites_are_named_and_the_table_is_of_the_worst_text(tmp_path, caplog):
    texts = {
        "wikipedia": {0: {"key": {"share": 0.01, "sqnr": 20.0}, "value": {"share": 0.0, "sqnr": 30.0}}},
        "news": {0: {"key": {"share": 0.2, "sqnr": 25.0}, "value": {"share": 0.001, "sqnr": 7.5}}},
    }
    with caplog.at_level(logging.WARNING):
        metrics = summarise_saturation(texts)
    assert metrics == {
        "largest_saturation": {"wikipedia": 0.01, "news": 0.2},
        "lowest_sqnr": {"wikipedia": 20.0, "news": 7.5},
    }
    assert "news: worst fitting static ranges: block 0 key (20.00% beyond), block 0 value" in caplog.text
    assert "lowest signal to noise: block 0 value (7.5 dB)" in caplog.text
    write_saturation(tmp_path / "x.json", texts)
    rows = json.loads((tmp_path / "x.json").read_text())
    expected = {"block": 0, "key_share": 0.2, "key_sqnr": 20.0, "value_share": 0.001, "value_sqnr": 7.5}
    assert [{name: value for name, value in row.items() if value is not None} for row in rows] == [expected]
    assert list(rows[0]) == ["block", *(f"{site}_{kind}" for site in Site for kind in ("share", "sqnr"))]

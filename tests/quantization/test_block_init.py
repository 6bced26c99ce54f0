"""Every mode calibrates every site; the block objective lowers the error of the block."""

from dataclasses import replace

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import fill_block, find_site_quantizers, load_block
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import INPUT_SITES, Site
from pipeline.quantization import block_init
from pipeline.quantization.block_init import choose_quantizers_
from pipeline.quantization.quantizer_init import find_percentile_sites, resolve_settings
from pipeline.quantization.statistics import record_block
from tests.conftest import WINDOW, init_params, open_model
from tests.rotation.test_merging import rotate

GROUPS = ("weights", "activations", "keys", "values")
GENERATOR = torch.Generator().manual_seed(9)


def everywhere(**values):
    """Return the same settings for every group that has them."""
    absent = {"weights": {"mode", "percentile", "clipping"}}
    return {f"{g}.{key}": value for g in GROUPS for key, value in values.items() if key not in absent.get(g, ())}


def quantize_block(folder, changes, tmp_path, rotated=True, index=1):
    """Choose all quantizers of one block and return it, its report, its relative error and its architecture."""
    checkpoint, runner = rotate(folder, tmp_path / "out")[:2] if rotated else open_model(folder)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(4, 16, 48, generator=generator) + torch.randn(48, generator=generator)
    hidden[:, :, 7] *= 6
    prefix_kv = compute_prefix_kv(checkpoint, torch.randn(2, 48, generator=generator), runner)[index]
    settings, site_settings = resolve_settings(init_params(changes), checkpoint, index)
    block = fill_block(checkpoint, index, checkpoint.load_block_tensors(index), settings)
    statistics = record_block(
        block,
        checkpoint.architecture,
        hidden,
        prefix_kv,
        runner=runner,
        mse_samples=4,
        percentile_sites=find_percentile_sites(site_settings),
    )
    report = choose_quantizers_(
        block, checkpoint.architecture, statistics, prefix_kv=prefix_kv, site_settings=site_settings, runner=runner
    )
    expected = runner.run(load_block(checkpoint, index), hidden, prefix_kv)
    with torch.no_grad():
        error = (runner.run(block, hidden, prefix_kv) - expected).square().sum()
    return block, report, (error / (expected - hidden).square().sum()).item(), checkpoint.architecture


MODES = {
    "default": {},
    "asymmetric": everywhere(symmetric=False),
    "asymmetric, one factor": everywhere(symmetric=False, clipping=False),
    "dynamic": everywhere(mode="dynamic"),
    "dynamic, as measured": everywhere(mode="dynamic", clipping=False),
    "dynamic asymmetric groups": everywhere(mode="dynamic", symmetric=False, group_size=4),
    "groups": everywhere(group_size=4),
    "not centered": everywhere(centered=False),
    "tensor": everywhere(range="tensor"),
    "percentile": {f"{group}.range": "percentile" for group in GROUPS[1:]} | everywhere(percentile=99.0),
    "max": everywhere(range="max"),
    "rtn": {"weights.rounding": "rtn"},
    "values by the attention output": {"values.range": "layer"},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_calibrates_every_site(mode, imported, tmp_path):
    block, report, error, architecture = quantize_block(imported["llama_untied_biases"], MODES[mode], tmp_path)
    assert len(report) == 13
    for site, quantizer in find_site_quantizers(block, architecture).items():
        assert quantizer.calibrated, site
        for name, buffer in quantizer.named_buffers():
            assert torch.isfinite(buffer).all(), (site, name)
        assert 0 < report[site]["relative_error"] < 0.2, site
    assert 0 < error < 0.4  # measured: 0.03 (groups) to 0.2 (max)
    as_measured = mode in ("max", "percentile", "dynamic, as measured")
    for site, values in report.items():
        if site.endswith("_proj"):
            assert (values["clip_factor"] == 1) == (mode == "max")
            assert ("damping" in values) == (mode != "rtn")
        elif "groups" not in mode:  # four values of a token may be best as they are
            assert (values["clip_factor"] == 1) == as_measured, site


@pytest.mark.parametrize("kind", [{}, {"symmetric": False}, {"mode": "dynamic"}])
def test_the_block_objective_lowers_the_error_of_the_block(kind, imported, tmp_path):
    """Weights are not quantized, so that the search and this comparison measure the same error."""
    off = everywhere(bits=4, **kind) | {"weights.bits": 16}
    errors = {}
    for method in ("max", "tensor", "block"):
        changes = off | everywhere(range=method)
        errors[method] = quantize_block(imported["llama_tied"], changes, tmp_path / method)[2]
    assert errors["block"] < errors["tensor"] < errors["max"]


def test_the_block_objective_of_weights_lowers_the_error_of_the_block(imported, tmp_path):
    off = {f"{group}.bits": 16 for group in GROUPS[1:]} | {"weights.rounding": "rtn", "weights.bits": 3}
    errors = {}
    for method in ("max", "block"):
        _, report, errors[method], _ = quantize_block(
            imported["llama_tied"], off | {"weights.range": method}, tmp_path / method
        )
    assert len(report) == 7
    assert errors["block"] < errors["max"]


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma2", "gemma3_text", "olmo2", "ernie4_5_moe"])
def test_keys_quantized_before_rope_are_judged_after_it(family, imported, tmp_path):
    """The factors minimise the error of the probabilities, RoPE and prefix included, and so the error of the block."""
    off = {f"{group}.bits": 16 for group in ("weights", "activations", "values")}
    changes = off | {"keys.before_rope": True, "keys.bits": 3, "keys.centered": False}
    errors = {}
    for method in ("max", "layer", "block"):
        block, report, errors[method], _ = quantize_block(
            imported[family], changes | {"keys.range": method}, tmp_path, rotated=False
        )
        assert report.keys() == {"key"}
        assert block.self_attn.key_quantizer.before_rope
    assert errors["layer"] < errors["max"]
    assert errors["block"] <= errors["layer"] * 1.15  # `block` has one factor for all heads, `layer` one for each


@pytest.mark.parametrize("family", ["llama_untied_biases", "ernie4_5_moe"])
@torch.no_grad()
def test_the_error_of_keys_before_rope_is_that_of_the_probabilities(family, imported, monkeypatch):
    """Compare with transformers' own attention, in which RoPE turns other pairs of channels in each family."""
    name = Checkpoint(imported[family], "model").config.model_type
    eager = replace(ARCHITECTURES[name], kernel="eager")  # sdpa returns no probabilities
    monkeypatch.setitem(ARCHITECTURES, name, eager)
    checkpoint, runner = open_model(imported[family])
    hidden = torch.randn(2, 40, 48, generator=torch.Generator().manual_seed(4))
    off = {f"{group}.bits": 16 for group in ("weights", "activations", "values")}
    changes = {"keys.range": "layer", "keys.before_rope": True, "keys.centered": False, "keys.bits": 3}
    settings, site_settings = resolve_settings(init_params(off | changes), checkpoint, 1)
    block = fill_block(checkpoint, 1, checkpoint.load_block_tensors(1), settings)
    statistics = record_block(block, checkpoint.architecture, hidden, None, runner=runner, mse_samples=2)
    probabilities = []
    block.self_attn.register_forward_hook(lambda module, args, output: probabilities.append(output[1]))
    runner.run(block, hidden)
    report = choose_quantizers_(
        block, checkpoint.architecture, statistics, prefix_kv=None, site_settings=site_settings, runner=runner
    )
    runner.run(block, hidden)
    before, after = probabilities
    expected = ((after - before).square().sum() / before.square().sum()).item()
    assert report["key"]["relative_error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("index", "slides"), [(0, True), (1, False)])
@torch.no_grad()
def test_the_error_of_keys_is_the_error_of_the_attention_probabilities(imported, index, slides):
    """Compare with Gemma 2's own attention, sliding or not, over a text that is twice as long as the sliding window."""
    checkpoint, runner = open_model(imported["gemma2"])
    hidden = torch.randn(2, 2 * WINDOW, 48, generator=torch.Generator().manual_seed(4))
    prefix_kv = compute_prefix_kv(checkpoint, torch.randn(2, 48, generator=GENERATOR), runner)[index]
    off = {f"{group}.bits": 16 for group in ("weights", "activations", "values")}
    settings, site_settings = resolve_settings(init_params(off | {"keys.range": "layer"}), checkpoint, index)
    block = fill_block(checkpoint, index, checkpoint.load_block_tensors(index), settings)
    statistics = record_block(block, checkpoint.architecture, hidden, prefix_kv, runner=runner, mse_samples=2)
    probabilities = []
    block.self_attn.register_forward_hook(lambda module, args, output: probabilities.append(output[1]))
    runner.run(block, hidden, prefix_kv)
    report = choose_quantizers_(
        block, checkpoint.architecture, statistics, prefix_kv=prefix_kv, site_settings=site_settings, runner=runner
    )
    runner.run(block, hidden, prefix_kv)
    before, after = probabilities
    assert (before[:, :, -1, 2 : 2 + WINDOW].max() == 0) == slides
    assert (before[:, :, -1, :2].max() == 0) == slides  # the prefix has left the window
    expected = ((after - before).square().sum() / before.square().sum()).item()
    assert report["key"]["relative_error"] == pytest.approx(expected, rel=1e-3)


def test_centering_lowers_the_error_of_inputs_with_a_mean(imported, tmp_path):
    errors = [
        quantize_block(imported["llama_tied"], everywhere(centered=centered), tmp_path / str(centered))[2]
        for centered in (True, False)
    ]
    assert errors[0] < 0.9 * errors[1]


@torch.no_grad()
def test_a_centered_weight_makes_no_error_at_the_mean_input(imported, tmp_path):
    """The bias corrects the effect of rounding on the mean: on average over calibration tokens outputs are exact."""
    off = {f"{group}.bits": 16 for group in GROUPS[1:]} | {"weights.bits": 3}
    means = []
    for centered in (True, False):
        folder = tmp_path / str(centered)
        checkpoint, runner = rotate(imported["llama_tied"], folder)[:2]
        hidden = torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(4)) + 1
        settings, site_settings = resolve_settings(init_params(off | {"weights.centered": centered}), checkpoint, 0)
        block = fill_block(checkpoint, 0, checkpoint.load_block_tensors(0), settings)
        statistics = record_block(block, checkpoint.architecture, hidden, None, runner=runner, mse_samples=4)
        choose_quantizers_(
            block, checkpoint.architecture, statistics, prefix_kv=None, site_settings=site_settings, runner=runner
        )
        outputs = []
        for either in (block, load_block(checkpoint, 0)):
            outputs.append(either.mlp.up_proj(statistics.sites["mlp_input"].channels.mean.unsqueeze(0)))
        means.append((outputs[0] - outputs[1]).abs().max().item())
    assert means[0] < 1e-5 * outputs[1].abs().max()
    assert means[1] > 100 * means[0]


@pytest.mark.parametrize("first", [True, False])
def test_readers_of_a_site_may_be_centered_differently(first, imported, tmp_path):
    """Each reader is rounded with its own kind of Hessian, whichever kind is needed first."""
    kinds = {"q_proj": first, "k_proj": not first, "v_proj": first}
    overrides = [{"sites": [site], "centered": centered} for site, centered in kinds.items()]
    mixed = quantize_block(imported["llama_tied"], {"overrides": overrides}, tmp_path / "mixed")[0]
    for centered in (True, False):
        changes = {"weights.centered": centered}
        alike = quantize_block(imported["llama_tied"], changes, tmp_path / str(centered))[0]
        for site, kind in kinds.items():
            same = torch.equal(getattr(mixed.self_attn, site).weight, getattr(alike.self_attn, site).weight)
            assert same == (kind == centered), site


@pytest.mark.parametrize(("ranges", "smooth"), [("tensor", set(Site)), ("layer", set(INPUT_SITES)), ("block", set())])
def test_fewer_steps_are_tried_only_where_an_error_sums_over_many_values(
    ranges, smooth, imported, tmp_path, monkeypatch
):
    """These are errors of the values themselves and of the outputs of linears."""
    search, asked = block_init.search_factors, []

    def watch(objective, two_sided=False, smooth=None):
        asked.append(smooth)
        return search(objective, two_sided, bool(smooth))

    monkeypatch.setattr(block_init, "search_factors", watch)
    changes = {f"{group}.range": ranges for group in GROUPS[1:]}
    for many, expected in ((2**16, set()), (1, smooth)):
        monkeypatch.setattr(block_init, "_MANY", many)
        asked.clear()
        report = quantize_block(imported["llama_tied"], changes, tmp_path / str(many))[1]
        sites = [site for site in report if site in set(Site)]
        assert len(sites) == 6
        assert {site for site, is_smooth in zip(sites, asked, strict=False) if is_smooth} == expected


def test_the_error_of_a_large_weight_is_measured_on_evenly_spread_rows(imported, tmp_path, monkeypatch):
    """Integers and scales cover all rows, and only the reported error covers some."""
    measure, blocks, judged = block_init._output_energy, [], []
    for rows in (1024, 12):
        monkeypatch.setattr(block_init, "_ROWS", rows)
        parts = []
        monkeypatch.setattr(
            block_init, "_output_energy", lambda x, *rest, parts=parts: parts.append(x) or measure(x, *rest)
        )
        blocks.append(quantize_block(imported["llama_tied"], {}, tmp_path / str(rows))[0].state_dict())
        judged.append(parts)
    assert all(torch.equal(blocks[1][name], tensor) for name, tensor in blocks[0].items())
    assert len(judged[0]) == len(judged[1]) == 2 * 7
    for every, part in zip(*judged, strict=True):
        assert torch.equal(part, every[:: max(1, len(every) // 12)])
    assert any(len(part) < len(every) for every, part in zip(*judged, strict=True))


@pytest.mark.parametrize("columns", [5, 7, 40])
def test_the_energy_of_an_output_can_be_summed_over_slices_of_the_hessian(columns, monkeypatch):
    monkeypatch.setattr(block_init, "_COLUMNS", columns)
    inputs, weight = torch.randn(60, 40, generator=GENERATOR), torch.randn(9, 40, generator=GENERATOR)
    expected = (inputs.double() @ weight.double().T).square().sum().item()
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        assert block_init._output_energy(weight, inputs.T @ inputs, dtype) == pytest.approx(expected, rel=close)

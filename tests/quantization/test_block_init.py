"""Every mode ends calibrated and better than its whole range; the block objective lowers the block's error."""

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import fill_block, find_site_quantizers, load_block
from pipeline.quantization import block_init
from pipeline.quantization.block_init import choose_quantizers_
from pipeline.quantization.quantizer_init import plan_block
from pipeline.quantization.statistics import record_block
from tests.conftest import WINDOW, init_params, open_model
from tests.rotation.test_merging import rotate

GROUPS = ("weights", "activations", "keys", "values")
INPUTS = ("attention_input", "attention_output", "mlp_input", "mlp_hidden")
SITES = (*INPUTS, "key", "value")
GENERATOR = torch.Generator().manual_seed(9)


def everywhere(**values):
    """The same keys in every group that has them."""
    own = {"weights": {"mode", "percentile", "clipping"}}
    return {f"{g}.{key}": value for g in GROUPS for key, value in values.items() if key not in own.get(g, ())}


def quantize_block(folder, changes, tmp_path, rotated=True, index=1):
    """Choose all quantizers of one block; the block, its report, and its squared error on the sampled windows."""
    checkpoint, runner = rotate(folder, tmp_path / "out")[:2] if rotated else open_model(folder)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(4, 16, 48, generator=generator) + torch.randn(48, generator=generator)
    hidden[:, :, 7] *= 6
    prefix_kv = compute_prefix_kv(checkpoint, torch.randn(2, 48, generator=generator), runner)[index]
    settings, plan = plan_block(init_params(changes), checkpoint, index)
    block = fill_block(checkpoint, index, checkpoint.load_block_tensors(index), settings)
    percentiles = frozenset(site for site, values in plan.items() if values["range"] == "percentile")
    statistics = record_block(block, checkpoint.architecture, hidden, prefix_kv, runner, 4, percentiles)
    report = choose_quantizers_(block, checkpoint.architecture, statistics, prefix_kv, plan, runner)
    exact = runner.run(load_block(checkpoint, index), hidden, prefix_kv)
    with torch.no_grad():
        error = (runner.run(block, hidden, prefix_kv) - exact).square().sum()
    return block, report, (error / (exact - hidden).square().sum()).item(), checkpoint.architecture


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
def test_the_block_objective_lowers_the_blocks_error(kind, imported, tmp_path):
    """Nothing but activations, keys and values quantized, so that what is searched is what is compared."""
    off = everywhere(bits=4, **kind) | {"weights.bits": 16}
    errors = {}
    for method in ("max", "tensor", "block"):
        changes = off | everywhere(range=method)
        errors[method] = quantize_block(imported["llama_tied"], changes, tmp_path / method)[2]
    assert errors["block"] < errors["tensor"] < errors["max"]


def test_the_block_objective_of_weights_lowers_the_blocks_error(imported, tmp_path):
    off = {f"{group}.bits": 16 for group in GROUPS[1:]} | {"weights.rounding": "rtn", "weights.bits": 3}
    errors = {}
    for method in ("max", "block"):
        _, report, errors[method], _ = quantize_block(
            imported["llama_tied"], off | {"weights.range": method}, tmp_path / method
        )
    assert len(report) == 7
    assert errors["block"] < errors["max"]


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_keys_before_rope_are_judged_behind_it(family, imported, tmp_path):
    """Their clip factors minimise the error of the probabilities, RoPE and prefix included: the block shows it."""
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
    assert errors["block"] <= errors["layer"] * 1.15  # one factor for all heads there, one for each here


@pytest.mark.parametrize(("index", "slides"), [(0, True), (1, False)])
@torch.no_grad()
def test_keys_are_judged_by_what_the_block_sees(imported, index, slides):
    """The error that is reported is that of Gemma 2's own probabilities, sliding or not, over a text of two windows."""
    checkpoint, runner = open_model(imported["gemma2"])
    hidden = torch.randn(2, 2 * WINDOW, 48, generator=torch.Generator().manual_seed(4))
    prefix_kv = compute_prefix_kv(checkpoint, torch.randn(2, 48, generator=GENERATOR), runner)[index]
    off = {f"{group}.bits": 16 for group in ("weights", "activations", "values")}
    settings, plan = plan_block(init_params(off | {"keys.range": "layer"}), checkpoint, index)
    block = fill_block(checkpoint, index, checkpoint.load_block_tensors(index), settings)
    statistics = record_block(block, checkpoint.architecture, hidden, prefix_kv, runner, 2)
    probabilities = []
    block.self_attn.register_forward_hook(lambda module, args, output: probabilities.append(output[1]))
    runner.run(block, hidden, prefix_kv)
    report = choose_quantizers_(block, checkpoint.architecture, statistics, prefix_kv, plan, runner)
    runner.run(block, hidden, prefix_kv)
    exact, found = probabilities
    assert (exact[:, :, -1, 2 : 2 + WINDOW].max() == 0) == slides
    assert (exact[:, :, -1, :2].max() == 0) == slides  # the prefix has left the window
    expected = ((found - exact).square().sum() / exact.square().sum()).item()
    assert report["key"]["relative_error"] == pytest.approx(expected, rel=1e-3)


def test_centering_lowers_the_error_of_inputs_with_a_mean(imported, tmp_path):
    errors = [
        quantize_block(imported["llama_tied"], everywhere(centered=centered), tmp_path / str(centered))[2]
        for centered in (True, False)
    ]
    assert errors[0] < 0.9 * errors[1]


@torch.no_grad()
def test_a_centered_weight_makes_no_error_at_the_mean_input(imported, tmp_path):
    """The bias makes up for what rounding does to the mean: outputs are exact on average over calibration tokens."""
    off = {f"{group}.bits": 16 for group in GROUPS[1:]} | {"weights.bits": 3}
    means = []
    for centered in (True, False):
        folder = tmp_path / str(centered)
        checkpoint, runner = rotate(imported["llama_tied"], folder)[:2]
        hidden = torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(4)) + 1
        settings, plan = plan_block(init_params(off | {"weights.centered": centered}), checkpoint, 0)
        block = fill_block(checkpoint, 0, checkpoint.load_block_tensors(0), settings)
        statistics = record_block(block, checkpoint.architecture, hidden, None, runner, 4)
        choose_quantizers_(block, checkpoint.architecture, statistics, None, plan, runner)
        outputs = []
        for own in (block, load_block(checkpoint, 0)):
            seen = []
            own.mlp.up_proj.register_forward_hook(lambda module, args, out, seen=seen: seen.append((args[0], out)))
            own.mlp(own.post_attention_layernorm(hidden))
            outputs.append(own.mlp.up_proj(statistics.sites["mlp_input"].channels.mean.unsqueeze(0)))
        means.append((outputs[0] - outputs[1]).abs().max().item())
    assert means[0] < 1e-5 * outputs[1].abs().max()
    assert means[1] > 100 * means[0]


@pytest.mark.parametrize("first", [True, False])
def test_readers_of_a_site_may_be_centered_differently(first, imported, tmp_path):
    """Each is rounded with the Hessian of its own kind, whichever was there first."""
    own = {"q_proj": first, "k_proj": not first, "v_proj": first}
    overrides = [{"sites": [site], "centered": centered} for site, centered in own.items()]
    mixed = quantize_block(imported["llama_tied"], {"overrides": overrides}, tmp_path / "mixed")[0]
    for centered in (True, False):
        changes = {"weights.centered": centered}
        alike = quantize_block(imported["llama_tied"], changes, tmp_path / str(centered))[0]
        for site, kind in own.items():
            same = torch.equal(getattr(mixed.self_attn, site).weight, getattr(alike.self_attn, site).weight)
            assert same == (kind == centered), site


@pytest.mark.parametrize(("ranges", "smooth"), [("tensor", set(SITES)), ("layer", set(INPUTS)), ("block", set())])
def test_fewer_steps_are_tried_only_where_an_error_sums_over_many_values(
    ranges, smooth, imported, tmp_path, monkeypatch
):
    """The activations' scales, of their own errors or of the outputs', in the order in which sites are calibrated."""
    search, asked = block_init.search_factors, []

    def watch(error_of, reference, two_sided=False, smooth=None):
        asked.append(smooth)
        return search(error_of, reference, two_sided, bool(smooth))

    monkeypatch.setattr(block_init, "search_factors", watch)
    changes = {f"{group}.range": ranges for group in GROUPS[1:]}
    for many, expected in ((2**16, set()), (1, smooth)):
        monkeypatch.setattr(block_init, "_MANY", many)
        asked.clear()
        report = quantize_block(imported["llama_tied"], changes, tmp_path / str(many))[1]
        sites = [site for site in report if site in SITES]
        assert len(sites) == 6
        assert {site for site, own in zip(sites, asked, strict=False) if own} == expected


def test_the_error_of_a_large_weight_is_reported_on_evenly_spread_rows(imported, tmp_path, monkeypatch):
    """Integers and scales are of all rows, the error is that of every so many."""
    measure, blocks, judged = block_init._output_energy, [], []
    for rows in (1024, 12):
        monkeypatch.setattr(block_init, "_ROWS", rows)
        own = []
        monkeypatch.setattr(block_init, "_output_energy", lambda x, *rest, own=own: own.append(x) or measure(x, *rest))
        blocks.append(quantize_block(imported["llama_tied"], {}, tmp_path / str(rows))[0].state_dict())
        judged.append(own)
    assert all(torch.equal(blocks[1][name], tensor) for name, tensor in blocks[0].items())
    assert len(judged[0]) == len(judged[1]) == 2 * 7
    for every, part in zip(*judged, strict=True):
        assert torch.equal(part, every[:: max(1, len(every) // 12)])
    assert any(len(part) < len(every) for every, part in zip(*judged, strict=True))


@pytest.mark.parametrize("columns", [5, 7, 40])
def test_the_energy_of_an_output_is_the_same_from_slices_of_the_hessian(columns, monkeypatch):
    monkeypatch.setattr(block_init, "_COLUMNS", columns)
    inputs, weight = torch.randn(60, 40, generator=GENERATOR), torch.randn(9, 40, generator=GENERATOR)
    expected = (inputs.double() @ weight.double().T).square().sum().item()
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        assert block_init._output_energy(weight, inputs.T @ inputs, dtype) == pytest.approx(expected, rel=close)

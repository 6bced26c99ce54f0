"""Measuring block by block, backwards, gives the derivatives of one graph through the whole model."""

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import block_settings, load_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.lm_head import LmHead
from pipeline.quantization import equalization
from pipeline.quantization.equalization import EQUALIZED_SITES, Equalizer
from pipeline.quantization.sensitivity import differentiate_predictions, draw_labels, measure_sensitivity
from pipeline.rotation.matrices import load_rotation
from tests.conftest import FAMILIES
from tests.rotation.test_merging import rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_walk_gives_the_derivatives_of_the_whole_model(family, imported, tmp_path, token_ids, monkeypatch):
    monkeypatch.setattr(equalization, "_FEW", 0)  # experts get 20 tokens here
    rotated, runner, _ = rotate(imported[family], tmp_path / "out", r1="online")
    embeddings = torch.randn(2, rotated.config.hidden_size, generator=torch.Generator().manual_seed(1))
    prefix_kv = compute_prefix_kv(rotated, embeddings, runner)
    token_ids = token_ids[:2]
    measured = measure_sensitivity(
        rotated, rotated.embed(token_ids), prefix_kv, sites=EQUALIZED_SITES, runner=runner, numbers=[4, 7]
    )
    hidden = rotated.embed(token_ids).requires_grad_()
    norm, lm_head = rotated.load_final_norm().requires_grad_(False), rotated.load_lm_head()
    recordings, equalizers = [], []
    for index in range(rotated.block_count):
        block = load_block(rotated, index)
        equalizers.append(
            Equalizer(block, rotated.architecture, block_settings(rotated, index), load_rotation(rotated.folder, "r2"))
        )
        with equalizers[-1]._recording() as recorded:
            hidden = runner.run(block, hidden, prefix_kv[index])
        recordings.append(recorded)
    logits = norm(hidden) @ lm_head.weight.T
    log_p = (logits if lm_head.cap is None else lm_head.cap * torch.tanh(logits / lm_head.cap)).log_softmax(-1)
    total = 0.0
    for number, window_log_p in zip((4, 7), log_p, strict=True):
        labels = draw_labels(window_log_p.detach().exp(), torch.Generator().manual_seed(number))
        total = total + window_log_p.gather(1, labels.unsqueeze(1)).sum()
    for equalizer, recorded, channels in zip(equalizers, recordings, measured, strict=True):
        assert channels.keys() == recorded.keys()
        slopes = torch.autograd.grad(total, list(recorded.values()), retain_graph=True)
        for (site, x), slope in zip(recorded.items(), slopes, strict=True):
            x, slope = (equalizer._to_channels(site, y.detach()).double() for y in (x, slope))
            expected = torch.stack((x.mean(0), x.square().mean(0), slope.square().mean(0)))
            assert torch.allclose(channels[site], expected, rtol=1e-3, atol=1e-6 * expected.abs().max()), site


def test_the_number_of_a_window_decides_its_labels(imported, tmp_path, token_ids):
    """Neither the rank that has a window nor the batch size matters."""
    rotated, runner, _ = rotate(imported["llama_tied"], tmp_path / "out", r1="online")
    token_ids = token_ids[:2]

    def measure(ids, numbers, runner=runner):
        return measure_sensitivity(
            rotated, rotated.embed(ids), None, sites=EQUALIZED_SITES, runner=runner, numbers=numbers
        )

    both = measure(token_ids, [0, 1])
    alone = [measure(token_ids[[n]], [n], BlockRunner(rotated, CPU, 1)) for n in (0, 1)]
    for whole, first, second in zip(both, *alone, strict=True):
        for site, channels in whole.items():
            assert torch.allclose(channels, (first[site] + second[site]) / 2, rtol=1e-4, atol=1e-9), site
    other = measure(token_ids, [2, 3])
    assert torch.equal(both[0]["mlp_input"][:2], other[0]["mlp_input"][:2])
    assert not torch.equal(both[0]["mlp_input"][2], other[0]["mlp_input"][2])


def test_labels_are_drawn_with_their_probabilities():
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(20000, -1)
    counts = torch.bincount(draw_labels(p, torch.Generator().manual_seed(0)), minlength=4) / 20000
    assert torch.allclose(counts, p[0], atol=0.015)  # four standard errors
    assert counts[3] == 0


def test_derivatives_pass_through_the_logit_cap(imported, tmp_path):
    rotated, _, _ = rotate(imported["gemma2"], tmp_path / "out", r1="online")
    hidden = torch.randn(1, 5, rotated.config.hidden_size, generator=torch.Generator().manual_seed(0))
    gradient = differentiate_predictions(rotated, hidden, [3], CPU)
    head, x = rotated.load_lm_head(), hidden.clone().requires_grad_()
    assert head.cap is not None
    normed = rotated.load_final_norm()(x)
    logits = torch.tanh(normed @ head.weight.T / head.cap) * head.cap
    labels = draw_labels(logits.detach()[0].softmax(-1), torch.Generator().manual_seed(3))
    logits.log_softmax(-1)[0].gather(1, labels.unsqueeze(1)).sum().backward()
    assert torch.allclose(gradient, x.grad, rtol=1e-3, atol=1e-6)
    plain = LmHead(head.weight).logits(rotated.load_final_norm()(hidden))
    assert not torch.allclose(plain, logits, rtol=1e-2)

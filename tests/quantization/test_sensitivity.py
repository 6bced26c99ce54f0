"""What is measured block by block, backwards, is what one graph through the whole model gives."""

import pytest
import torch

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import block_settings, load_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.lm_head import LmHead
from pipeline.quantization.equalization import PLACES, Equalizer
from pipeline.quantization.sensitivity import differentiate_predictions, draw_labels, measure_sensitivity
from pipeline.rotation.matrices import load_rotation
from tests.conftest import FAMILIES
from tests.rotation.test_merging import rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_backwards_is_the_derivative_through_the_whole_model(family, imported, tmp_path, token_ids):
    rotated, runner, _ = rotate(imported[family], tmp_path / "out", r1="online")
    embeddings = torch.randn(2, rotated.config.hidden_size, generator=torch.Generator().manual_seed(1))
    prefix_kv = compute_prefix_kv(rotated, embeddings, runner)
    token_ids = token_ids[:2]
    found = measure_sensitivity(rotated, rotated.embed(token_ids), prefix_kv, PLACES, runner, [4, 7])
    hidden = rotated.embed(token_ids).requires_grad_()
    norm, lm_head = rotated.load_final_norm().requires_grad_(False), rotated.load_lm_head()
    seen, equalizers = [], []
    for index in range(rotated.block_count):
        block = load_block(rotated, index)
        equalizers.append(
            Equalizer(block, rotated.architecture, block_settings(rotated, index), load_rotation(rotated.folder, "r2"))
        )
        with equalizers[-1]._watching() as own:
            hidden = runner.run(block, hidden, prefix_kv[index])
        seen.append(own)
    logits = norm(hidden) @ lm_head.weight.T
    log_p = (logits if lm_head.cap is None else lm_head.cap * torch.tanh(logits / lm_head.cap)).log_softmax(-1)
    total = 0.0
    for number, own in zip((4, 7), log_p, strict=True):
        labels = draw_labels(own.detach().exp(), torch.Generator().manual_seed(number))
        total = total + own.gather(1, labels.unsqueeze(1)).sum()
    for equalizer, own, channels in zip(equalizers, seen, found, strict=True):
        assert channels.keys() == own.keys()
        slopes = torch.autograd.grad(total, list(own.values()), retain_graph=True)
        for (name, x), slope in zip(own.items(), slopes, strict=True):
            x, slope = (equalizer._to_channels(name, y.detach()).double() for y in (x, slope))
            expected = torch.stack((x.mean(0), x.square().mean(0), slope.square().mean(0)))
            assert torch.allclose(channels[name], expected, rtol=1e-3, atol=1e-6 * expected.abs().max()), name


def test_windows_share_out_over_ranks_by_their_numbers(imported, tmp_path, token_ids):
    """A window's labels are given by its number, whoever has it and whatever the batch."""
    rotated, runner, _ = rotate(imported["llama_tied"], tmp_path / "out", r1="online")
    token_ids = token_ids[:2]
    both = measure_sensitivity(rotated, rotated.embed(token_ids), None, PLACES, runner, [0, 1])
    alone = [
        measure_sensitivity(rotated, rotated.embed(token_ids[[n]]), None, PLACES, BlockRunner(rotated, CPU, 1), [n])
        for n in (0, 1)
    ]
    for whole, first, second in zip(both, *alone, strict=True):
        for name, channels in whole.items():
            assert torch.allclose(channels, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-9), name
    other = measure_sensitivity(rotated, rotated.embed(token_ids), None, PLACES, runner, [2, 3])
    assert torch.equal(both[0]["mlp_input"][:2], other[0]["mlp_input"][:2])
    assert not torch.equal(both[0]["mlp_input"][2], other[0]["mlp_input"][2])


def test_labels_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(20000, -1)
    counts = torch.bincount(draw_labels(p, torch.Generator().manual_seed(0)), minlength=4) / 20000
    assert torch.allclose(counts, p[0], atol=0.015)  # four standard errors
    assert counts[3] == 0


def test_the_derivative_of_a_capped_head_knows_the_cap(imported, tmp_path):
    rotated, _, _ = rotate(imported["gemma2"], tmp_path / "out", r1="online")
    hidden = torch.randn(1, 5, rotated.config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = differentiate_predictions(rotated, hidden, [3], CPU)
    head, x = rotated.load_lm_head(), hidden.clone().requires_grad_()
    assert head.cap is not None
    normed = rotated.load_final_norm()(x)
    logits = torch.tanh(normed @ head.weight.T / head.cap) * head.cap
    labels = draw_labels(logits.detach()[0].softmax(-1), torch.Generator().manual_seed(3))
    logits.log_softmax(-1)[0].gather(1, labels.unsqueeze(1)).sum().backward()
    assert torch.allclose(found, x.grad, rtol=1e-3, atol=1e-6)
    plain = LmHead(head.weight).logits(rotated.load_final_norm()(hidden))
    assert not torch.allclose(plain, logits, rtol=1e-2)

"""The measured cost is the second-order estimate of the divergence, one quantizer at a time."""

import pytest
import torch
from torch import nn

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import fill_block, find_quantized_linear, load_block
from pipeline.models.checkpoint import load_block_file
from pipeline.quantization.bit_costs import Candidate, measure_costs
from pipeline.quantization.quantizer_init import init_blocks, resolve_settings
from pipeline.quantization.sensitivity import draw_labels
from pipeline.runtime.artifacts import make_header
from tests.conftest import init_params
from tests.rotation.test_merging import rotate

PLAIN = {"equalize": [], "weights.rounding": "rtn", "weights.range": "max", "activations.range": "max"}
PLAIN |= {"keys.range": "max", "values.range": "max"}


def make_candidates(checkpoint, runner, prefix_kv, token_ids, folder, changes=()):
    candidates = []
    for bits in (4, 8):
        groups = {f"{group}.bits": bits for group in ("weights", "activations", "keys", "values")}
        params = init_params(PLAIN | groups | dict(changes))
        header, work = make_header("quantizer_init", {}), folder / f"bits-{bits}"
        init_blocks(
            checkpoint,
            checkpoint.embed(token_ids),
            prefix_kv,
            params=params,
            runner=runner,
            work_folder=work,
            header=header,
        )
        candidates.append(Candidate(params, work))
    return candidates


def measure(checkpoint, runner, prefix_kv, token_ids, candidates, numbers):
    return measure_costs(
        checkpoint,
        checkpoint.embed(token_ids),
        prefix_kv,
        candidates=candidates,
        channels=[{}] * checkpoint.block_count,
        runner=runner,
        numbers=numbers,
        stage="quantizer_init",
    )


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "qwen3_moe"])
def test_every_site_and_linear_costs_less_in_more_bits(family, imported, tmp_path, token_ids):
    checkpoint, runner, _ = rotate(imported[family], tmp_path / "out")
    candidates = make_candidates(checkpoint, runner, None, token_ids, tmp_path)
    costs = measure(checkpoint, runner, None, token_ids, candidates, [*range(len(token_ids))])
    sites = {"attention_input", "attention_output", "mlp_input", "mlp_hidden", "key", "value"}
    linears = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    for block in costs:
        assert block.keys() == sites | linears
        for site, (four, eight) in block.items():
            assert 0 < eight < four / 20, site  # measured: a 100th to a 500th


def test_a_cost_is_half_the_mean_square_of_the_error_along_the_derivative(imported, tmp_path, token_ids):
    """Written out in one graph, for the output of down_proj and the input of o_proj in block 1, after a prefix."""
    checkpoint, runner, _ = rotate(imported["llama_untied_biases"], tmp_path / "out")
    embeddings = torch.randn(2, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(1))
    prefix_kv, ids = compute_prefix_kv(checkpoint, embeddings, runner), token_ids[:1]
    candidates = make_candidates(checkpoint, runner, prefix_kv, token_ids, tmp_path)
    measured = measure(checkpoint, runner, prefix_kv, ids, candidates, [5])[1]

    recorded = {}
    hidden = checkpoint.embed(ids).requires_grad_()
    for index in range(checkpoint.block_count):
        block = load_block(checkpoint, index)
        if index == 1:
            down = find_quantized_linear(block, "mlp.down_proj")
            output = find_quantized_linear(block, "self_attn.o_proj")
            down.register_forward_hook(lambda module, args, y: recorded.update(down=(module.rotate(args[0]), y)))
            output.register_forward_hook(lambda module, args, y: recorded.update(attention=(args[0], y)))
        hidden = runner.run(block, hidden, prefix_kv[index])
    logits = checkpoint.load_final_norm()(hidden) @ checkpoint.load_lm_head().weight.T
    labels = draw_labels(logits.detach()[0].softmax(-1), torch.Generator().manual_seed(5))
    log_p = logits.log_softmax(-1)[0].gather(1, labels.unsqueeze(1)).sum()
    slopes = torch.autograd.grad(log_p, [recorded["down"][1], recorded["attention"][0]])
    for number, candidate in enumerate(candidates):
        tensors = load_block_file(candidate.folder, checkpoint.architecture, 1, "quantizer_init")
        block = fill_block(checkpoint, 1, tensors, resolve_settings(candidate.params, checkpoint, 1)[0])
        down = find_quantized_linear(block, "mlp.down_proj")
        x, y = (value.detach() for value in recorded["down"])
        weight_error = nn.functional.linear(x, down.dense_weight(x.dtype), down.bias) - y
        expected = (slopes[0] * weight_error).sum(-1).square().mean() / 2
        assert measured["down_proj"][number] == pytest.approx(expected.item(), rel=1e-3)
        output = find_quantized_linear(block, "self_attn.o_proj")
        x = output.rotate(recorded["attention"][0].detach())
        error = output.rotate(output.input_quantizer(x) - x, inverse=True)
        expected = (slopes[1] * error).sum(-1).square().mean() / 2
        assert measured["attention_output"][number] == pytest.approx(expected.item(), rel=1e-3)


def test_a_site_that_no_candidate_quantizes_costs_nothing(imported, tmp_path, token_ids):
    checkpoint, runner, _ = rotate(imported["llama_tied"], tmp_path / "out")
    off = {"overrides": [{"sites": ["key", "up_proj"], "bits": 16}]}
    candidates = make_candidates(checkpoint, runner, None, token_ids, tmp_path, off)
    for block in measure(checkpoint, runner, None, token_ids, candidates, [*range(len(token_ids))]):
        assert block["key"] == block["up_proj"] == [0.0, 0.0]
        assert block["value"][0] > 0

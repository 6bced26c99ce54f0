"""Choices of routers, against transformers' own router logits and counts by hand."""

import pytest
import torch

from pipeline.blocks.quantized import load_block
from pipeline.evaluation.perplexity import Original, compute_final_hidden, evaluate_windows
from pipeline.inspection.routing import (
    NO_EXPERT,
    RoutingProbe,
    average_agreement,
    count_tokens,
    describe_routing,
    measure_agreement,
    stack_choices,
)
from pipeline.runtime.artifacts import make_header, save_tensors
from tests.conftest import make_model, open_model

# Two tokens, two blocks (the first without experts), top-2 of four experts.
CHOICES = torch.tensor([[[[NO_EXPERT, NO_EXPERT], [0, 2]], [[NO_EXPERT, NO_EXPERT], [2, 3]]]], dtype=torch.int32)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
@torch.no_grad()
def test_choices_of_the_walk_equal_transformers(family, imported, token_ids):
    checkpoint, runner = open_model(imported[family])
    model = make_model(family)
    logits = model(token_ids, output_router_logits=True).router_logits
    choices = compute_final_hidden(checkpoint, {"a": token_ids}, runner, None).choices["a"]
    assert choices is not None
    sparse = [index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    expected = torch.full_like(choices, NO_EXPERT)
    for index, block_logits in zip(sparse, logits, strict=True):
        best = block_logits.topk(model.config.num_experts_per_tok).indices.sort(-1).values
        expected[:, :, index] = best.view(*token_ids.shape, -1).int()
    assert torch.equal(choices, expected)


def test_agreement_of_hand_made_choices():
    other = CHOICES.clone()
    other[0, 1, 1] = torch.tensor([1, 3])
    assert measure_agreement(other, CHOICES) == [None, 0.5]
    assert average_agreement([None, 0.5, 1.0]) == 0.75
    assert describe_routing({"a": other, "b": None}, {"a": CHOICES}) == {"router_agreement": {"a": 0.5}}
    assert describe_routing({"a": None}, {}) == {}
    assert count_tokens(CHOICES, 4).tolist() == [[0, 0, 0, 0], [1, 0, 2, 1]]
    assert stack_choices([None, None]) is None
    sparse = CHOICES[:, :, 1]
    stacked = stack_choices([None, sparse])
    assert stacked is not None
    assert torch.equal(stacked, CHOICES)


def test_a_dense_block_of_such_a_model_has_no_choices(imported, token_ids):
    checkpoint, runner = open_model(imported["qwen2_moe"])
    hidden = checkpoint.embed(token_ids)
    block = load_block(checkpoint, 0)
    with RoutingProbe(block, checkpoint.architecture) as probe:
        runner.advance_(block, hidden, None)
    assert probe.read(*token_ids.shape) is None


def test_a_model_agrees_with_itself_and_a_changed_router_does_not(imported, token_ids, tmp_path):
    checkpoint, runner = open_model(imported["olmoe"])
    windows = {"a": token_ids}
    metrics, tensors, _ = evaluate_windows(checkpoint, windows, runner, prefix_kv=None)
    assert "router_agreement" not in metrics
    header = make_header("evaluation", {"variant": "original"}, {"checkpoint": checkpoint.header})
    for name, agreement in (("same", 1.0), ("other", 0.0)):
        if name == "other":  # each token has the experts that the original did not choose
            chosen = tensors["experts.a"]
            count = checkpoint.config.num_experts
            taken = torch.zeros(*chosen.shape[:-1], count).scatter_(-1, chosen.long(), 1.0)
            rest = (1 - taken).topk(chosen.shape[-1]).indices.sort(-1).values
            tensors = tensors | {"experts.a": rest.int()}
        save_tensors(tmp_path / f"{name}.safetensors", tensors, header)
        original = Original(checkpoint, tmp_path / f"{name}.safetensors")
        metrics, *_ = evaluate_windows(checkpoint, windows, runner, prefix_kv=None, original=original)
        assert metrics["router_agreement"] == {"a": agreement}

"""Choices and weights equal those of transformers' routers."""

import pytest
import torch

from pipeline.models.architectures import find_architecture
from pipeline.models.routing import choose_experts, find_correction_bias, keeps_float32, rank_experts, weigh_experts
from tests.conftest import make_model

ROUTERS = ["mixtral", "qwen2_moe", "olmoe", "glm4_moe", "minimax_m2", "gpt_oss"]


def read_calls(family):
    """Return the router of a block with experts, the kind of its scores, and arguments and outputs of one call."""
    model, calls = make_model(family), []
    router = model.model.layers[1].get_submodule(find_architecture(model.config).routers[0])
    router.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    with torch.no_grad():
        model(torch.randint(0, 320, (4, 64), generator=torch.Generator().manual_seed(0)))
    return router, find_architecture(model.config).expert_scores, *calls[0]


def order(indices, weights):
    places = indices.argsort(1)
    return indices.gather(1, places), weights.gather(1, places)


@pytest.mark.parametrize("family", ROUTERS)
def test_choice_and_weights_are_the_routers_own(family):
    router, kind, args, (_, weights, indices) = read_calls(family)
    logits = torch.nn.functional.linear(args[0].reshape(-1, 48), router.weight, getattr(router, "bias", None))
    chosen = choose_experts(router, kind, logits, find_correction_bias(router, args))
    chosen, expected = order(chosen, weigh_experts(router, kind, logits, chosen))
    indices, weights = order(indices, weights)
    assert torch.equal(chosen, indices)
    torch.testing.assert_close(expected, weights)


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2"])
def test_the_correction_bias_and_groups_decide(family):
    router, kind, args, (logits, _, indices) = read_calls(family)
    bias = find_correction_bias(router, args)
    without = logits.topk(2).indices.sort(1).values
    assert (indices.sort(1).values != without).any()
    ranks = rank_experts(kind, logits, bias)
    assert torch.equal(ranks, logits.sigmoid() + bias)
    free = ranks.topk(2).indices.sort(1).values
    crosses_groups = (free[:, 0] // 2 != free[:, 1] // 2).any()
    assert crosses_groups
    assert torch.equal(free, indices.sort(1).values) == (family == "minimax_m2")


def test_models_without_a_bias_rank_by_logits():
    router, kind, args, (logits, _, _) = read_calls("mixtral")
    assert find_correction_bias(router, args) is None
    assert rank_experts(kind, logits, None) is logits


def test_names_of_float32_tensors():
    assert keeps_float32("model.layers.3.mlp.gate.e_score_correction_bias")
    assert not keeps_float32("model.layers.3.self_attn.q_proj.bias")

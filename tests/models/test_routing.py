"""Choices and weights equal those of transformers' routers."""

import pytest
import torch

from pipeline.models.architectures import ARCHITECTURES, find_architecture
from pipeline.models.routing import (
    choose_experts,
    find_correction_bias,
    is_correction_bias,
    rank_experts,
    weigh_experts,
)
from tests.conftest import make_model

ROUTERS = ["mixtral", "qwen2_moe", "olmoe", "glm4_moe", "minimax_m2", "gpt_oss", "ernie4_5_moe", "hunyuan_v1_moe"]


def read_calls(family):
    """Return the router of a block with experts, the kind of its scores, and arguments and outputs of one call."""
    model, calls = make_model(family), []
    router = model.model.layers[1].get_submodule(find_architecture(model.config).router)
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
    weight, bias = getattr(router, "wg", router).weight, getattr(router, "bias", None)
    logits = torch.nn.functional.linear(args[0].reshape(-1, 48), weight, bias)
    chosen = choose_experts(router, kind, logits, find_correction_bias(router, args))
    chosen, expected = order(chosen, weigh_experts(router, kind, logits, chosen))
    indices, weights = order(indices, weights)
    assert torch.equal(chosen, indices)
    torch.testing.assert_close(expected, weights)


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2", "ernie4_5_moe"])
def test_the_correction_bias_and_groups_decide(family):
    router, kind, args, (logits, _, indices) = read_calls(family)
    bias = find_correction_bias(router, args)
    without = logits.topk(2).indices.sort(1).values
    assert (indices.sort(1).values != without).any()
    ranks = rank_experts(kind, logits, bias)
    scores = logits.softmax(-1) if family == "ernie4_5_moe" else logits.sigmoid()
    assert torch.equal(ranks, scores + bias)
    free = ranks.topk(2).indices.sort(1).values
    crosses_groups = (free[:, 0] // 2 != free[:, 1] // 2).any()
    assert crosses_groups
    assert torch.equal(free, indices.sort(1).values) == (family != "glm4_moe")


def test_the_sum_of_weights_has_a_least_value():
    """ernie4_5_moe divides by it where a bias has chosen experts with scores next to nothing."""
    router, kind, args, _ = read_calls("ernie4_5_moe")
    router.norm_min = 0.9
    with torch.no_grad():
        logits, weights, indices = router(*args)
    sums = logits.softmax(-1).gather(1, indices).sum(-1)
    assert sums.min() < 0.9 < sums.max()
    torch.testing.assert_close(weigh_experts(router, kind, logits, indices), weights)


def test_models_without_a_bias_rank_by_logits():
    router, kind, args, (logits, _, _) = read_calls("mixtral")
    assert find_correction_bias(router, args) is None
    assert rank_experts(kind, logits, None) is logits


def test_names_of_float32_tensors():
    assert is_correction_bias("model.layers.3.mlp.gate.e_score_correction_bias")
    assert not is_correction_bias("model.layers.3.self_attn.q_proj.bias")
    for family, router in (("ernie4_5_moe", True), ("glm4_moe", False), ("llama", False)):
        keeps = ARCHITECTURES[family].keeps_float32
        assert keeps("mlp.gate.weight") == router
        assert not keeps("mlp.gate.wg.weight")
        assert keeps("model.layers.3.mlp.gate.moe_statics.e_score_correction_bias")
        assert not any(map(keeps, ("mlp.gate_proj.weight", "mlp.shared_experts.gate_proj.weight")))
    assert ARCHITECTURES["hunyuan_v1_moe"].keeps_float32("mlp.gate.wg.weight")

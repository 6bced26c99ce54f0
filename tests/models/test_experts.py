import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import MOE_FAMILIES, NEAR_FAMILIES, randomize_
from pipeline.models.architectures import ARCHITECTURES, UnsupportedModelError
from pipeline.models.checkpoint import BLOCK, Checkpoint, build_skeleton
from pipeline.models.experts import (
    RoutedExperts,
    UnsupportedExpertsError,
    group_tokens,
    route_experts_,
    split_experts,
    stack_experts,
)
from pipeline.models.sites import base_site
from pipeline.runtime.artifacts import open_tensors
from pipeline.serving.families import served_class
from tests.conftest import make_model

FAMILIES = [*MOE_FAMILIES, "glm4_moe", "minimax_m2", "gpt_oss", "ernie4_5_moe", "hunyuan_v1_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_routed_experts_compute_the_same_as_transformers(family, token_ids):
    model, interleaved = make_model(family), ARCHITECTURES[family].interleaved_experts
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(token_ids).logits
        for layer in model.model.layers:
            tensors = split_experts(layer.state_dict(), interleaved)
            route_experts_(layer, "mlp.experts")
            layer.load_state_dict(tensors, assign=True)
        assert torch.equal(model(token_ids).logits, expected)
    sparse = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    assert sparse
    assert all(sum(experts.hits) == 2 * token_ids.numel() for experts in sparse)  # each token has two experts


def test_shared_experts_may_be_missing(token_ids):
    """ERNIE 4.5 300B has none, and an attribute None in their place."""
    config = copy.deepcopy(NEAR_FAMILIES["ernie4_5_moe"])
    config.moe_num_shared_experts = 0
    model = randomize_(AutoModelForCausalLM.from_config(config, experts_implementation="eager"))
    with torch.no_grad():
        expected = model(token_ids).logits
        layer = model.model.layers[1]
        tensors = split_experts(layer.state_dict())
        route_experts_(layer, "mlp.experts")
        layer.load_state_dict(tensors, assign=True)
        assert torch.equal(model(token_ids).logits, expected)
    sparse = ARCHITECTURES["ernie4_5_moe"].of_block(layer)
    assert sparse.shared_expert is None
    assert len(sparse.linears) == 4 + 3 * 4


def test_experts_have_the_dtype_of_the_model():
    """Once, biases of experts were float32 in a bfloat16 model, and its first quantized block could not be run."""
    experts = RoutedExperts(make_model("olmoe").bfloat16().model.layers[0].mlp.experts)
    assert {parameter.dtype for parameter in experts.parameters()} == {torch.bfloat16}


def test_tokens_are_grouped_by_expert():
    groups = [
        (e, tokens.tolist(), places.tolist()) for e, tokens, places in group_tokens(torch.tensor([[1, 0], [1, 3]]), 4)
    ]
    assert groups == [(0, [0], [1]), (1, [0, 1], [0, 0]), (3, [1], [1])]


def test_layouts_are_converted_without_changing_a_value():
    generator = torch.Generator().manual_seed(0)
    fused = {
        "mlp.experts.gate_up_proj": torch.randn(3, 8, 5, generator=generator),
        "mlp.experts.down_proj": torch.randn(3, 5, 4, generator=generator),
        "mlp.gate.weight": torch.randn(3, 5, generator=generator),
    }
    by_expert = split_experts(fused)
    assert set(by_expert) == {"mlp.gate.weight"} | {
        f"mlp.experts.{e}.{part}_proj.weight" for e in range(3) for part in ("gate", "up", "down")
    }
    assert torch.equal(by_expert["mlp.experts.2.up_proj.weight"], fused["mlp.experts.gate_up_proj"][2, 4:])
    assert stack_experts(by_expert).keys() == fused.keys()  # as transformers loads it
    scales = {
        f"mlp.experts.{e}.{part}_proj.weight_scale": torch.rand(4, 1) for e in range(3) for part in ("gate", "up")
    }
    quantized = by_expert | scales
    stacked = stack_experts(quantized)
    assert stacked["mlp.experts.up_proj.weight"].shape == (3, 4, 5)
    for stored, tensors in ((stack_experts(by_expert), by_expert), (stacked, quantized)):
        again = split_experts(stored)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensors[name]) for name in again)


def test_interleaved_experts_are_converted_without_changing_a_value():
    """gpt_oss: weights transposed, gate and up by turns, biases."""
    stored = make_model("gpt_oss").model.layers[0].mlp.state_dict()
    by_expert = split_experts(stored, interleaved=True)
    gate_up, bias = stored["experts.gate_up_proj"], stored["experts.gate_up_proj_bias"]
    for part, first in (("gate_proj", 0), ("up_proj", 1)):
        assert torch.equal(by_expert[f"experts.2.{part}.weight"], gate_up[2, :, first::2].T)
        assert torch.equal(by_expert[f"experts.2.{part}.bias"], bias[2, first::2])
    assert torch.equal(by_expert["experts.1.down_proj.weight"], stored["experts.down_proj"][1].T)
    assert torch.equal(by_expert["experts.1.down_proj.bias"], stored["experts.down_proj_bias"][1])
    again = stack_experts(by_expert, interleaved=True)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    assert all(tensor.is_contiguous() for tensor in (*by_expert.values(), *again.values()))


def test_dense_tensors_are_passed_on_untouched():
    tensors = {"mlp.down_proj.weight": torch.ones(2, 2), "self_attn.q_proj.bias": torch.ones(2)}
    for convert in (split_experts, stack_experts):
        converted = convert(tensors)
        assert list(converted) == list(tensors)
        assert all(converted[name] is tensors[name] for name in tensors)


def test_a_missing_tensor_of_one_expert_is_refused():
    tensors = {f"mlp.experts.{e}.up_proj.weight": torch.ones(2, 2) for e in range(3)}
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj\.weight_scale: 1 of 3 experts have it"):
        stack_experts(tensors | {"mlp.experts.1.down_proj.weight_scale": torch.ones(2)})


def test_the_clamped_gate_is_that_of_transformers_and_clamps():
    experts = make_model("gpt_oss").model.layers[0].mlp.experts
    gate_up = torch.linspace(-4, 4, 64).view(2, 32)
    routed = RoutedExperts(experts)
    assert torch.equal(routed.combine(gate_up[:, ::2], gate_up[:, 1::2]), experts._apply_gate(gate_up))
    experts.limit = 100.0
    assert not torch.equal(routed.combine(gate_up[:, ::2], gate_up[:, 1::2]), experts._apply_gate(gate_up))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt_oss", {"is_transposed": False}, "gate and up are interleaved"),
        (
            "gpt_oss",
            {"_apply_gate": torch.sigmoid},
            r"their gate is neither activation\(gate\) \* up nor that of gpt_oss",
        ),
        ("mixtral", {"is_transposed": True, "has_gate": False}, "their weights are transposed; they have no gate"),
        ("mixtral", {"has_post_expert_norm": True}, "a norm follows each expert"),
    ],
)
def test_experts_of_another_shape_are_refused_by_name(family, changes, reason):
    experts = make_model(family).model.layers[0].mlp.experts
    for name, value in changes.items():
        setattr(experts, name, value)
    with pytest.raises(UnsupportedExpertsError, match=f"{type(experts).__name__}: {reason}\\. "):
        RoutedExperts(experts)


def test_imported_checkpoint_holds_transformers_own_tensors(imported):
    architecture = ARCHITECTURES["mixtral"]
    with open_tensors(imported["mixtral"] / BLOCK.format(index=0), "model") as (file, _):
        names = {name.removeprefix(architecture.tensor_prefix(0)) for name in file.keys()}  # noqa: SIM118
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"} <= names
    checkpoint = Checkpoint(imported["mixtral"], "model")
    assert set(checkpoint.load_block_tensors(0)) == set(checkpoint.build_block(0).state_dict())


def test_names_of_a_sparse_block(imported):
    checkpoint = Checkpoint(imported["qwen2_moe"], "model")
    dense, sparse = (checkpoint.architecture.of_block(checkpoint.build_block(index)) for index in (0, 1))
    assert dense.experts is None
    assert dense.mlp_readers == ("mlp.gate_proj", "mlp.up_proj")
    assert sparse.routers == ("mlp.gate", "mlp.shared_expert_gate")
    assert len(sparse.linears) == 4 + 3 * (4 + 1)
    assert list(sparse.mlps)[-2:] == ["mlp_hidden.experts.3", "mlp_hidden.shared_expert"]
    assert {base_site(name) for name in (*sparse.linear_names, *sparse.site_readers)} == {
        *dense.linear_names,
        *dense.site_readers,
    }
    assert sparse.of_block(checkpoint.build_block(1)) is sparse


def test_widths_of_settings_name_each_width_once(imported):
    checkpoint = Checkpoint(imported["qwen2_moe"], "model")
    blocks = list(map(checkpoint.build_block, range(checkpoint.block_count)))
    widths = checkpoint.architecture.setting_widths(blocks)
    assert widths["down_proj"] == 96  # of the first, dense block
    assert widths["experts.down_proj"] == widths["mlp_hidden.experts"] == 32
    assert widths["shared_expert.down_proj"] == widths["mlp_hidden.shared_expert"] == 64
    dense = Checkpoint(imported["llama_tied"], "model")
    assert dense.architecture.setting_widths([dense.build_block(0)]) == dense.architecture.site_widths(
        dense.build_block(0)
    )


def test_skeleton_keeps_transformers_own_names(imported):
    names = dict(build_skeleton(Checkpoint(imported["olmoe"], "model").config).named_parameters())
    assert "model.layers.0.mlp.experts.gate_up_proj" in names


@pytest.mark.parametrize("family", ["gpt_oss", "ernie4_5_moe", "hunyuan_v1_moe"])
def test_vllm_is_refused_by_name(family):
    with pytest.raises(UnsupportedModelError, match=f"model_type='{family}': vLLM serves only"):
        served_class(family)

"""Complaints about the experts of other quantization tools, and the test of each one here.

llm-compressor#2939: GPTQ on 3-D tensors cut MMLU from 82.2 to 24.7 without an error
    quantization/test_expert_statistics.py:test_quantized_experts_equal_a_loop_over_tokens
llm-compressor#2826: a flag that was not wired gave NaN scales
    quantization/test_expert_statistics.py:test_an_expert_without_tokens_gets_the_next_best_ones
llm-compressor#2060: ignored experts gave a KeyError in vLLM
    serving/test_other_formats.py:test_vllm_finds_every_name_of_each_expert
llm-compressor#2877: calibration of all experts with all tokens exceeded 80 GB
    quantization/test_expert_statistics.py:test_statistics_of_an_expert_are_of_its_tokens
Model-Optimizer#1340: hooks on linears do not fire for `grouped_mm` and `batched_mm`
    test_expert_complaints.py:test_experts_are_reached_whatever_implementation_is_asked_for
Model-Optimizer#1173, bitsandbytes#1849, #1965: 91 % of the weights, or all 3-D experts, were skipped in silence
    quantization/test_expert_statistics.py:test_no_weight_of_an_expert_is_skipped_or_rounded_to_nearest
    test_families.py:test_the_loaded_model_equals_the_evaluated_one
Model-Optimizer#831: all tokens through all experts gave garbage
    quantization/test_expert_statistics.py:test_statistics_of_an_expert_are_of_its_tokens
Model-Optimizer#1521: one maximum for all experts cost quality
    test_expert_complaints.py:test_each_expert_has_a_scale_of_its_own_for_its_down_projection
Model-Optimizer#1354, #1421, Olive#2599, GPTQModel#1680, #2235: experts without tokens break scales and exports
    quantization/test_expert_statistics.py:test_an_expert_without_tokens_gets_the_next_best_ones
    test_families.py:test_the_loaded_model_equals_the_evaluated_one
ao#4322: 4 of OLMoE's 1,024 experts got no token, and nobody was told
    test_expert_complaints.py:test_metrics_name_starved_experts
    pictures/test_experts.py:test_lists_name_blocks_and_experts
vllm#49638, #40885, #40591, #50833, sglang#33759: a shared expert in another scheme could not be loaded
    interop/test_other_formats.py:test_settings_that_engines_have_not_for_experts_are_refused_by_name
"""

import re
from pathlib import Path

import pytest
import torch

from pipeline.blocks.quantized import load_block
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.experts import RoutedExperts, route_experts_, split_experts
from pipeline.quantization.quantizer_init import summarise_blocks
from tests.conftest import make_model
from tests.inference.test_prefixed_model import make_quantized


def test_every_complaint_has_a_test():
    named = re.findall(r"^    (\S+\.py):(\w+)$", __doc__, re.MULTILINE)
    assert len(named) >= 11
    for path, name in named:
        assert f"def {name}(" in (Path(__file__).parent / path).read_text(encoding="utf-8"), f"{path}:{name}"


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_are_reached_whatever_implementation_is_asked_for(implementation, token_ids):
    model = make_model("qwen3_moe")
    expected = model(token_ids).logits
    model.set_experts_implementation(implementation)
    name = str(ARCHITECTURES["qwen3_moe"].experts)
    reached: list[int] = []
    for layer in model.model.layers:
        tensors = split_experts(layer.state_dict())
        route_experts_(layer, name)
        layer.load_state_dict(tensors, assign=True)
        for module in layer.modules():
            if isinstance(module, RoutedExperts):
                for index in range(len(module)):
                    linear = module.expert(index).down_proj
                    linear.register_forward_hook(lambda module, args, output: reached.append(len(args[0])))
    with torch.no_grad():
        logits = model(token_ids).logits
    assert sum(reached) == 2 * token_ids.numel() * model.config.num_experts_per_tok  # two blocks have experts
    assert torch.allclose(logits, expected, atol=1e-5)


def test_each_expert_has_a_scale_of_its_own_for_its_down_projection(imported, tmp_path):
    checkpoint, _ = make_quantized(imported, tmp_path, "olmoe", {"activations.range": "max"})
    experts = load_block(Checkpoint(checkpoint.folder, checkpoint.stage), 1).get_submodule("mlp.experts")
    assert isinstance(experts, RoutedExperts)
    quantizers = [experts.expert(index).down_proj.get_submodule("input_quantizer") for index in range(4)]
    assert len({float(quantizer.get_buffer("scale")) for quantizer in quantizers}) == 4


def test_metrics_name_starved_experts():
    site = {"relative_error": 0.1, "at_grid_edge": 0}
    dense = {"block_error": 0.1, "sites": {"down_proj": site}}
    starved = {"tokens": [900, 0], "starved": [{"expert": 1, "tokens": 0, "added": 512}]}
    summary = summarise_blocks([dense, dense | {"experts": starved}])
    assert (summary["starved_experts"], summary["starved_expert_names"]) == (1, ["1.experts.1"])
    assert "starved_experts" not in summarise_blocks([dense])

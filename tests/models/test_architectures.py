"""Inputs are hooked where a family has them, and texts that would change RoPE's frequencies are refused."""

import itertools
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.importing.import_model import import_model
from pipeline.inference.prefixed_model import assemble_model
from pipeline.models.architectures import (
    UnsupportedModelError,
    check_window,
    find_architecture,
    find_max_positions,
    find_rope_limit,
    find_sliding_window,
)
from pipeline.models.sites import RESIDUAL_SITES
from pipeline.quantization import statistics
from pipeline.rotation import gate
from tests.blocks.test_walk import assert_close, walked_logits
from tests.conftest import FAMILIES, SLIDING, WINDOW, make_model, open_model

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
KINDS = {
    "phi3": (
        LONGROPE,
        {"original_max_position_embeddings": 32, "max_position_embeddings": 256, "sliding_window": None},
    ),
    "llama_tied": (DYNAMIC, {"max_position_embeddings": 32}),
}


@pytest.fixture(params=KINDS)
def limited(request, model_folders, tmp_path):
    """Return a model whose RoPE changes beyond 32 positions, as transformers loads it, and imported."""
    rope, more = KINDS[request.param]
    folder = shutil.copytree(model_folders[request.param], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    config |= more | {"rope_parameters": {"rope_theta": 10000.0} | rope}
    (folder / "config.json").write_text(json.dumps(config))
    import_model(str(folder), None, torch.float32, tmp_path / "out")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tmp_path / "out"


def test_families_without_longrope_or_dynamic_rope_have_no_limit():
    assert {find_rope_limit(config) for config in FAMILIES.values()} == {None}
    assert find_max_positions(FAMILIES["llama_long_rope"]) == 256


def test_the_walk_counts_the_prefix_and_refuses_texts_beyond_the_limit(limited):
    original, folder = limited
    checkpoint, runner = open_model(folder)
    assert find_max_positions(checkpoint.config) == 32
    prefix, token_ids = (
        torch.tensor([5, 9, 0]),
        torch.randint(0, 320, (2, 29), generator=torch.Generator().manual_seed(7)),
    )
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(prefix), runner)
    with torch.no_grad():
        expected = original(torch.cat((prefix.expand(2, -1), token_ids), dim=1)).logits[:, 3:]
    assert_close(walked_logits(checkpoint, runner, token_ids, prefix_kv), expected)
    with pytest.raises(UnsupportedModelError, match=r"33 positions \(prefix \+ window\) exceed"):
        walked_logits(checkpoint, runner, torch.cat((token_ids, token_ids[:, :1]), dim=1), prefix_kv)


def test_generation_counts_the_prefix_and_refuses_texts_beyond_the_limit(limited):
    original, folder = limited
    checkpoint, runner = open_model(folder)
    prefix, token_ids = torch.tensor([[5, 9, 0]]), torch.tensor([[40, 41, 42, 43]])
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(prefix[0]), runner)
    model = assemble_model(checkpoint, prefix_kv)
    options = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    whole = original.generate(torch.cat((prefix, token_ids), dim=1), max_new_tokens=26, **options)[:, 3:]
    assert torch.equal(model.generate(token_ids, max_new_tokens=26, **options), whole)  # reads 3 + 4 + 25 positions
    message = r"33 positions .* exceed 32, beyond which this model's RoPE changes its frequencies"
    with pytest.raises(UnsupportedModelError, match=message):
        model.generate(token_ids, max_new_tokens=27, **options)


def test_the_message_names_the_limit_and_the_remedy(limited):
    config = open_model(limited[1])[0].config
    config.max_position_embeddings = 256
    config.rope_parameters = LONGROPE | {"original_max_position_embeddings": 32}
    with pytest.raises(UnsupportedModelError, match=r"40 positions .* exceed 32, .* at most 32 tokens less the prefix"):
        check_window(config, 40)
    check_window(config, 32)


@pytest.mark.parametrize("site", RESIDUAL_SITES)
@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "olmo2"])  # norms before, on both sides, after
@torch.no_grad()
def test_a_hook_replaces_the_input_of_exactly_the_readers_of_its_site(family, site):
    model = make_model(family)
    architecture, block = find_architecture(model.config), model.model.layers[0]
    inputs = {name: [] for name in architecture.linears}
    for name, collected in inputs.items():
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, collected=collected: collected.append(args[0].clone())
        )
    token_ids = torch.tensor([[5, 9, 40, 7]])
    model(token_ids)
    modules = []
    architecture.watch_input_(block, site, lambda module, x: modules.append(module) or torch.ones_like(x))
    model(token_ids)
    assert modules == [architecture.input_module(block, site)]
    for name in architecture.site_readers[site]:
        before, after = inputs[name]
        assert (after == 1).all()
        assert not torch.equal(before, after)
    if site == RESIDUAL_SITES[1]:  # attention comes before the MLP, so its inputs are the same
        for name in architecture.attention_readers:
            assert torch.equal(*inputs[name])


def test_sliding_windows_are_found_in_the_layers_that_slide():
    for family, config in FAMILIES.items():
        if "phi3" in family:
            continue  # imported as mistral
        model = make_model(family)
        windows = {find_sliding_window(model.config, block) for block in model.model.layers}
        assert (WINDOW in windows) == (family in SLIDING), family
        assert windows <= {WINDOW, None}
        if config.model_type in ("qwen2", "gemma2", "gemma3_text"):
            assert windows == {WINDOW, None}


@pytest.mark.parametrize("attend", [gate._attend, statistics._make_recording(sdpa_attention_forward)])
def test_attention_without_a_term_is_refused(attend):
    """gpt_oss passes its learned sinks as s_aux. transformers' sdpa accepts any argument, and would leave them out."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    q = torch.ones(1, 2, 3, 4)
    harmless = {"position_ids": torch.arange(3), "sliding_window": 2, "s_aux": None}
    assert attend(module, q, q, q, None, scaling=1.0, **harmless)[0].shape == (1, 3, 2, 4)
    unknown = "alibi" if attend is gate._attend else "s_aux"
    with pytest.raises(
        UnsupportedModelError, match=rf"attention gets {unknown}, .*\(s_aux are learned attention sinks\)"
    ):
        attend(module, q, q, q, None, scaling=1.0, **harmless | {unknown: torch.ones(2)})


@pytest.mark.parametrize("attend", [gate._attend, statistics._make_recording(statistics._attend_eagerly)])
@pytest.mark.parametrize("sliding", [False, True])
def test_attention_with_sinks_equals_transformers(attend, sliding):
    attention = make_model("gpt_oss").double().model.layers[0].self_attn
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 9, 16, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    distance = torch.arange(9)[:, None] - torch.arange(9)
    hidden = (distance < 0) | (distance >= 4) if sliding else distance < 0
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    expected = torch.zeros(2, 9, 4, 16, dtype=torch.float64)  # a loop: the sink is a score that has no value
    for batch, head, row in itertools.product(range(2), range(4), range(9)):
        places = (~hidden[row]).nonzero().flatten()
        weights = (k[batch, head // 2, places] @ q[batch, head, row] * 0.3).exp()
        total = weights.sum() + attention.sinks[head].exp()
        expected[batch, row, head] = weights @ v[batch, head // 2, places] / total
    with torch.no_grad():
        found, _ = attend(attention, q, k, v, mask, scaling=0.3, s_aux=attention.sinks)
    torch.testing.assert_close(found, expected)


def test_a_family_that_is_not_supported_is_refused_with_those_that_are():
    with pytest.raises(
        UnsupportedModelError, match=r"^model_type='gpt2' is not supported\. Supported are: .*cwm, .*qwen3_moe, "
    ):
        find_architecture(GPT2Config())

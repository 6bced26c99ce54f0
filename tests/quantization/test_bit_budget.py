"""Bits go where they reduce the estimated divergence most, within every bound."""

import itertools
import json
import re

import pytest
import torch
import yaml

from pipeline.quantization import bit_budget
from pipeline.quantization.bit_budget import BlockSizes, BudgetError, choose_bits, measure_sizes, spend_budget
from pipeline.quantization.params import find_contradictions, resolve_site
from pipeline.quantization.quantizer_init import init_quantizers, resolve_settings
from pipeline.runtime.artifacts import make_header
from prefixquant.recipes import make_params, parse_setting
from tests.conftest import init_params
from tests.rotation.test_merging import rotate

ENTRIES = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64, "gate_proj": 128, "up_proj": 128, "down_proj": 128}
SIZES = BlockSizes(
    entries=ENTRIES,
    products=ENTRIES,
    readers={
        "attention_input": ["q_proj", "k_proj", "v_proj"],
        "attention_output": ["o_proj"],
        "mlp_input": ["gate_proj", "up_proj"],
        "mlp_hidden": ["down_proj"],
    },
    widths={"key": 8, "value": 8},
)


def make_costs(blocks=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    names = [*SIZES.readers, *ENTRIES, *SIZES.widths]
    costs = []
    for _ in range(blocks):
        four = torch.rand(len(names), generator=draw).tolist()
        costs.append({name: [cost, cost / 250] for name, cost in zip(names, four, strict=True)})
    return costs


def spend(budget, costs=None, overrides=(), other_bytes=0):
    costs = make_costs() if costs is None else costs
    params = init_params({f"budget.{key}": value for key, value in budget.items()} | {"overrides": [*overrides]})
    return spend_budget(params, [SIZES] * len(costs), costs, other_bytes)


def list_bits(params, blocks=2, sites=tuple(SIZES.readers)):
    return {(block, site): resolve_site(params, site, block).bits for block in range(blocks) for site in sites}


def test_no_other_bits_within_the_bound_cost_less():
    costs, sites = make_costs(), list(itertools.product(range(2), SIZES.readers))
    products = {site: sum(SIZES.products[name] for name in names) for site, names in SIZES.readers.items()}
    total = 2 * sum(products.values())
    for bound in (4.0, 4.3, 5.0, 6.1, 8.0):
        bits = list_bits(spend({"activations": bound}).params)
        cost = sum(costs[block][site][bits[block, site] == 8] for block, site in sites)
        best = min(
            sum(costs[block][site][wide] for (block, site), wide in zip(sites, wides, strict=True))
            for wides in itertools.product((0, 1), repeat=len(sites))
            if sum(products[site] * (8 if wide else 4) for (_, site), wide in zip(sites, wides, strict=True))
            <= bound * total
        )
        assert cost == pytest.approx(best)
        assert sum(products[site] * bits[block, site] for block, site in sites) <= bound * total


def test_a_bad_site_gets_more_bits_first():
    costs = make_costs()
    costs[1]["mlp_hidden"] = [9.0, 0.1]
    choice = spend({"activations": 4.5}, costs)
    assert list_bits(choice.params)[1, "mlp_hidden"] == 8
    assert choice.report["activations"]["overrides"][0].keys() == {"sites", "blocks", "bits"}


def test_the_curve_falls_from_the_fewest_to_the_most_bits():
    report = spend({"weights": 5.0, "kv_cache": 6.0}).report
    for bound in ("weights", "kv_cache"):
        curve = report[bound]["curve"]
        assert (curve[0]["value"], curve[-1]["value"]) == (4.0, 8.0)
        nats = [point["nats"] for point in curve]
        assert nats == sorted(nats, reverse=True)
        assert nats[-1] < nats[0] / 100


def test_each_bound_changes_its_own_groups_alone():
    params = spend({"kv_cache": 6.0}).params
    bits = list_bits(params, sites=("key", "value", "mlp_hidden", "down_proj"))
    assert sorted(bits.values()) == [4, 4, 4, 4, 4, 4, 8, 8]
    assert {bits[block, site] for block in range(2) for site in ("mlp_hidden", "down_proj")} == {4}


def test_overrides_of_the_user_win_and_count():
    fixed = [{"sites": ["mlp_hidden"], "bits": 8}, {"sites": ["mlp_input"], "blocks": [0], "group_size": 8}]
    params = spend({"activations": 5.0}, overrides=fixed).params
    bits = list_bits(params)
    assert bits[0, "mlp_hidden"] == bits[1, "mlp_hidden"] == 8
    assert resolve_site(params, "mlp_input", 0).group_size == 8
    with pytest.raises(BudgetError, match=r"budget.activations=4.5: the smallest possible value is 4.8889 "):
        spend({"activations": 4.5}, overrides=fixed)


def test_the_smallest_possible_value_is_accepted():
    fixed = [{"sites": ["mlp_hidden"], "bits": 8}]
    assert spend({"activations": 4.8889}, overrides=fixed).metrics["bits"]["activations"]["value"] == 4.8889
    with pytest.raises(BudgetError, match=r"the smallest possible value is 4.0 "):
        spend({"weights": 3.9})


def test_the_wider_operand_of_a_product_decides_its_time():
    """Inputs of linears that read 8-bit weights anyway cost no time in 8 bits."""
    fixed = [{"sites": ["down_proj"], "bits": 8}]
    bits = list_bits(spend({"time": 1.0}, overrides=fixed).params)
    assert {site for (_, site), number in bits.items() if number == 8} == {"mlp_hidden"}
    assert set(list_bits(spend({"time": 1.0}).params).values()) == {4}
    assert set(list_bits(spend({"time": 2.0}).params).values()) == {8}
    with pytest.raises(BudgetError, match=r"budget.time=0.9: the smallest possible value is 1.0 "):
        spend({"time": 0.9})


def test_time_counts_the_weights_that_were_chosen():
    costs = make_costs()
    for block in costs:
        block["down_proj"] = [9.0, 0.1]
    params = spend({"weights": 4.9, "time": 1.25}, costs).params
    assert {resolve_site(params, "down_proj", block).bits for block in range(2)} == {8}
    bits = list_bits(params)
    assert {bits[block, "mlp_hidden"] for block in range(2)} == {8}


def test_linears_that_read_the_same_input_get_the_same_bits():
    """Engines fuse them, and read one setting for all. One whose bits an override fixes is left out."""
    costs = make_costs()
    costs[0]["k_proj"] = [9.0, 0.1]
    choice = spend({"weights": 4.5}, costs)
    assert {resolve_site(choice.params, f"{name}_proj", 0).bits for name in "qkv"} == {8}
    assert {"sites": ["q_proj", "k_proj", "v_proj"], "blocks": [0], "bits": 8} in choice.report["weights"]["overrides"]
    fixed = spend({"weights": 5.5}, costs, overrides=[{"sites": ["v_proj"], "bits": 16}])
    assert [resolve_site(fixed.params, f"{name}_proj", 0).bits for name in "qkv"] == [8, 8, 16]


def test_a_size_counts_all_other_tensors_too():
    entries = 2 * sum(ENTRIES.values())
    other = 10_000
    bytes_at = {bits: other + entries * bits / 8 for bits in (4, 5, 8)}
    by_size = spend({"size_mib": bytes_at[5] / 2**20}, other_bytes=other)
    assert by_size.params.overrides == spend({"weights": 5.0}).params.overrides
    assert by_size.metrics["bits"]["size_mib"]["value"] * 2**20 <= bytes_at[5] + 60  # four decimals
    curve = by_size.report["size_mib"]["curve"]
    assert curve[0]["value"] == round(bytes_at[4] / 2**20, 4)
    assert curve[-1]["value"] == round(bytes_at[8] / 2**20, 4)
    with pytest.raises(BudgetError, match=r"budget.size_mib=0.005: the smallest possible value is 0.0101 "):
        spend({"size_mib": 0.005}, other_bytes=other)


def test_three_choices_give_sensitive_sites_more_and_others_less():
    costs = [{name: [values[0] * 16, *values] for name, values in block.items()} for block in make_costs()]
    costs[0]["mlp_input"] = [1e-6, 1e-7, 1e-8]
    params = spend({"activations": 4.0, "choices": [2, 4, 8]}, costs).params
    assert resolve_site(params, "mlp_input", 0).bits == 2
    assert 8 in list_bits(params).values()


def test_sizes_equal_the_weights(imported, tmp_path):
    checkpoint, _, _ = rotate(imported["llama_tied"], tmp_path / "out")
    sizes = measure_sizes(checkpoint, 1)
    tensors = checkpoint.load_block_tensors(1)
    assert sizes.entries == sizes.products
    assert sizes.entries["down_proj"] == tensors["mlp.down_proj.weight"].numel()
    assert sum(sizes.entries.values()) == sum(tensor.numel() for tensor in tensors.values() if tensor.dim() == 2)
    assert sizes.readers["attention_input"] == ["q_proj", "k_proj", "v_proj"]


def test_a_token_uses_some_of_the_experts(imported, tmp_path):
    checkpoint, _, _ = rotate(imported["qwen3_moe"], tmp_path / "out")
    config, sizes = checkpoint.config, measure_sizes(checkpoint, 1)
    assert sizes.entries["up_proj"] == config.num_experts * config.hidden_size * config.moe_intermediate_size
    used = config.num_experts_per_tok * config.hidden_size * config.moe_intermediate_size
    assert sizes.products["up_proj"] == used < sizes.entries["up_proj"]
    assert sizes.products["q_proj"] == sizes.entries["q_proj"]


def quantize(checkpoint, runner, token_ids, folder, params):
    header, embeddings = make_header("quantizer_init", params.describe()), torch.zeros(0, checkpoint.config.hidden_size)
    choice = choose_bits(
        checkpoint,
        params=params,
        prefix_embeddings=embeddings,
        token_ids=token_ids,
        runner=runner,
        work_folder=folder / "work",
        header=header,
    )
    metrics = init_quantizers(
        checkpoint,
        folder / "out",
        params=choice.params,
        bits=choice.report,
        prefix_token_ids=torch.zeros(0, dtype=torch.int64),
        prefix_embeddings=embeddings,
        token_ids=token_ids,
        runner=runner,
        work_folder=folder / "work",
        header=header,
    )
    return choice, metrics


def read_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_killed_run_chooses_the_same_and_ends_with_the_same_bytes(rotated, token_ids, tmp_path, monkeypatch):
    checkpoint, runner = rotated
    params = init_params({"budget.activations": 5.0, "budget.weights": 5.0})
    whole, _ = quantize(checkpoint, runner, token_ids, tmp_path / "whole", params)
    assert {4, 8} == {
        spec.bits for index in range(3) for spec in resolve_settings(whole.params, checkpoint, index)[0].sites.values()
    }
    real, calls = bit_budget.init_blocks, []

    def kill(*args, **kwargs):
        calls.append(kwargs["work_folder"].name)
        if calls[-1] == "bits-8":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(bit_budget, "init_blocks", kill)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, runner, token_ids, tmp_path / "killed", params)
    monkeypatch.undo()
    again, _ = quantize(checkpoint, runner, token_ids, tmp_path / "killed", params)
    assert again == whole
    assert read_bytes(tmp_path / "killed/out") == read_bytes(tmp_path / "whole/out")
    written = json.loads((tmp_path / "whole/out/report.json").read_text(encoding="utf-8"))
    assert written["bits"]["weights"]["overrides"] == whole.report["weights"]["overrides"]


def test_without_a_budget_nothing_is_measured_and_headers_stay(rotated, token_ids, tmp_path):
    checkpoint, runner = rotated
    params = init_params({})
    assert "budget" not in params.describe()
    assert "budget" in init_params({"budget.time": 1.5}).describe()
    choice = choose_bits(
        checkpoint,
        params=params,
        prefix_embeddings=torch.zeros(0, checkpoint.config.hidden_size),
        token_ids=token_ids,
        runner=runner,
        work_folder=tmp_path / "work",
        header=make_header("quantizer_init", {}),
    )
    assert choice == bit_budget.Choice(params)
    assert not (tmp_path / "work").exists()


def test_a_budget_that_cannot_be_met_is_refused_before_any_measurement(rotated, token_ids, tmp_path):
    checkpoint, runner = rotated
    with pytest.raises(BudgetError, match=r"the smallest possible value is 4.0 "):
        quantize(checkpoint, runner, token_ids, tmp_path, init_params({"budget.kv_cache": 3.0}))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget.activations": 5.0, "budget.time": 1.5}, r"budget\.time=1\.5: `activations` has a bound already"),
        (
            {"budget.kv_cache": 5.0, "keys.bits": 3},
            r"budget\.kv_cache: quantizer_init\.keys\.bits=3 is not one of choices",
        ),
        (
            {"budget.weights": 5.0, "weights.format": "nvfp4"},
            r"budget\.weights: quantizer_init\.weights\.format='nvfp4' has 4 bits and no others",
        ),
        ({"budget.weights": 5.0, "budget.size_mib": 80.0}, r"budget\.size_mib=80\.0: `weights` has a bound already"),
        ({"budget.weights": 5.0, "budget.choices": [4, 4]}, r"budget\.choices=\[4, 4\]: names a number twice"),
    ],
)
def test_bounds_that_contradict_the_settings_are_refused_by_name(changes, message):
    problems = find_contradictions(init_params(changes))
    assert any(re.search(message, problem) for problem in problems), problems


def test_recipes_take_a_budget_as_any_other_setting():
    text = make_params("m", settings=dict([parse_setting("quantizer_init.budget.activations=4.4")]))
    assert yaml.safe_load(text)["quantizer_init"]["budget"]["activations"] == 4.4

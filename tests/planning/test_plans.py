"""What plans say of a GPU, without one: the measured rows of docs/scaling.md, and what plans must not forget."""

import re

import pytest
import torch

from benchmarks.scaling import END_TO_END, PARAMS, SHAPES, Shape
from benchmarks.workspace import override, read_params
from pipeline.params import parse_params
from pipeline.planning import finetuning as finetuning_plan
from pipeline.planning.evaluation import plan_evaluation
from pipeline.planning.finetuning import plan_finetuning
from pipeline.planning.need import Share, make_need
from pipeline.planning.prefix import plan_prefix_search, plan_prefix_training
from pipeline.planning.quantizer_init import plan_quantizer_init
from pipeline.planning.rotation import plan_rotation
from pipeline.planning.sizes import Sizes
from pipeline.runtime import memory
from pipeline.runtime.memory import GIB
from tests.conftest import ROOT

ROW = re.compile(r"\| (llama\S+), \d blocks? \| ([^|]+?) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|")
MEASURED = ROW.findall((ROOT / "docs/scaling.md").read_text())


@pytest.fixture(autouse=True)
def resident(monkeypatch):
    """A process with 0.8 GiB before it works, as there."""
    monkeypatch.setattr(memory, "current_rss_gib", lambda: 0.8)


def shape(name, quantized=False, dtype=torch.bfloat16, **changes):
    own = Shape(SHAPES[name] | changes, quantized)
    own.dtype = dtype
    return own


def share(*windows, on_gpu=True, length=512):
    return Share.of(list(windows), length, parse_params(override(read_params(), PARAMS)).runtime, on_gpu)


def plan(model, stage, monkeypatch):
    """As the benchmark's rows are planned: 8 windows of 512, 4 of each of two corpora to evaluate on."""
    params = parse_params(override(read_params(), PARAMS | {"model.source": "."}))
    plain, quantized = shape(model), shape(model, True)
    if stage == "rotation":
        return plan_rotation(plain, torch.bfloat16, True)
    if stage == "prefix_search":
        return plan_prefix_search(plain, share(8), params.prefix_search)
    if stage == "quantizer_init":
        return plan_quantizer_init(plain, share(8), params.quantizer_init)
    if stage.startswith("evaluation"):
        own = plain if stage.endswith("original") else quantized
        return plan_evaluation(own, share(4, 4), own is quantized, False, 0)
    if stage.endswith("block by block"):
        return plan_finetuning(plain, share(8, 1), share(8, 1), params.finetuning, params.runtime)
    params = parse_params(override(read_params(), PARAMS | END_TO_END | {"model.source": "."}))
    for name in ("memory_limit", "fits"):  # nothing fits: blocks are streamed
        monkeypatch.setattr(finetuning_plan, name, lambda *_: 0)
    return plan_finetuning(plain, share(8, 1), share(8, 1), params.finetuning, params.runtime)


def test_there_are_rows_of_every_stage():
    assert len(MEASURED) == 16
    assert {row[0] for row in MEASURED} == set(SHAPES)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row[0]} {row[1]}")
def test_plans_are_within_a_fifth_of_what_was_measured_on_a_gpu(row, monkeypatch):
    model, stage, *figures = row
    rss, said, gpu, gpu_said = map(float, figures)
    need = plan(model, stage, monkeypatch)
    assert need.stream == stage.endswith("streamed")
    assert (need.memory / GIB, need.gpu / GIB) == (pytest.approx(said, abs=0.03), pytest.approx(gpu_said, abs=0.03))
    assert need.memory / GIB == pytest.approx(rss, rel=0.2)
    assert need.gpu / GIB == pytest.approx(gpu, rel=0.2)


def test_what_passes_through_the_host_counts_where_it_is_more_than_the_next_block():
    has = (0.8 + 0.1) * GIB
    assert make_need(7.0, 3.0, False, ahead=5, passing=9).memory == has + 3 + 7
    with_cuda = make_need(7.0, 3.0, True, ahead=5).memory - 3 - 5
    assert make_need(7.0, 3.0, True, ahead=5, passing=9).memory == with_cuda + 3 + 9
    assert make_need(7.0, 3.0, True, ahead=5, passing=4).memory == with_cuda + 3 + 5
    assert make_need(7.0, 3.0, True, ahead=5, passing=9).gpu == 7 + 5


def test_a_single_block_has_no_next_one():
    assert Sizes.of(shape("llama-3-70b")).ahead == 0
    own = Sizes.of(shape("llama-2-7b"))
    assert own.ahead == own.numbers * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [True, False])
def test_on_a_cpu_scoring_takes_the_heads_and_all_of_their_logits(quantized, dtype):
    """A vocabulary whose tables are more than a block: nothing that a GPU would fetch meanwhile is taken off."""
    model = shape("llama-2-7b", quantized, dtype, vocab_size=256_000)
    sizes = Sizes.of(model)
    need = plan_evaluation(model, share(4, on_gpu=False), False, False, 0)
    least = (0.8 + 0.1) * GIB + need.streams + sizes.table + 5 * sizes.logits
    assert need.memory >= least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_that_a_gpus_host_rounds_or_sends_are_in_every_plan(dtype):
    model, quantized = (shape("llama-2-7b", kind, dtype, vocab_size=256_000) for kind in (False, True))
    table, params = Sizes.of(model).table, parse_params(read_params())
    off = params.finetuning.model_copy(
        update={"end_to_end": params.finetuning.end_to_end.model_copy(update={"enabled": False})}
    )
    trained = params.prefix_training.model_copy(update={"enabled": True})
    needs = [
        plan_prefix_search(model, share(8), params.prefix_search),
        plan_quantizer_init(model, share(8), params.quantizer_init),
        plan_evaluation(quantized, share(4, 4), True, False, 0),
        plan_finetuning(model, share(8), share(8), off, params.runtime.model_copy(update={"max_memory": "400GiB"})),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.planning.prefix.fits", lambda *_: True)
        needs.append(plan_prefix_training(model, share(8), trained, params.runtime))
    for need in needs:
        assert need.memory >= table + need.streams

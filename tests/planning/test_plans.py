"""Plans of memory agree with the measured rows of docs/scaling.md without a GPU, and include every large part."""

import re

import pytest
import torch

from benchmarks.speed.scaling import DENSE, END_TO_END, PARAMS, SHAPES, Shape
from benchmarks.workspace import override, read_params
from pipeline.evaluation.perplexity import LOGIT_POSITIONS
from pipeline.params import parse_params
from pipeline.planning import finetuning as finetuning_plan
from pipeline.planning import need as need_module
from pipeline.planning import prefix_training as prefix_training_plan
from pipeline.planning.constants import CUDA_ON_HOST, KERNELS, PERPLEXITY_LOGITS
from pipeline.planning.evaluation import plan_evaluation
from pipeline.planning.finetuning import plan_finetuning
from pipeline.planning.need import Need, make_need
from pipeline.planning.prefix_search import plan_prefix_search
from pipeline.planning.prefix_training import plan_prefix_training
from pipeline.planning.quantizer_init import plan_quantizer_init
from pipeline.planning.rotation import plan_rotation
from pipeline.planning.sizes import Sizes
from pipeline.planning.workload import Workload
from pipeline.runtime.memory import GIB
from tests.conftest import ROOT

ROW = re.compile(r"\| (llama\S+), \d blocks? \| ([^|]+?) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|")
MEASURED = ROW.findall((ROOT / "docs/scaling.md").read_text())
RESIDENT = 0.8  # GiB that a process has before it works, as in the measured runs


@pytest.fixture(autouse=True)
def resident(monkeypatch):
    monkeypatch.setattr(need_module, "current_rss_gib", lambda: RESIDENT)


def make_shape(name, quantized=False, dtype=torch.bfloat16, **changes):
    shape = Shape(SHAPES[name] | changes, quantized)
    shape.dtype = dtype
    return shape


def read_settings(changes=None):
    return parse_params(override(read_params(), PARAMS | {"model.source": "."} | (changes or {})))


def make_workload(*windows, on_gpu=True, length=512):
    return Workload.of(list(windows), length, read_settings().runtime, on_gpu)


def finetune(model, params, windows=(8, 1), on_gpu=True):
    workload = make_workload(*windows, on_gpu=on_gpu)
    return plan_finetuning(
        model,
        blocks=workload,
        end_to_end=workload,
        params=params.finetuning,
        quantizer_init=params.quantizer_init,
        runtime=params.runtime,
    )


def plan(model, stage, monkeypatch):
    """Plan a row of the benchmark: 8 windows of 512, and 4 of each of two corpora to evaluate on."""
    params = read_settings({"runtime.max_memory": "999GiB"})  # not what happens to be free
    plain, quantized = make_shape(model), make_shape(model, True)
    if stage == "rotation":
        return plan_rotation(plain, params.rotation, True)
    if stage == "prefix_search":
        return plan_prefix_search(plain, make_workload(8), params.prefix_search)
    if stage == "quantizer_init":
        return plan_quantizer_init(plain, make_workload(8), params.quantizer_init)
    if stage.startswith("evaluation"):
        original = stage.endswith("original")
        variant = plain if original else quantized
        return plan_evaluation(variant, make_workload(4, 4), compared=not original, in_memory=False, task_items=0)
    if stage.endswith("block by block"):
        return finetune(plain, params)
    for name in ("memory_limit", "fits"):  # nothing fits: blocks are streamed
        monkeypatch.setattr(finetuning_plan, name, lambda *_: 0)
    return finetune(plain, read_settings(END_TO_END))


def test_every_stage_has_a_measured_row():
    assert len(MEASURED) == 16
    assert {row[0] for row in MEASURED} == set(DENSE)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row[0]} {row[1]}")
def test_plans_are_within_a_fifth_of_measured_memory(row, monkeypatch):
    model, stage, *figures = row
    memory, planned_memory, gpu, planned_gpu = map(float, figures)
    need = plan(model, stage, monkeypatch)
    assert need.stream == stage.endswith("streamed")
    assert need.memory / GIB == pytest.approx(planned_memory, abs=0.03)
    assert need.gpu / GIB == pytest.approx(planned_gpu, abs=0.03)
    assert need.memory / GIB == pytest.approx(memory, rel=0.2)
    assert need.gpu / GIB == pytest.approx(gpu, rel=0.2)


def test_the_host_of_a_gpu_holds_the_larger_of_next_block_and_passing_tensors():
    sizes = {"compute": 7.0, "hidden_states": 3.0, "next_block": 5.0}
    process = RESIDENT * GIB + KERNELS
    assert make_need(on_gpu=False, through_host=9.0, **sizes).memory == process + 3 + 7
    for through_host, largest in ((9.0, 9), (4.0, 5)):
        need = make_need(on_gpu=True, through_host=through_host, **sizes)
        assert need.memory == process + CUDA_ON_HOST + 3 + largest
        assert need.gpu == 7 + 5


def test_a_phase_without_a_next_block_counts_alone():
    need = make_need(on_gpu=True, compute=7.0, compute_alone=13.0, next_block=5.0)
    assert need.gpu == 13
    assert make_need(on_gpu=False, compute=7.0, compute_alone=13.0).memory == RESIDENT * GIB + KERNELS + 13


def test_a_single_block_has_no_next_block():
    assert Sizes.of(make_shape("llama-3-70b")).next_block == 0
    sizes = Sizes.of(make_shape("llama-2-7b"))
    assert sizes.next_block == sizes.weights * 2


def test_a_workload_is_the_largest_part_of_each_text():
    runtime = read_settings({"runtime.processes": 4, "runtime.batch_size": 2}).runtime
    workload = Workload.of([9, 1], 100, runtime, False)
    assert (workload.tokens, workload.all_tokens, workload.batch) == ((3 + 1) * 100, 1000, 200)
    assert Workload.of([1], 100, runtime, False).batch == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [True, False])
def test_scoring_on_a_cpu_needs_lm_head_and_its_logits(quantized, dtype):
    """The vocabulary's tables are larger than a block: nothing that only a GPU fetches may be subtracted."""
    model = make_shape("llama-2-7b", quantized, dtype, vocab_size=256_000)
    sizes = Sizes.of(model)
    workload = make_workload(4, on_gpu=False)
    need = plan_evaluation(model, workload, compared=False, in_memory=False, task_items=0)
    scoring = sizes.table + PERPLEXITY_LOGITS * LOGIT_POSITIONS * 256_000 * 4
    assert need.memory >= RESIDENT * GIB + KERNELS + need.hidden_states + scoring


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_plan_counts_tables_on_a_gpus_host(dtype, monkeypatch):
    model, quantized = (make_shape("llama-2-7b", kind, dtype, vocab_size=256_000) for kind in (False, True))
    table = Sizes.of(model).table
    params = read_settings({"prefix_training.enabled": True, "runtime.max_memory": "400GiB"})
    for module in (need_module, finetuning_plan, prefix_training_plan):
        monkeypatch.setattr(module, "fits", lambda *_: True)
    workload = make_workload(8)
    needs = [
        plan_prefix_search(model, workload, params.prefix_search),
        plan_quantizer_init(model, workload, params.quantizer_init),
        plan_evaluation(quantized, make_workload(4, 4), compared=True, in_memory=False, task_items=0),
        finetune(model, params, windows=(8,)),
        plan_prefix_training(model, workload, params.prefix_training, params.runtime),
    ]
    for need in needs:
        assert need.memory >= table + need.hidden_states


def find_ways(make_plan, monkeypatch):
    """Return (recompute, stream, offload) of plans as memory shrinks from 400 GiB to less than a process has."""
    ways = []
    for gib in [400 * 0.85**step for step in range(45)]:
        for module in (need_module, finetuning_plan):
            monkeypatch.setattr(module, "memory_limit", lambda runtime, gib=gib: gib * GIB)
        need = make_plan()
        ways.append((need.recompute, need.stream, need.offload))
    return list(dict.fromkeys(ways))


@pytest.mark.parametrize("offload", ["auto", "always", "never"])
def test_finetuning_takes_the_fastest_way_that_fits(offload, monkeypatch):
    params = read_settings(END_TO_END | {"runtime.offload": offload})
    model = make_shape("llama-2-7b")
    ways = find_ways(lambda: finetune(model, params, on_gpu=False), monkeypatch)
    keep, recompute, stream = (False, False), (True, False), (True, True)
    tried = [recompute, stream] if offload == "always" else [keep, recompute, stream]
    assert list(dict.fromkeys(way[:2] for way in ways)) == tried
    assert ways[0] == (*tried[0], offload == "always")
    assert ways[-1] == (*stream, offload != "never")


def test_prefix_training_takes_the_fastest_way_that_fits(monkeypatch):
    params = read_settings({"prefix_training.enabled": True})
    model, workload = make_shape("llama-2-7b", num_hidden_layers=32), make_workload(8, on_gpu=False)
    ways = find_ways(lambda: plan_prefix_training(model, workload, params.prefix_training, params.runtime), monkeypatch)
    assert ways == [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]


def test_gate_and_search_count_windows_beyond_the_sliding_window(monkeypatch):
    params, workload = read_settings(), make_workload(8, on_gpu=False)
    model = make_shape("llama-2-7b", max_position_embeddings=32768)
    hidden_states = {}
    for window in (None, 512, 16384):
        model.widest_window = window
        gate = plan_prefix_training(model, workload, params.prefix_training, params.runtime)
        assert gate.memory > RESIDENT * GIB + Sizes.of(model).block
        search = plan_prefix_search(model, workload, params.prefix_search)
        hidden_states[window] = gate.hidden_states, search.hidden_states
    token = Sizes.of(model).hidden_states(1)
    assert hidden_states[None] == hidden_states[512] == (2 * 2048 * token, 7 * 8 * 512 * token)
    assert hidden_states[16384] == (2 * 16896 * token, 7 * 16896 * token)  # one window: 16,384 + 512


def test_blocks_by_themselves_are_never_recomputed(monkeypatch):
    params = read_settings()
    model = make_shape("llama-2-7b")
    ways = find_ways(lambda: finetune(model, params, on_gpu=False), monkeypatch)
    assert ways == [(False, False, False), (False, False, True)]


def test_offloaded_hidden_states_move_from_memory_to_disk(monkeypatch):
    model, target = make_shape("llama-2-7b"), {"finetuning.blocks.target": "fp_input"}
    in_memory, in_files = (
        finetune(model, read_settings(target | {"runtime.offload": mode})) for mode in ("never", "always")
    )
    assert in_files.work_files - in_memory.work_files == in_memory.hidden_states
    mapped = in_memory.hidden_states / 4  # one of two streams, half of it
    assert in_memory.memory - in_files.memory == pytest.approx(in_memory.hidden_states - mapped)


def test_a_description_names_every_quantity():
    need = Need(GIB, 2 * GIB, 0.5 * GIB, 3 * GIB, 4 * GIB, offload=True, recompute=True, stream=True)
    assert need.describe().splitlines() == [
        "memory 1.00 GiB, GPU 2.00 GiB, disk 7.00 GiB "
        "(hidden states, 0.50 GiB, in files; activations are computed again, blocks are streamed)",
        "Disk counts the artifact (3.00 GiB) and work files that are removed at the end (4.00 GiB).",
        "It does not count reports, plots (a few MiB) and the artifact of an earlier run, which is replaced.",
    ]

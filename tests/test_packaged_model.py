"""Exactness on the packaged model, SmolLM2-135M-Instruct."""

import json
import os
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import block_settings
from pipeline.blocks.walk import BlockRunner
from pipeline.evaluation.harness import run_tasks
from pipeline.evaluation.params import TaskParams
from pipeline.evaluation.task_data import open_tasks
from pipeline.importing.import_model import import_model
from pipeline.importing.params import PACKAGED_MODEL
from pipeline.inference.prefixed_model import assemble_model
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.quantizer_init import init_quantizers
from pipeline.runtime.artifacts import make_header
from pipeline.text.start_token import choose_start_token
from tests.blocks.test_walk import assert_close, walked_logits
from tests.conftest import ROOT, init_params
from tests.evaluation.test_harness import write_task
from tests.rotation.test_merging import rotate

pytestmark = pytest.mark.slow
# piqa/ and hellaswag/ as their authors publish them; what needs them is skipped without.
DATA = Path(os.environ.get("TASK_DATA", ROOT.parent / "shared" / "data"))
TEXT = (
    "The bridge was built in three summers, and in the fourth the river moved. Nobody in the town had asked the "
    "river. The engineers came back with their maps, measured the empty bed under the arches, and wrote a report."
)
PREFIX = torch.tensor([260, 216, 1])  # " the", " ", <|im_start|>


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packaged") / "model"
    assert import_model(PACKAGED_MODEL, None, torch.float32, folder) == {
        "parameters": 134515008,
        "blocks": 30,
        "tied_embeddings": True,
    }
    return folder


@pytest.fixture(scope="module")
def original(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def rotated(folder, tmp_path_factory):
    return rotate(folder, tmp_path_factory.mktemp("rotated") / "rotation")


@pytest.fixture(scope="module")
def token_ids(folder):
    return AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids


@torch.no_grad()
def test_the_text_is_predicted_well_so_the_config_was_read_right(original, token_ids):
    loss = original(token_ids, labels=token_ids).loss
    assert 50 < loss.exp() < 100  # measured: 76; an untrained model would have 49152


def test_walk_and_prefix_equal_the_models_forward(folder, original, token_ids):
    checkpoint = Checkpoint(folder, "model")
    runner = BlockRunner(checkpoint, torch.device("cpu"), 4)
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(PREFIX), runner)
    with torch.no_grad():
        plain = original(token_ids).logits
        prefixed = original(torch.cat((PREFIX[None], token_ids), dim=1)).logits[:, 3:]
    assert_close(walked_logits(checkpoint, runner, token_ids), plain, 1e-4)  # measured: 0
    assert_close(walked_logits(checkpoint, runner, token_ids, prefix_kv), prefixed, 1e-4)  # measured: 2e-6
    assert choose_start_token(checkpoint)[0] == 1


def test_rotated_with_and_without_prefix_equals_the_original(original, rotated, token_ids):
    checkpoint, runner, metrics = rotated
    with torch.no_grad():
        plain = original(token_ids).logits
        prefixed = original(torch.cat((PREFIX[None], token_ids), dim=1)).logits[:, 3:]
    assert_close(walked_logits(checkpoint, runner, token_ids), plain, 1e-4)  # measured: 4e-6
    prefix_kv = compute_prefix_kv(checkpoint, checkpoint.embed(PREFIX), runner)
    assert_close(walked_logits(checkpoint, runner, token_ids, prefix_kv), prefixed, 1e-4)
    assert metrics["max_logit_deviation"] < 1e-4


def test_sixteen_bits_everywhere_is_the_original(folder, original, rotated, token_ids, tmp_path):
    checkpoint, runner, _ = rotated
    off = {f"{group}.bits": 16 for group in ("weights", "activations", "keys", "values")}
    init = init_params(off | {"embedding_dtype": "float32"})
    init_quantizers(
        checkpoint,
        tmp_path / "out",
        params=init,
        prefix_token_ids=torch.tensor([], dtype=torch.int64),
        prefix_embeddings=torch.zeros(0, 576),
        token_ids=token_ids,
        runner=runner,
        work_folder=tmp_path / "work",
        header=make_header("quantizer_init", {}),
    )
    quantized = Checkpoint(tmp_path / "out", "quantizer_init")
    assert block_settings(quantized, 0).online_r4
    assert block_settings(quantized, 0).online_r5
    with torch.no_grad():
        expected = original(token_ids).logits
    assert_close(walked_logits(quantized, BlockRunner(quantized, torch.device("cpu"), 4), token_ids), expected, 1e-4)


def test_both_packaged_tasks_are_clearly_above_chance(original, folder):
    tasks = open_tasks({name: TaskParams(limit=24) for name in ("word_analogies", "last_word_wikipedia")})
    found = run_tasks(original, AutoTokenizer.from_pretrained(folder), tasks, 8)["tasks"]
    assert found["word_analogies"]["acc"] > 0.55  # measured 0.81 on 64 items; chance 0.25
    assert found["last_word_wikipedia"]["acc"] > 0.2  # measured 0.46 on 48; chance 0


BENCHMARKS = {
    "piqa_local": ("piqa/valid.jsonl", "Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}"),
    "hellaswag_local": ("hellaswag/val_first1000.jsonl", "{{query_lmeval_style}}", "endings"),
}


@pytest.mark.skipif(not (DATA / "piqa").is_dir(), reason="needs local copies of PIQA and HellaSwag")
def test_real_benchmarks_score_the_same_as_with_lm_evals_own_class(original, folder, tmp_path):
    labels = (DATA / "piqa/valid-labels.lst").read_text().split()
    for name, (source, text, choice) in BENCHMARKS.items():
        rows = [json.loads(line) for line in (DATA / source).read_text().splitlines()[:20]]
        for row, label in zip(rows, labels, strict=False):
            row.setdefault("label", int(label))
        write_task(tmp_path, name, rows, text, choice)
    tasks = open_tasks({name: TaskParams() for name in BENCHMARKS}, str(tmp_path))
    checkpoint = Checkpoint(folder, "model")
    found = run_tasks(assemble_model(checkpoint), checkpoint.tokenizer, tasks, 4)["tasks"]
    theirs = HFLM(original, tokenizer=checkpoint.tokenizer, batch_size=4)
    expected = lm_eval.simple_evaluate(
        theirs, tasks=list(BENCHMARKS), task_manager=tasks.manager, bootstrap_iters=0, log_samples=False
    )["results"]
    for name in BENCHMARKS:
        assert found[name] == {metric: round(expected[name][f"{metric},none"], 4) for metric in ("acc", "acc_norm")}

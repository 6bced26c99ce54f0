"""Tasks: the original scores as in lm-eval, and a model with a prefix scores as the original that reads the prefix."""

import json
import subprocess
import sys

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pipeline.evaluation.harness import COMMONSENSE, PrefixedLM, run_tasks
from pipeline.evaluation.params import TaskParams
from pipeline.evaluation.task_data import Tasks, open_tasks
from pipeline.inference.prefixed_model import assemble_model
from pipeline.runtime.errors import PipelineError
from tests.conftest import ROOT, make_model, open_model
from tests.export.test_folder import make_export
from tests.inference.test_prefixed_model import PREFIX, prefixed, reference_greedy, reference_logits

pytestmark = pytest.mark.usefixtures("lm_eval_read_once")
TEXT = "The house had stood empty for years before anyone came to look at it."


def write_task(folder, name, rows, text, choices, **more):
    """Write a YAML task of multiple choice over rows of a local file, as a user would write it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": "label",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | more))


def local_task(folder, name, items=12):
    """Write a task whose right answers are choice 0 and choice 1 in turn."""
    choices = [[f" item {i}", " green"] for i in range(items)]
    rows = [{"question": f"{TEXT[i:]} Is it", "choices": pair, "label": i % 2} for i, pair in enumerate(choices)]
    write_task(folder, name, rows, "{{question}}", "choices", target_delimiter="")


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def ask(lm, kind, *rows):
    return getattr(lm, kind)([request(kind, *row) for row in rows], disable_tqdm=True)


def test_the_original_scores_as_in_lm_eval(imported, tmp_path, monkeypatch, capfd):
    checkpoint, _ = open_model(imported["llama_tied"])
    tokenizer = checkpoint.tokenizer
    prefixed_lm = PrefixedLM(pretrained=assemble_model(checkpoint), tokenizer=tokenizer, batch_size=3)
    hf_lm = HFLM(make_model("llama_tied"), tokenizer=tokenizer, batch_size=2)
    rows = [("The house", " had stood"), ("", TEXT), (TEXT, " empty")]
    expected = ask(hf_lm, "loglikelihood", *rows)
    for answer, reference in zip(ask(prefixed_lm, "loglikelihood", *rows), expected, strict=True):
        assert answer[0] == pytest.approx(reference[0], rel=1e-4)
        assert answer[1] == reference[1]
    (rolled,), (reference,) = (ask(lm, "loglikelihood_rolling", (TEXT * 12,)) for lm in (prefixed_lm, hf_lm))
    assert rolled == pytest.approx(reference, rel=1e-4)
    until = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    assert ask(prefixed_lm, "generate_until", (TEXT, until)) == ask(hf_lm, "generate_until", (TEXT, until))
    local_task(tmp_path, "colours")
    tasks = open_tasks({"colours": TaskParams(limit=9)}, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    metrics = run_tasks(assemble_model(checkpoint), tokenizer, tasks, 4)
    assert "not a git repository" not in capfd.readouterr().err
    results = lm_eval.simple_evaluate(
        hf_lm, tasks=["colours"], limit=9, task_manager=tasks.manager, bootstrap_iters=0, log_samples=False
    )["results"]["colours"]
    assert metrics["tasks"]["colours"] == {m: round(results[f"{m},none"], 4) for m in ("acc", "acc_norm")}
    assert metrics["task_items"] == {"colours": 9}
    assert "tasks_skipped" not in metrics


@pytest.mark.parametrize("continuous", [False, True])
def test_a_prefixed_model_answers_as_the_original_reading_the_prefix(imported, continuous):
    model, original, embeddings = prefixed(imported, continuous=continuous)
    tokenizer = open_model(imported["llama_tied"])[0].tokenizer
    lm = PrefixedLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    assert lm.max_length == 256 - len(PREFIX)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731

    def score(context, continuation):
        log_p = reference_logits(original, embeddings, context + continuation).log_softmax(-1)[len(context) - 1 : -1]
        return log_p.gather(1, torch.tensor(continuation).unsqueeze(1)).sum().item()

    rows = [("The house", " had stood"), (TEXT, " empty"), ("", TEXT)]
    scores = [answer[0] for answer in ask(lm, "loglikelihood", *rows)]
    newline = encode("\n")[-1:]
    expected = [score(encode(a) or newline, encode(b)) for a, b in rows]
    assert scores == pytest.approx(expected, rel=1e-4)
    (rolled,) = ask(lm, "loglikelihood_rolling", (TEXT,))
    assert rolled == pytest.approx(score(newline, encode(TEXT)), rel=1e-4)
    until = {"until": ["</s>"], "max_gen_toks": 5, "do_sample": False}
    texts = ask(lm, "generate_until", (TEXT, until), ("The house", until))
    for text, prompt in zip(texts, (TEXT, "The house"), strict=True):
        ids = reference_greedy(original, embeddings, encode(prompt), 5)
        assert text == tokenizer.decode(ids[len(encode(prompt)) :])


def test_lm_evals_class_answers_the_same_from_an_exported_folder(imported, tmp_path):
    """Use `--model hf --model_args pretrained=FOLDER`, after `pipeline.hf` is imported."""
    folder, _, _ = make_export(imported, tmp_path)
    local_task(tmp_path, "local")
    manager = open_tasks({"local": TaskParams()}, str(tmp_path)).manager
    outcomes = []
    for lm in (PrefixedLM(path=str(folder), batch_size=2), HFLM(pretrained=str(folder), batch_size=2, device="cpu")):
        results = lm_eval.simple_evaluate(model=lm, tasks=["local"], task_manager=manager, bootstrap_iters=0)
        answers = [sample["filtered_resps"] for sample in results["samples"]["local"]]
        outcomes.append(
            (results["results"]["local"]["acc,none"], results["results"]["local"]["acc_norm,none"], answers)
        )
    assert outcomes[0] == outcomes[1]


def test_no_second_start_token_reaches_the_model(imported):
    model, _, _ = prefixed(imported)
    tokenizer = open_model(imported["llama_tied"])[0].tokenizer
    batches = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: batches.append(args[0]))
    lm = PrefixedLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    ask(lm, "loglikelihood", ("<s>The house", " had"), ("", "<s>The house"))
    ask(lm, "generate_until", ("<s>The house", {"until": ["\n"], "max_gen_toks": 2}))
    assert len(batches) >= 3
    assert not any((ids == 0).any() for ids in batches)
    assert PrefixedLM(pretrained=make_model("llama_tied"), tokenizer=tokenizer).prefix_token_id == 0


@pytest.mark.parametrize("prefix", [[], [7, 9]])
def test_texts_begin_with_the_start_token_if_windows_did(imported, tmp_path, prefix):
    """The prefix does not end in the start token, so every request begins with exactly one."""
    folder, evaluated, _ = make_export(imported, tmp_path, prefix=prefix, start_token=0)
    lm = PrefixedLM(path=str(folder), batch_size=2)
    assert lm.max_length == 256 - len(prefix)
    encode = lambda text: lm.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731

    @torch.no_grad()
    def score(context, continuation):
        log_p = evaluated(torch.tensor([[0, *context, *continuation]])).logits[0].log_softmax(-1)
        part = log_p[len(context) : -1]
        return part.gather(1, torch.tensor(continuation).unsqueeze(1)).sum().item()

    rows = [("The house", " had stood"), (TEXT, " empty"), ("", TEXT), ("<s>The house", " had stood")]
    scores = [answer[0] for answer in ask(lm, "loglikelihood", *rows)]
    expected = [score(encode(a.removeprefix("<s>")), encode(b)) for a, b in rows]
    assert scores == pytest.approx(expected, rel=1e-4)
    until = {"until": ["</s>"], "max_gen_toks": 5, "do_sample": False}
    texts = ask(lm, "generate_until", (TEXT, until), ("The house", until))
    for text, prompt in zip(texts, (TEXT, "The house"), strict=True):
        ids = torch.tensor([[0, *encode(prompt)]])
        output = evaluated.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)
        assert text == lm.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    # lm-eval's class does the same from the folder.
    hf_lm = HFLM(pretrained=str(folder), batch_size=2, device="cpu")
    assert [answer[0] for answer in ask(hf_lm, "loglikelihood", *rows)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "shots", "message"),
    [
        ({}, 10**6, "lm-eval, task colours: Sample larger than population"),
        ({"output_type": "loglikelihood_rolling"}, None, r"a task gives 0 \(int\) where text is expected"),
        ({"output_type": "generate_until"}, None, r"lm-eval, task colours: .*requested max tokens to generate \(256\)"),
        ({"metric_list": [{"metric": "brier_score"}]}, None, "task colours: none of its metrics is one of acc,"),
    ],
)
def test_a_task_that_cannot_be_asked_gives_one_message(change, shots, message, imported, tmp_path):
    model, _, _ = prefixed(imported)
    local_task(tmp_path, "colours")
    task = yaml.safe_load((tmp_path / "colours.yaml").read_text()) | change
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task))
    tasks = open_tasks({"colours": TaskParams(num_fewshot=shots, limit=2)}, str(tmp_path))
    with pytest.raises(PipelineError, match=message):
        run_tasks(model, open_model(imported["llama_tied"])[0].tokenizer, tasks, 2)


def test_an_error_of_the_model_is_not_blamed_on_lm_eval(imported, tmp_path, monkeypatch):
    model, _, _ = prefixed(imported)
    local_task(tmp_path, "colours")
    monkeypatch.setattr(model, "make_cache", lambda *args: 1 / 0)
    tokenizer = open_model(imported["llama_tied"])[0].tokenizer
    with pytest.raises(ZeroDivisionError):
        run_tasks(model, tokenizer, open_tasks({"colours": TaskParams(limit=2)}, str(tmp_path)), 2)


def test_the_average_covers_exactly_the_five_commonsense_tasks(imported, tmp_path, monkeypatch):
    from pipeline.evaluation import harness

    scores = {name: {"acc,none": 0.1 * n, "acc_norm,none": 0.5, "alias": name} for n, name in enumerate(COMMONSENSE)}
    del scores["winogrande"]["acc_norm,none"]
    scores |= {"other": {"acc,none": 1.0, "acc_stderr,none": 0.1}}
    count = {"any": {"effective": 7}}
    monkeypatch.setattr(
        harness.lm_eval,
        "simple_evaluate",
        lambda tasks, **_: {"results": {tasks[0]: scores[tasks[0]]}, "n-samples": count},
    )
    checkpoint, _ = open_model(imported["llama_tied"])
    model = assemble_model(checkpoint)

    def run(names):
        tasks = Tasks({name: TaskParams() for name in names}, None, ["gone"])
        return run_tasks(model, checkpoint.tokenizer, tasks, 1)

    metrics = run([*COMMONSENSE, "other"])
    assert metrics["average"] == {"acc": 0.2, "acc_norm": pytest.approx((0.5 * 4 + 0.4) / 5)}
    assert metrics["tasks"]["other"] == {"acc": 1.0}
    assert metrics["task_items"]["piqa"] == 7
    assert metrics["tasks_skipped"] == ["gone"]
    assert "average" not in run([*COMMONSENSE[:4], "other"])


def test_lm_evals_command_line_knows_the_tasks_of_this_project():
    listed = subprocess.run(
        [sys.executable, "-m", "pipeline.lm_eval_tasks", "validate", "--tasks", "word_analogies"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0, listed.stderr[-2000:]
    assert "word_analogies" in listed.stdout + listed.stderr


def test_a_tokenizer_without_special_tokens_is_refused(imported, tmp_path):
    checkpoint, _ = open_model(imported["llama_tied"])
    tokenizer = checkpoint.tokenizer
    tokenizer.eos_token = None
    generation = {"until": ["\n"], "max_gen_toks": 2}
    lm = PrefixedLM(pretrained=assemble_model(checkpoint), tokenizer=tokenizer)
    assert len(ask(lm, "loglikelihood", ("The house", " had stood"))) == 1
    with pytest.raises(PipelineError, match=r"eos_token=null in .* tasks that generate text need an end token"):
        ask(lm, "generate_until", ("The house", generation))
    tokenizer.bos_token = None
    with pytest.raises(PipelineError, match=r"bos_token=null and eos_token=null in .*: lm-eval needs one of the two"):
        PrefixedLM(pretrained=assemble_model(checkpoint), tokenizer=tokenizer)

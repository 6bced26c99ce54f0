"""Tasks: lm-eval's own numbers for the original, ours for models with a prefix, clear words for what cannot be had."""

import json
import subprocess
import sys
from itertools import islice

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pipeline.evaluation.harness import COMMONSENSE, PrefixedLM, run_tasks
from pipeline.evaluation.packaged_tasks import find_passages, load_last_words, load_word_analogies
from pipeline.evaluation.params import EvaluationParams, TaskParams
from pipeline.evaluation.task_data import TaskError, Tasks, check_task_tokenizer, open_tasks
from pipeline.inference.prefixed_model import assemble_model
from pipeline.params import parse_params
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.params import ParamsError
from pipeline.text.corpora import fetch_corpus, read_documents, read_packaged_split
from tests.conftest import ROOT, make_model, open_model
from tests.export.test_folder import make_export
from tests.inference.test_prefixed_model import PREFIX, prefixed, reference_greedy, reference_logits

pytestmark = pytest.mark.usefixtures("lm_eval_read_once")
TEXT = "The house had stood empty for years before anyone came to look at it."


def write_task(folder, name, rows, text, choices, **more):
    """A YAML task of multiple choice over rows of a local file, as a user would write it."""
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
    """A task of its own: 0 and 1 are answers in turn."""
    choices = [[f" item {i}", " green"] for i in range(items)]
    rows = [{"question": f"{TEXT[i:]} Is it", "choices": own, "label": i % 2} for i, own in enumerate(choices)]
    write_task(folder, name, rows, "{{question}}", "choices", target_delimiter="")


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def ask(lm, kind, *rows):
    return getattr(lm, kind)([request(kind, *row) for row in rows], disable_tqdm=True)


def test_a_task_folder_below_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    local_task(tmp_path / "tasks", "colours")
    assert list(open_tasks({"colours": TaskParams(limit=2)}, "~/tasks").asked) == ["colours"]


def test_the_original_scores_what_lm_evals_own_class_scores(imported, tmp_path):
    checkpoint, _ = open_model(imported["llama_tied"])
    tokenizer = checkpoint.tokenizer
    ours = PrefixedLM(pretrained=assemble_model(checkpoint), tokenizer=tokenizer, batch_size=3)
    theirs = HFLM(make_model("llama_tied"), tokenizer=tokenizer, batch_size=2)
    rows = [("The house", " had stood"), ("", TEXT), (TEXT, " empty")]
    expected = ask(theirs, "loglikelihood", *rows)
    for found, reference in zip(ask(ours, "loglikelihood", *rows), expected, strict=True):
        assert found[0] == pytest.approx(reference[0], rel=1e-4)
        assert found[1] == reference[1]
    (rolled,), (reference,) = (ask(lm, "loglikelihood_rolling", (TEXT * 12,)) for lm in (ours, theirs))
    assert rolled == pytest.approx(reference, rel=1e-4)
    until = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    assert ask(ours, "generate_until", (TEXT, until)) == ask(theirs, "generate_until", (TEXT, until))
    local_task(tmp_path, "colours")
    tasks = open_tasks({"colours": TaskParams(limit=9)}, str(tmp_path))
    found = run_tasks(assemble_model(checkpoint), tokenizer, tasks, 4)
    results = lm_eval.simple_evaluate(
        theirs, tasks=["colours"], limit=9, task_manager=tasks.manager, bootstrap_iters=0, log_samples=False
    )["results"]["colours"]
    assert found["tasks"]["colours"] == {m: round(results[f"{m},none"], 4) for m in ("acc", "acc_norm")}
    assert found["task_items"] == {"colours": 9}
    assert "tasks_skipped" not in found


@pytest.mark.parametrize("continuous", [False, True])
def test_behind_a_prefix_requests_are_answered_as_the_original_reading_the_prefix(imported, continuous):
    model, original, embeddings = prefixed(imported, continuous=continuous)
    tokenizer = open_model(imported["llama_tied"])[0].tokenizer
    lm = PrefixedLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    assert lm.max_length == 256 - len(PREFIX)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731

    def score(context, continuation):
        log_p = reference_logits(original, embeddings, context + continuation).log_softmax(-1)[len(context) - 1 : -1]
        return log_p.gather(1, torch.tensor(continuation).unsqueeze(1)).sum().item()

    rows = [("The house", " had stood"), (TEXT, " empty"), ("", TEXT)]
    found = [answer[0] for answer in ask(lm, "loglikelihood", *rows)]
    newline = encode("\n")[-1:]
    expected = [score(encode(a) or newline, encode(b)) for a, b in rows]
    assert found == pytest.approx(expected, rel=1e-4)
    (rolled,) = ask(lm, "loglikelihood_rolling", (TEXT,))
    assert rolled == pytest.approx(score(newline, encode(TEXT)), rel=1e-4)
    until = {"until": ["</s>"], "max_gen_toks": 5, "do_sample": False}
    texts = ask(lm, "generate_until", (TEXT, until), ("The house", until))
    for text, prompt in zip(texts, (TEXT, "The house"), strict=True):
        ids = reference_greedy(original, embeddings, encode(prompt), 5)
        assert text == tokenizer.decode(ids[len(encode(prompt)) :])


def test_lm_evals_own_class_answers_the_same_from_an_exported_folder(imported, tmp_path):
    """`--model hf --model_args pretrained=FOLDER`, once `pipeline.hf` is imported."""
    folder, _, _ = make_export(imported, tmp_path)
    local_task(tmp_path, "local")
    manager = open_tasks({"local": TaskParams()}, str(tmp_path)).manager
    found = []
    for lm in (PrefixedLM(path=str(folder), batch_size=2), HFLM(pretrained=str(folder), batch_size=2, device="cpu")):
        results = lm_eval.simple_evaluate(model=lm, tasks=["local"], task_manager=manager, bootstrap_iters=0)
        answers = [sample["filtered_resps"] for sample in results["samples"]["local"]]
        found.append((results["results"]["local"]["acc,none"], results["results"]["local"]["acc_norm,none"], answers))
    assert found[0] == found[1]


def test_no_second_start_token_reaches_the_model(imported):
    model, _, _ = prefixed(imported)
    tokenizer = open_model(imported["llama_tied"])[0].tokenizer
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    lm = PrefixedLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    ask(lm, "loglikelihood", ("<s>The house", " had"), ("", "<s>The house"))
    ask(lm, "generate_until", ("<s>The house", {"until": ["\n"], "max_gen_toks": 2}))
    assert len(seen) >= 3
    assert not any((ids == 0).any() for ids in seen)
    assert PrefixedLM(pretrained=make_model("llama_tied"), tokenizer=tokenizer).prefix_token_id == 0


@pytest.mark.parametrize("prefix", [[], [7, 9]])
def test_texts_begin_with_the_start_token_where_windows_did(imported, tmp_path, prefix):
    """An exported folder with no start token in its prefix: every request is read behind one, and behind one only."""
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
    found = [answer[0] for answer in ask(lm, "loglikelihood", *rows)]
    expected = [score(encode(a.removeprefix("<s>")), encode(b)) for a, b in rows]
    assert found == pytest.approx(expected, rel=1e-4)
    until = {"until": ["</s>"], "max_gen_toks": 5, "do_sample": False}
    texts = ask(lm, "generate_until", (TEXT, until), ("The house", until))
    for text, prompt in zip(texts, (TEXT, "The house"), strict=True):
        ids = torch.tensor([[0, *encode(prompt)]])
        output = evaluated.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)
        assert text == lm.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    # lm-eval's own class does the same from the folder.
    theirs = HFLM(pretrained=str(folder), batch_size=2, device="cpu")
    assert [answer[0] for answer in ask(theirs, "loglikelihood", *rows)] == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_had_is_named_before_the_work_or_skipped(tmp_path):
    local_task(tmp_path, "colours")
    local_task(tmp_path, "gone")
    (tmp_path / "gone.jsonl").unlink()
    asked = {name: TaskParams() for name in ("colours", "gone", "hellaswagg")}
    with pytest.raises(
        TaskError, match=r"(?s)evaluation.tasks.gone: .*evaluation.tasks.hellaswagg: .*hellaswag"
    ) as error:
        open_tasks(asked, str(tmp_path))
    assert "colours" not in str(error.value)
    tasks = open_tasks(asked, str(tmp_path), skip_unavailable=True)
    assert list(tasks.asked) == ["colours"]
    assert tasks.skipped == ["gone", "hellaswagg"]
    with pytest.raises(TaskError, match="there is no such folder"):
        open_tasks(asked, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_to_text": "{{question."}, "evaluation.tasks.colours: expected name or number"),
        ({"doc_to_text": "{{nothing}}"}, "evaluation.tasks.colours: 'nothing' is undefined"),
        ({"doc_to_text": None, "dataset_kwargs": None}, "evaluation.tasks.colours: "),
        ({"output_type": "nonsense"}, "evaluation.tasks.colours: Got invalid output_type 'nonsense'"),
    ],
)
def test_a_task_that_is_written_wrongly_is_named_before_the_work(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without data files datasets looks for some below
    local_task(tmp_path, "colours")
    task = yaml.safe_load((tmp_path / "colours.yaml").read_text()) | change
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump({key: value for key, value in task.items() if value}))
    with pytest.raises(TaskError, match=message):
        open_tasks({"colours": TaskParams()}, str(tmp_path))


@pytest.mark.parametrize(
    ("change", "shots", "message"),
    [
        ({}, 10**6, "lm-eval, task colours: Sample larger than population"),
        ({"output_type": "loglikelihood_rolling"}, None, r"a task gives 0 \(int\) where text is expected"),
        ({"output_type": "generate_until"}, None, r"lm-eval, task colours: .*requested max tokens to generate \(256\)"),
        ({"metric_list": [{"metric": "brier_score"}]}, None, "task colours: none of its metrics is one of acc,"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_message(change, shots, message, imported, tmp_path):
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
    monkeypatch.setattr(model, "make_cache", lambda: 1 / 0)
    tokenizer = open_model(imported["llama_tied"])[0].tokenizer
    with pytest.raises(ZeroDivisionError):
        run_tasks(model, tokenizer, open_tasks({"colours": TaskParams(limit=2)}, str(tmp_path)), 2)


def test_the_average_is_of_the_five_commonsense_tasks_and_only_of_them(imported, tmp_path, monkeypatch):
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

    found = run([*COMMONSENSE, "other"])
    assert found["average"] == {"acc": 0.2, "acc_norm": pytest.approx((0.5 * 4 + 0.4) / 5)}
    assert found["tasks"]["other"] == {"acc": 1.0}
    assert found["task_items"]["piqa"] == 7
    assert found["tasks_skipped"] == ["gone"]
    assert "average" not in run([*COMMONSENSE[:4], "other"])


def test_packaged_items_are_fixed_held_out_and_well_formed(tmp_path):
    analogies = load_word_analogies()["test"]
    assert len(analogies) > 500
    for item in analogies:
        b = item["text"].split()[3]
        assert len(set(item["choices"])) == 4
        assert b not in item["choices"]
    first = analogies[0]
    assert (first["text"], first["choices"][first["label"]]) == ("Korea is to won as Canada is to", "dollar")
    assert load_word_analogies()["test"][:30] == analogies[:30]
    fetch_corpus("packaged:news", None, "text", tmp_path)
    assert list(read_packaged_split("packaged:news", "test")) == read_documents(tmp_path / "test.jsonl")
    passages = load_last_words()
    articles = " ".join(
        " ".join(text.split()) for text in islice(read_packaged_split("packaged:wikipedia", "test"), 11)
    )
    assert len(passages["test"]) >= 64
    for item in [*passages["test"], *passages["train"]]:
        assert item["word"] in item["context"]
        assert 39 <= len(item["context"].split()) < 90
        assert f"{item['context']} {item['word']}" in articles


def test_passages_of_a_hand_made_text():
    filler = " ".join(f"w{i}" for i in range(38))
    assert list(find_passages(f"{filler} garden. The garden.")) == [
        {"context": f"{filler} garden. The", "word": "garden"}
    ]
    assert not list(find_passages(f"{filler} house. The garden."))  # not used before
    assert not list(find_passages("The garden. The garden."))  # too short
    assert not list(find_passages(f"{filler} cat. A cat."))  # a word of three letters


def test_params_of_tasks():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    tasks = parse_params(params).evaluation.tasks
    assert {name: own.limit for name, own in tasks.items()} == {"word_analogies": 64, "last_word_wikipedia": 48}
    params["evaluation"]["tasks"]["piqa"] = {"limit": 0, "shots": 5}
    with pytest.raises(ParamsError, match=r"(?s)evaluation.tasks.piqa.limit.*evaluation.tasks.piqa.shots"):
        parse_params(params)


def test_the_command_line_is_lm_evals_with_our_tasks_in_it():
    listed = subprocess.run(
        [sys.executable, "-m", "pipeline.lm_eval_tasks", "validate", "--tasks", "word_analogies"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0, listed.stderr[-2000:]
    assert "word_analogies" in listed.stdout + listed.stderr


def test_a_tokenizer_without_special_tokens_is_refused_before_lm_eval_fails_on_it(imported, tmp_path):
    checkpoint, _ = open_model(imported["llama_tied"])
    tokenizer = checkpoint.tokenizer
    tokenizer.eos_token = None
    generation = {"until": ["\n"], "max_gen_toks": 2}
    lm = PrefixedLM(pretrained=assemble_model(checkpoint), tokenizer=tokenizer)
    assert len(ask(lm, "loglikelihood", ("The house", " had stood"))) == 1
    with pytest.raises(PipelineError, match="needs a tokenizer with an end token for tasks that generate"):
        ask(lm, "generate_until", ("The house", generation))
    tokenizer.bos_token = None
    with pytest.raises(PipelineError, match="needs a tokenizer with a start or end token, and this one has neither"):
        PrefixedLM(pretrained=assemble_model(checkpoint), tokenizer=tokenizer)
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["evaluation"]
    check_task_tokenizer(EvaluationParams.model_validate(values | {"tasks": {}}), tokenizer)
    with pytest.raises(TaskError, match=r"evaluation\.tasks: lm-eval needs a tokenizer with a start or end token"):
        check_task_tokenizer(EvaluationParams.model_validate(values | {"tasks": {"colours": {}}}), tokenizer)

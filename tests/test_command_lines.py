"""The commands that users type refuse impossible requests in one message, before any work."""

import json
import re
import runpy
import shutil
import sys

import lm_eval
import pytest
import torch
import yaml

from pipeline.blocks.kv_cache import PrefixCache
from pipeline.evaluation import harness, texts
from pipeline.evaluation.params import TaskParams
from pipeline.evaluation.task_data import open_tasks
from pipeline.evaluation.texts import main as evaluate
from pipeline.inference import generation
from pipeline.inference.generation import main as generate
from pipeline.inference.loading import load
from pipeline.runtime.errors import PipelineError, run_main
from tests.conftest import PROSE_FILE, write_params
from tests.evaluation.test_harness import local_task, write_task
from tests.export.test_folder import make_export

pytestmark = pytest.mark.usefixtures("lm_eval_read_once")
TEXT = PROSE_FILE


@pytest.fixture(scope="module")
def folder(imported, tmp_path_factory):
    return make_export(imported, tmp_path_factory.mktemp("commands"))[0]


def call(main, *arguments, monkeypatch):
    """Return None, or the message of the one error."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    code = None
    try:
        run_main(main)
    except SystemExit as end:
        code = end.code
    assert code is None or (code.startswith("error: ") and "\n" not in code)
    return code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--windows", 0), r"argument --windows: '0' is not a whole number from 1 to"),
        (("--length", 1), r"argument --length: '1' is not a whole number from 2 to"),
        (("--batch-size", 0), "argument --batch-size: '0'"),
        (("--limit", 0), "argument --limit: '0'"),
        (("--num-fewshot", -1), "argument --num-fewshot: '-1'"),
        (("--device", "cuda:99"), r"argument --device: 'cuda:99' cannot be used"),
        (
            ("--length", 254),
            "--length=254: with 3 tokens before each window this exceeds the 256 positions .* Use at most 253",
        ),
        (("--json", "/"), "/ cannot be written"),
        (("--windows", 10**6), r"needs 1000000 windows of 2048 = \d+ tokens|exceeds the 256 positions"),
        (("--arithmetic", "exact"), "argument --arithmetic: invalid choice"),
    ],
)
def test_evaluate_refuses(folder, arguments, message, monkeypatch):
    assert re.search(message, call(evaluate, folder, "--text", TEXT, *arguments, monkeypatch=monkeypatch))


def test_texts_of_one_name_have_results_of_their_own(folder, tmp_path, monkeypatch, capsys):
    other = tmp_path / "prose.txt"
    other.write_text(TEXT.read_text()[2000:], encoding="utf-8")
    arguments = ("--text", TEXT, "--text", other, "--length", 32, "--windows", 2)
    assert call(evaluate, folder, *arguments, monkeypatch=monkeypatch) is None
    found = json.loads(capsys.readouterr().out)["perplexity"]
    assert found.keys() == {str(TEXT), str(other)}
    assert found[str(TEXT)] != found[str(other)]


def test_conversations_are_evaluated_as_the_template_has_them(folder, tmp_path, monkeypatch, capsys):
    chat = [{"role": "user", "content": f"{text} "} for text in TEXT.read_text(encoding="utf-8").split("\n\n")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"text": chat}))
    (tmp_path / "same.txt").write_text("".join(f"[{message['content']}]" for message in chat))
    templated = shutil.copytree(folder, tmp_path / "templated")
    (templated / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    arguments = ("--text", tmp_path / "chat.jsonl", "--text", tmp_path / "same.txt", "--length", 32, "--windows", 3)
    assert call(evaluate, templated, *arguments, monkeypatch=monkeypatch) is None
    found = json.loads(capsys.readouterr().out)["perplexity"]
    assert found["chat.jsonl"] == found["same.txt"] > 1
    assert "has no chat template" in call(evaluate, folder, *arguments, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "the prompt is empty. Give some text to continue"),
        (("The house", "--max-new-tokens", 0), "argument --max-new-tokens: '0'"),
        (("The house", "--temperature", "nan"), "argument --temperature: 'nan' is not a number of 0 or more"),
        (("The house", "--seed", -1), "argument --seed: '-1'"),
        (("The house", "--max-new-tokens", 300), "and 300 new ones exceed the 256 positions of this model"),
        (("The house", "--chat"), "--chat: this model's tokenizer has no chat template. Leave it out"),
        (("\udcff",), "argument prompt: the text is not encoded in UTF-8"),
    ],
)
def test_generate_refuses(folder, arguments, message, monkeypatch):
    assert message in call(generate, folder, *arguments, monkeypatch=monkeypatch)


def test_a_temperature_that_would_overflow_takes_the_likeliest(folder, monkeypatch, capsys):
    said = []
    for temperature in (0, 1e-300):
        assert call(generate, folder, "The house", "--temperature", temperature, monkeypatch=monkeypatch) is None
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_lm_eval_continues_without_the_gpu_it_asks_for(folder, tmp_path, monkeypatch, caplog):
    """lm-eval's command line passes cuda:0 where nobody names a device."""
    assert harness.choose_device("cpu") == "cpu"
    assert harness.choose_device(None) is None
    local_task(tmp_path, "colours")
    results = tmp_path / "results"
    arguments = ["run", "--model", "prefixquant", "--model_args", f"pretrained={folder}", "--tasks", "colours"]
    arguments += ["--include_path", tmp_path, "--limit", 2, "--device", "cuda:99", "--output_path", results]
    assert call(harness.run_command_line, *arguments, monkeypatch=monkeypatch) is None
    assert "device=cuda:99 does not exist here, " in caplog.text
    assert list(results.rglob("*.json"))


def test_a_task_of_a_folder_gets_the_same_answers_in_stages_and_on_lm_evals_command_line(folder, tmp_path, monkeypatch):
    """Texts are generated after examples, as in gsm8k."""
    tasks, results = tmp_path / "tasks", tmp_path / "results"
    tasks.mkdir()
    rows = [{"question": f"The house {i}.", "label": str(i)} for i in range(6)]
    write_task(tasks, "sums", rows, "Question: {{question}}\nAnswer:", None)
    path = tasks / "sums.yaml"
    generation = {"until": ["Question:"], "do_sample": False, "max_gen_toks": 6}
    task = yaml.safe_load(path.read_text()) | {"output_type": "generate_until", "generation_kwargs": generation}
    del task["doc_to_choice"]
    task |= {"fewshot_split": "test", "num_fewshot": 2, "metric_list": [{"metric": "exact_match"}]}
    path.write_text(yaml.safe_dump(task))
    evaluate, samples = lm_eval.simple_evaluate, []

    def keep_samples(**options):
        outcome = evaluate(**options | {"log_samples": True})
        samples.extend(outcome["samples"]["sums"])
        return outcome

    monkeypatch.setattr(lm_eval, "simple_evaluate", keep_samples)
    opened = open_tasks({"sums": TaskParams(limit=4)}, str(tasks))
    metrics = harness.run_tasks(*load(folder), opened, batch_size=3)
    monkeypatch.undo()
    arguments = ["run", "--model", "prefixquant", "--model_args", f"path={folder}", "--tasks", "sums", "--limit", 4]
    arguments += ["--include_path", tasks, "--device", "cpu", "--output_path", results, "--log_samples"]
    assert call(harness.run_command_line, *arguments, monkeypatch=monkeypatch) is None
    (written,) = results.rglob("samples_sums_*.jsonl")
    others = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(samples) == len(others) == metrics["task_items"]["sums"] == 4
    for one, other in zip(samples, others, strict=True):
        assert one["arguments"][0][0] == other["arguments"]["gen_args_0"]["arg_0"]
        assert (one["resps"], one["exact_match"]) == (other["resps"], other["exact_match"])
    assert any(sample["resps"][0][0] for sample in samples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--model", "prefixquant", "--tasks", "word_analogies"),
            "no exported folder is given. Add --model_args path=",
        ),
        (("--model", "prefixquant", "--model_args", "path=nowhere", "--tasks", "word_analogies"), "no such folder"),
        (("--model", "prefixquant", "--tasks", "nothing"), "lm-eval: "),
        (("--tasks", "word_analogies", "--output_path", TEXT), "results.json cannot be written"),
    ],
)
def test_refusals_by_lm_eval_are_one_message(arguments, message, monkeypatch):
    assert message in call(harness.run_command_line, "run", *arguments, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("model_arguments", "more", "message"),
    [
        ("peft=adapter", (), "peft='adapter': not an argument of --model prefixquant. Leave it out."),
        ("foo=bar", (), "cannot be loaded"),
        ("max_length=254", (), "max_length=254: expected a whole number from 1 to 253, without the prefix"),
        ("dtype=float16", ("--apply_chat_template",), "--apply_chat_template: there is none"),
        ("dtype=float16", ("--batch_size", "x"), "batch_size='x': expected a whole number of at least 1, or auto"),
    ],
)
def test_arguments_that_an_exported_model_cannot_have_are_refused(
    folder, model_arguments, more, message, tmp_path, monkeypatch
):
    local_task(tmp_path, "colours")
    arguments = ["--model", "prefixquant", "--model_args", f"path={folder},{model_arguments}", "--tasks", "colours"]
    arguments += ["--include_path", tmp_path, "--limit", 2, *more]
    assert message in call(harness.run_command_line, "run", *arguments, monkeypatch=monkeypatch)


def forbid_loading(monkeypatch):
    """Let the test fail where a command reads weights."""
    for module in (texts, generation, harness):
        monkeypatch.setattr(module, "load", lambda *args, **options: pytest.fail("weights were loaded"))


EMPTY, BYTES, SHORT = "", b"\xff\xfe\x00 not UTF-8", "The house"
UNREADABLE = {
    "missing.txt": (None, "no such file or folder"),
    "empty.txt": (EMPTY, "has no text"),
    "bytes.txt": (BYTES, r"bytes\.txt"),
    "text.pdf": (SHORT, "nothing to read. Allowed are files ending in"),
    "rows.jsonl": ('{"body": "The house"}', "text"),
    "short.txt": (SHORT, "needs 1 windows of 48 = 48 tokens"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_evaluate_reads_texts_before_weights(name, folder, tmp_path, monkeypatch):
    content, message = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    forbid_loading(monkeypatch)
    arguments = ("--text", TEXT, "--text", tmp_path / name, "--length", 48)
    assert re.search(message, call(texts.main, folder, *arguments, monkeypatch=monkeypatch))


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("evaluate", ("--text", TEXT, "--length", 254), "--length=254: with 3 tokens before each window"),
        (
            "evaluate",
            ("--tasks", "word_analogie"),
            r"project has such a task\. Similar: word_analogies",
        ),
        ("evaluate", ("--tasks", "word_analogies", "--task-folder", "nowhere"), "there is no such folder"),
        ("evaluate", ("--tasks", "gone", "--task-folder", "{tasks}"), "evaluation.tasks.gone: "),
        ("generate", ("",), "the prompt is empty"),
        ("generate", ("The house", "--max-new-tokens", 300), "exceed the 256 positions of this model"),
        ("generate", ("Hello", "--chat"), "--chat: this model's tokenizer has no chat template"),
    ],
)
def test_commands_check_before_they_load(command, arguments, message, folder, tmp_path, monkeypatch):
    write_task_without_data(tmp_path)
    forbid_loading(monkeypatch)
    main = {"evaluate": texts.main, "generate": generation.main}[command]
    arguments = [str(argument).replace("{tasks}", str(tmp_path)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["command", str(folder), *arguments])
    with pytest.raises(PipelineError, match=message):
        main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation_config.json": "{"}, "generation_config.json cannot be read"),
        ({"config.json": "{"}, "config.json"),
        ({"manifest.json": None}, "manifest.json is missing"),
    ],
)
def test_damaged_small_files_are_refused_before_weights_are_read(change, message, folder, tmp_path, monkeypatch):
    broken = shutil.copytree(folder, tmp_path / "broken")
    for name, content in change.items():
        if content is None:
            (broken / name).unlink()
        else:
            (broken / name).write_text(content)
    forbid_loading(monkeypatch)
    assert message in call(generation.main, broken, "The house", monkeypatch=monkeypatch)


def test_a_chat_whose_first_turn_does_not_fit_loads_nothing(folder, tmp_path, monkeypatch):
    templated = shutil.copytree(folder, tmp_path / "templated")
    (templated / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    forbid_loading(monkeypatch)
    message = call(generation.main, templated, "The house " * 200, "--chat", monkeypatch=monkeypatch)
    assert "exceed the 256 positions of this model" in message
    (templated / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    message = call(generation.main, templated, "The house", "--chat", monkeypatch=monkeypatch)
    assert "--chat: the model's chat template refuses the conversation (no system role)" in message


@pytest.mark.parametrize(
    ("model_arguments", "task", "more", "message"),
    [
        ("", "gone", (), "lm-eval: "),
        ("", "colour", (), "lm-eval: Tasks not found: colour"),
        (",max_length=254", "colours", (), "max_length=254: expected a whole number from 1 to 253"),
        ("", "colours", ("--batch_size", "0"), "batch_size='0': expected a whole number"),
        ("", "colours", ("--apply_chat_template",), "--apply_chat_template: there is none"),
    ],
)
def test_lm_eval_checks_before_it_loads(model_arguments, task, more, message, folder, tmp_path, monkeypatch):
    local_task(tmp_path, "colours")
    write_task_without_data(tmp_path)
    forbid_loading(monkeypatch)
    arguments = ["--model", "prefixquant", "--model_args", f"path={folder}{model_arguments}", "--tasks", task]
    arguments += ["--include_path", tmp_path, "--limit", 2, *more]
    assert message in call(harness.run_command_line, "run", *arguments, monkeypatch=monkeypatch)


def write_task_without_data(tasks):
    local_task(tasks, "gone")
    (tasks / "gone.jsonl").unlink()


def test_lm_eval_computes_in_the_type_it_is_told(folder):
    assert harness.PrefixedLM(path=str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    assert harness.PrefixedLM(path=str(folder), max_length=99).max_length == 99
    assert harness.PrefixedLM(path=str(folder)).max_length == 253


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "generation_config.json cannot be read"),
        ('{"num_beams": 3}', "generation_config.json (`streamer` cannot be used with beam search"),
        ('{"eos_token_id": "x"}', "refuses the settings of the folder's generation_config.json"),
    ],
)
def test_a_generation_config_is_its_users_and_is_read_as_such(change, message, folder, tmp_path, monkeypatch):
    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / "generation_config.json").write_text(change)
    assert message in call(generate, changed, "The house", monkeypatch=monkeypatch)


def test_a_bug_in_the_model_is_not_blamed_on_the_generation_config(folder, monkeypatch):
    monkeypatch.setattr(PrefixCache, "begin_call_", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(generate, folder, "The house", monkeypatch=monkeypatch)


STAGES = ("calibration", "rotation", "prefix_search", "prefix_training", "quantizer_init", "finetuning", "export")


@pytest.mark.parametrize("stage", [*STAGES, "evaluation original", "activation_plots rotated", "report"])
def test_a_stage_without_its_inputs_names_the_stages_that_make_them(stage, project, monkeypatch):
    name, *variant = stage.split()
    message = call(lambda: runpy.run_module(f"stages.{name}", run_name="__main__"), *variant, monkeypatch=monkeypatch)
    assert re.search(r"is missing\. Rerun the stage that makes it: dvc repro", message)
    assert not [path for path in project.rglob("*") if path.name.startswith(".") or path.suffix == ".safetensors"]


def test_more_processes_than_a_machine_can_have_are_refused(project, monkeypatch):
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["runtime"]["processes"] = 1024
    write_params(project, params)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    message = call(lambda: runpy.run_module("stages.prefix_search", run_name="__main__"), monkeypatch=monkeypatch)
    assert message == "error: runtime.processes=1024: the machine has 8 cores. Lower it."


def test_a_config_of_the_pipelines_own_that_is_no_object_is_refused(project, imported, monkeypatch):
    shutil.copytree(imported["llama_tied"], project / "artifacts/model")
    (project / "artifacts/model/config.json").write_text("[]")
    message = call(lambda: runpy.run_module("stages.rotation", run_name="__main__"), monkeypatch=monkeypatch)
    assert message == "error: artifacts/model/config.json is not a JSON object. Make the artifact again."

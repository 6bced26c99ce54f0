"""Tasks are loaded with their data before the work, or refused with a message that names them."""

import pytest
import yaml

from pipeline.evaluation.params import EvaluationParams, TaskParams
from pipeline.evaluation.task_data import TaskError, check_task_tokenizer, open_tasks
from pipeline.params import parse_params
from pipeline.runtime.params import ParamsError
from tests.conftest import ROOT, make_tokenizer
from tests.evaluation.test_harness import local_task

pytestmark = pytest.mark.usefixtures("lm_eval_read_once")


def test_a_task_folder_below_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    local_task(tmp_path / "tasks", "colours")
    assert list(open_tasks({"colours": TaskParams(limit=2)}, "~/tasks").asked) == ["colours"]


def test_unavailable_tasks_are_named_together_or_skipped(tmp_path):
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


def test_a_task_that_two_files_define_is_refused_if_it_is_asked(tmp_path):
    """lm-eval would take the first file, and its warning is not shown."""
    local_task(tmp_path, "colours")
    (tmp_path / "old").mkdir()
    task = (tmp_path / "colours.yaml").read_text()
    (tmp_path / "old/x.yaml").write_text(task + "process_docs: !function x.y\n")
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(TaskError, match=r"tasks\.colours: colours\.yaml and old/x\.yaml in .* both define it\. Rename"):
        open_tasks({"colours": TaskParams()}, str(tmp_path))
    assert open_tasks({"word_analogies": TaskParams()}, str(tmp_path)).asked
    assert open_tasks({"colours": TaskParams()}, str(tmp_path), skip_unavailable=True).skipped == ["colours"]


@pytest.mark.parametrize("name", ["word_analogies", "last_word_wikipedia"])
def test_a_task_with_the_name_of_a_packaged_one_is_refused(name, tmp_path):
    local_task(tmp_path, "colours")
    path = tmp_path / "colours.yaml"
    path.write_text(path.read_text().replace("task: colours", f"task: {name}"))
    with pytest.raises(TaskError, match=rf"{name}: colours\.yaml in .* has the name of a packaged task\. Rename"):
        open_tasks({name: TaskParams()}, str(tmp_path))


def test_a_task_of_the_folder_takes_the_place_of_lm_evals(tmp_path):
    local_task(tmp_path, "piqa")
    for asked in ({"piqa": TaskParams()}, {"piqa": TaskParams(), "arc_easy": TaskParams()}):
        tasks = open_tasks(asked, str(tmp_path), skip_unavailable=True)
        assert tasks.manager.task_index["piqa"].yaml_path == tmp_path / "piqa.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_to_text": "{{question."}, "evaluation.tasks.colours: expected name or number"),
        ({"doc_to_text": "{{nothing}}"}, "evaluation.tasks.colours: 'nothing' is undefined"),
        ({"doc_to_text": None, "dataset_kwargs": None}, "evaluation.tasks.colours: "),
        ({"output_type": "nonsense"}, "evaluation.tasks.colours: Got invalid output_type 'nonsense'"),
    ],
)
def test_an_invalid_task_is_named_before_the_work(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without data files datasets looks for some below
    local_task(tmp_path, "colours")
    task = yaml.safe_load((tmp_path / "colours.yaml").read_text()) | change
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump({key: value for key, value in task.items() if value}))
    with pytest.raises(TaskError, match=message):
        open_tasks({"colours": TaskParams()}, str(tmp_path))


def test_task_params_are_checked():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    tasks = parse_params(params).evaluation.tasks
    assert {name: task.limit for name, task in tasks.items()} == {"word_analogies": 64, "last_word_wikipedia": 48}
    params["evaluation"]["tasks"]["piqa"] = {"limit": 0, "shots": 5}
    with pytest.raises(ParamsError, match=r"(?s)evaluation.tasks.piqa.limit.*evaluation.tasks.piqa.shots"):
        parse_params(params)


def test_tasks_need_a_tokenizer_with_a_special_token():
    tokenizer = make_tokenizer()
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["evaluation"]
    asked = EvaluationParams.model_validate(values | {"tasks": {"colours": {}}})
    check_task_tokenizer(asked, tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    check_task_tokenizer(EvaluationParams.model_validate(values | {"tasks": {}}), tokenizer)
    with pytest.raises(TaskError, match=r"evaluation\.tasks: lm-eval needs a start or an end token"):
        check_task_tokenizer(asked, tokenizer)

"""`dvc repro` in a separate repository: the stages that rerun after a change, and the output that a user reads."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.experiments import find_unfinished
from pipeline.pictures.summary import format_summary
from tests.conftest import PROSE_FILE, ROOT, tiny_params, write_params

ALWAYS_RUN = {"code", "sources"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory, model_folders):
    """Make a clone with a tiny model and corpus, run once."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("pipeline", "stages", "dvc.yaml", ".gitignore", ".dvcignore"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    corpus = folder / "prose.txt"
    shutil.copyfile(PROSE_FILE, corpus)
    (folder / "data").mkdir()
    shutil.copytree(model_folders["llama_tied"], folder / "llama")
    params = tiny_params(folder / "llama", corpus)
    params["prefix_search"]["outlier_threshold"] = 1.5
    write_params(folder, params)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "config", "core.analytics", "false")
    dvc(folder, "config", "cache.type", "reflink,hardlink,copy")
    repro(folder)
    return folder


def start_dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def dvc(folder: Path, *arguments: str) -> str:
    done = start_dvc(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def repro(folder: Path, *options: str) -> set[str]:
    """Run `dvc repro`; the stages that ran."""
    return set(re.findall(r"Running stage '([^']+)'", dvc(folder, "repro", *options)))


def change(folder: Path, group: str, **values: object) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[group] |= values
    write_params(folder, params)


def test_without_a_change_only_code_and_sources_run(repository):
    lock = (repository / "dvc.lock").read_bytes()
    assert repro(repository) == ALWAYS_RUN
    assert (repository / "dvc.lock").read_bytes() == lock


def test_touched_sources_rerun_nothing(repository):
    files = sorted(path for path in (repository / "llama").iterdir() if path.is_file())
    for path in [repository / "prose.txt", *files]:
        path.touch()
    assert len(files) >= 4
    assert repro(repository) == ALWAYS_RUN


def test_a_changed_file_of_the_model_that_imports_the_same_reruns_only_readers_of_the_source(repository):
    """The config is laid out differently: another file, the same model. The model card in `export` names the source."""
    config = repository / "llama/config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before)))
    ran = repro(repository)
    # The report runs where the seconds of a stage differ from the last run's, to a tenth.
    assert ran - {"report"} == ALWAYS_RUN | {"model", "export"}
    config.write_text(before)
    assert repro(repository) == ALWAYS_RUN  # DVC remembers the run


def test_another_text_at_the_same_path_reruns_the_corpus_and_later_stages_but_no_model_stage(repository):
    corpus = repository / "prose.txt"
    before = corpus.read_text()
    status = corpus.stat()
    changed = "".join(reversed(before))  # as long as before, the documents in another order
    corpus.write_text(changed)
    os.utime(corpus, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert corpus.stat().st_size == status.st_size
    assert repro(repository, "calibration") == ALWAYS_RUN | {"corpora@prose", "calibration"}
    followers = {"prefix_search", "quantizer_init", "finetuning", "evaluation@original", "activation_plots@original"}
    would_run = repro(repository, "--dry")
    assert followers <= would_run
    assert not would_run & {"model", "rotation"}
    corpus.write_text(before)
    assert repro(repository) == ALWAYS_RUN


def test_a_changed_task_file_reruns_evaluation_and_no_other_work(repository):
    """Only evaluation reads evaluation.task_folder."""
    before = (repository / "params.yaml").read_text()
    (repository / "tasks").mkdir()
    (repository / "tasks/own.yaml").write_text("task: own\n")
    change(repository, "evaluation", task_folder=str(repository / "tasks"))
    assert repro(repository, "evaluation@original") == ALWAYS_RUN | {"evaluation@original"}
    assert repro(repository, "evaluation@original") == ALWAYS_RUN
    (repository / "tasks/own.yaml").write_text("task: other\n")
    assert repro(repository, "evaluation@original") == ALWAYS_RUN | {"evaluation@original"}
    (repository / "params.yaml").write_text(before)
    shutil.rmtree(repository / "tasks")
    assert repro(repository) == ALWAYS_RUN


def test_a_source_that_is_gone_is_one_line_with_its_key(repository):
    (repository / "prose.txt").rename(repository / "moved.txt")
    done = start_dvc(repository, "repro")
    (repository / "moved.txt").rename(repository / "prose.txt")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: corpora.prose.source=")
    assert "no such file or folder" in line
    assert repro(repository) == ALWAYS_RUN


def test_a_quantizer_key_reruns_only_its_stage_and_the_stages_after_it(repository):
    change(repository, "quantizer_init", equalize=[])
    stages = {"quantizer_init", "finetuning"}
    made = ALWAYS_RUN | {"export", "evaluation@export", "activation_plots@quantized", "report"}
    assert repro(repository) == stages | made | {f"evaluation@{stage}" for stage in stages}


def test_the_outlier_threshold_does_not_rerun_rotation(repository):
    before = (repository / "params.yaml").read_text()
    change(repository, "prefix_search", outlier_threshold=1.2)
    would_run = repro(repository, "--dry")
    assert "prefix_search" in would_run
    assert not would_run & {"model", "calibration", "rotation", "evaluation@original"}
    (repository / "params.yaml").write_text(before)


def test_a_training_key_reruns_nothing_else_while_training_is_off(repository):
    change(repository, "prefix_training", epochs=7)
    assert repro(repository) == ALWAYS_RUN | {"prefix_training", "report"}


def test_runtime_settings_rerun_nothing(repository):
    change(repository, "runtime", batch_size=1, threads=2)
    assert repro(repository) == ALWAYS_RUN


def test_another_corpus_refetches_no_other_and_reruns_no_model_stage(repository):
    shutil.copyfile(repository / "prose.txt", repository / "other.txt")
    change(repository, "corpora", other={"source": str(repository / "other.txt")})
    assert repro(repository) == ALWAYS_RUN | {"corpora@other", "generation", "calibration", "report"}


def test_a_changed_evaluation_split_reruns_only_its_readers(repository):
    params = yaml.safe_load((repository / "params.yaml").read_text())
    params["calibration"]["evaluation"]["windows"] = 1
    write_params(repository, params)
    ran = repro(repository)
    variants = ("original", "original_prefix", "quantizer_init", "finetuning", "export")
    assert ran == ALWAYS_RUN | {"calibration", "export", "report", *(f"evaluation@{variant}" for variant in variants)}


def test_a_setting_can_be_overridden_on_the_command_line_in_exponent_form(repository):
    change(repository, "prefix_search", outlier_threshold="1.5e0")
    repro(repository)
    assert "perplexity.prose" in dvc(repository, "metrics", "show")


def test_the_graph_has_rotation_and_prefix_search_side_by_side(repository):
    graph = dvc(repository, "dag", "--mermaid")
    names = dict(re.findall(r'(node\d+)\["([^"]+)"\]', graph))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(node\d+)-->(node\d+)", graph)}
    assert ("model", "rotation") in edges
    assert ("model", "prefix_search") in edges
    assert not edges & {("rotation", "prefix_search"), ("prefix_search", "rotation")}
    assert {("corpora@prose", "calibration"), ("model", "generation"), ("generation", "calibration")} <= edges
    assert ("model", "corpora@prose") not in edges
    assert ("quantizer_init", "evaluation@quantizer_init") in edges
    assert {
        ("rotation", "finetuning"),
        ("quantizer_init", "finetuning"),
        ("finetuning", "evaluation@finetuning"),
        ("finetuning", "export"),
        ("export", "evaluation@export"),
    } <= edges
    assert ("prefix_search", "evaluation@original") not in edges


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new, 1))


PROBE = '''

def probe(value: int) -> int:
    """Return a number."""
    # A comment.
    if value < 0:
        raise ValueError(f"value={value} is negative. Use 0")
    return value * 12345
'''


def list_changed_stages(folder: Path) -> set[str]:
    """Return the stages that `dvc status` lists after `dvc repro code`, without those that always run."""
    dvc(folder, "repro", "code")
    status = json.loads(dvc(folder, "status", "--json"))
    return {name for name, reasons in status.items() if reasons != ["always changed"]}


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("pipeline/numerics/gptq.py", {"quantizer_init"}),
        ("pipeline/importing/gguf_file.py", {"model", "export"}),  # export writes GGUF files with its tables
        ("pipeline/pictures/plots.py", {"report"}),
    ],
)
def test_a_changed_line_reruns_the_stages_that_reach_it_and_a_changed_text_none(module, stages, repository):
    repro(repository)
    path = repository / module
    before = path.read_text()
    path.write_text(before + PROBE)
    repro(repository, "code")
    dvc(repository, "commit", "--force")  # the results stay: nothing calls the function
    assert list_changed_stages(repository) == set()
    for old, new in (("Return a number", "Add one"), ("A comment", "Another"), ("is negative. Use 0", "is below zero")):
        edit(path, old, new)
        assert list_changed_stages(repository) == set(), new
    edit(path, "value * 12345", "value * 54321")
    assert list_changed_stages(repository) == stages
    path.write_text(before)
    repro(repository, "code")
    dvc(repository, "commit", "--force")
    assert list_changed_stages(repository) == set()


def test_a_plan_and_the_params_of_other_stages_rerun_nothing(repository):
    repro(repository)
    plan, params = repository / "pipeline/planning/need.py", repository / "pipeline/params.py"
    before = {path: path.read_text() for path in (plan, params)}
    for path in before:
        path.write_text(before[path] + PROBE)
    assert list_changed_stages(repository) == set()
    for path, text in before.items():
        path.write_text(text)


def test_code_that_cannot_be_fingerprinted_stops_the_run(repository):
    path = repository / "pipeline/numerics/gptq.py"
    before = path.read_text()
    path.write_text(before + "\n\n__import__(name)\n")
    done = start_dvc(repository, "repro")
    path.write_text(before)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "pipeline/numerics/gptq.py:" in line
    assert repro(repository) == ALWAYS_RUN


def commit(folder: Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", *identity, "commit", "-q", "-m", "state", "--allow-empty"], cwd=folder, check=True)


def test_artifacts_are_shared_through_a_remote_and_a_clone_reruns_nothing(repository, tmp_path):
    repro(repository)
    dvc(repository, "remote", "add", "-f", "-d", "shared", str(tmp_path / "remote"))
    dvc(repository, "push", "-q")
    commit(repository)
    subprocess.run(["git", "clone", "-q", str(repository), str(tmp_path / "clone")], check=True)
    dvc(tmp_path / "clone", "pull", "-q")
    assert repro(tmp_path / "clone") == ALWAYS_RUN
    for name in ("export", "finetuning"):
        assert sorted(path.name for path in (tmp_path / "clone/artifacts" / name).iterdir()) == sorted(
            path.name for path in (repository / "artifacts" / name).iterdir()
        )


def test_an_experiment_takes_unchanged_stages_from_the_cache_and_is_compared_by_few_columns(repository):
    repro(repository)
    commit(repository)
    before = (repository / "params.yaml").read_text()
    output = dvc(repository, "exp", "run", "--temp", "-n", "wide", "-S", "finetuning.end_to_end.epochs=2")
    ran = set(re.findall(r"Running stage '([^']+)'", output))
    made = {"evaluation@finetuning", "export", "evaluation@export", "activation_plots@quantized", "report"}
    assert ran == ALWAYS_RUN | {"finetuning"} | made
    assert (repository / "params.yaml").read_text() == before
    makefile = (ROOT / "Makefile").read_text()
    columns = re.search(r"^COLUMNS = (.+)$", makefile, re.MULTILINE)[1].replace("$$", "$")
    table = dvc(repository, "exp", "show", "--csv", "--drop", ".*", "--keep", columns)
    head, *rows = [line.split(",") for line in table.strip().splitlines()]
    assert any(row[head.index("Experiment")] == "wide" for row in rows)
    names = [name.rpartition(":")[2] for name in head]
    assert {"bits", "prefix", "ppl.prose", "ratio.prose", "minutes", "gib", "mib"} <= set(names)
    assert len(names) < 20


def test_results_of_an_earlier_run_are_marked(repository):
    """Run `make table` after an experiment in place that stopped at quantizer_init."""
    repro(repository)
    commit(repository)
    assert "outdated" not in format_summary(repository)
    dvc(repository, "exp", "run", "-S", "prefix.use=none", "quantizer_init")
    summary = format_summary(repository)
    assert "| original | " in summary
    for variant in ("original_prefix", "quantizer_init", "finetuning", "export"):
        assert f"| {variant} (outdated) | " in summary
    assert "  original_prefix: prefix.use is none, the run had found" in summary
    assert "  quantizer_init: artifacts/quantizer_init has changed" in summary
    subprocess.run(["git", "checkout", "-q", "."], cwd=repository, check=True)
    repro(repository)
    assert "outdated" not in format_summary(repository)


def test_experiments_that_stopped_early_are_listed(repository, monkeypatch):
    commit(repository)
    dvc(repository, "exp", "run", "--temp", "-n", "early", "-S", "prefix.use=none", "quantizer_init")
    monkeypatch.chdir(repository)
    assert find_unfinished() == {"early": "prefix.use is none, the run had found"}

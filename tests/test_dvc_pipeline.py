"""dvc.yaml must list what each stage's results depend on: scripts, modules, params groups."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# Compute nothing of a result: a docstring there must not rerun the pipeline.
EXEMPT = {f"pipeline/{name}.py" for name in ("params", "artifacts", "progress", "errors", "memory")}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def imported_modules(path: Path) -> set[Path]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            file = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("pipeline.") and file.is_file():
                found.add(file)
    return found


def closure(path: Path) -> set[str]:
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        for module in imported_modules(waiting.pop()) - seen:
            seen.add(module)
            waiting.append(module)
    return {str(module.relative_to(ROOT)) for module in seen} - EXEMPT


@pytest.mark.parametrize("name", STAGES)
def test_stage_lists_its_script_and_every_module_it_uses(name):
    stage = STAGES[name].get("do", STAGES[name])
    code = {dependency for dependency in stage["deps"] if dependency.endswith(".py")}
    script = f"stages/{name}.py"
    assert code == closure(ROOT / script) | {script}


@pytest.mark.parametrize("name", STAGES)
def test_stage_has_a_description_an_uncached_metrics_file_and_no_runtime_setting(name):
    stage = STAGES[name].get("do", STAGES[name])
    assert stage["desc"]
    assert stage["cmd"].startswith(f"python -m stages.{name}")
    for metrics in stage["metrics"]:
        ((path, options),) = metrics.items()
        assert path.startswith(f"metrics/{name}")
        assert options == {"cache": False}
    assert not any("runtime" in str(group) for group in stage["params"])


@pytest.mark.parametrize("name", STAGES)
def test_stage_lists_exactly_the_params_groups_its_script_reads(name):
    source = (ROOT / f"stages/{name}.py").read_text()
    read = set(re.findall(r"params\.(\w+)", source)) - {"runtime", "yaml"}
    variants = STAGES[name].get("foreach", {})
    variants = list(variants.values()) if isinstance(variants, dict) else []
    listed = {str(group).split(".")[0] for group in STAGES[name].get("do", STAGES[name])["params"]} - {"${item"}
    listed |= {variant["params"] for variant in variants}
    # check_against_model judges quantizer_init's group size before a model is imported; it changes no result.
    assert listed == read


def test_import_order_is_acyclic_and_no_module_reads_params_or_arguments():
    for path in (ROOT / "pipeline").glob("*.py"):
        assert str(path.relative_to(ROOT)) not in closure(path), f"{path.name} imports itself, through others"
        source = path.read_text()
        assert "sys.argv" not in source
        assert "os.environ" not in source
        assert not re.search(r"""["']params\.yaml["']""", source)


def test_plots_are_of_files_some_stage_writes_with_the_columns_it_writes():
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    outs = {out.replace("${key}", key) for stage in STAGES.values() for out, key in _outs(stage)}
    sites = ("attention_input", "key", "value", "attention_output", "mlp_input", "mlp_hidden")
    pictures = [plot for plot in plots if isinstance(plot, str)]
    assert len(pictures) == 6
    assert all(picture.startswith("artifacts/report/") for picture in pictures)
    assert len(plots) - len(pictures) == 8
    for plot in plots[len(pictures) :]:
        ((name, spec),) = plot.items()
        assert {"title", "x_label", "y_label", "template"} <= spec.keys()
        ((path, columns),) = spec["y"].items()
        assert outs & {path, *map(str, Path(path).parents)}, name
        kind = {"saturation": "share", "sqnr": "sqnr"}.get(name.partition("_")[0])
        expected = ["before", "after"] if name == "finetuning_blocks" else ["train", "validation"]
        assert columns == ([f"{site}_{kind}" for site in sites] if kind else expected)


def _outs(stage):
    keys = list(stage.get("foreach", [""]))
    return [(out, key) for out in stage.get("do", stage)["outs"] for key in keys]

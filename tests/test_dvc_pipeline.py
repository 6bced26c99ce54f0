"""dvc.yaml must list everything that the results of a stage depend on; the rooms of the library keep their order."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.render.converter.vega import VegaConverter
from dvc_render import VegaRenderer

from pipeline.models.sites import Site

ROOT = Path(__file__).parents[1]
ROOMS = re.findall(r"^    (\w+) {2,}", (ROOT / "pipeline/__init__.py").read_text(), re.MULTILINE)
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PLOTS = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
CURVES = [next(iter(plot.items())) for plot in PLOTS if isinstance(plot, dict)]
TEMPLATES = ROOT / ".dvc/plots"  # where DVC looks first
# Groups that a stage only checks before it starts, or only plans with; they change no result.
ONLY_CHECKED = {"model": {"evaluation"}, "finetuning": {"quantizer_init"}}
# These run with every `dvc repro`. A metrics file, which holds seconds, would be another change in git every time.
ALWAYS_RUN = {"code", "sources"}


def find_modules(names: list[str], root: Path = ROOT) -> set[Path]:
    """Return the files of the library for dotted names of modules, or of names inside them."""
    files = {root / (name.replace(".", "/") + ".py") for name in names if name.startswith("pipeline.")}
    return {file for file in files if file.is_file()}


def imported_modules(path: Path, root: Path = ROOT) -> set[Path]:
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= find_modules([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)], root)
        elif isinstance(node, ast.Import):
            found |= find_modules([alias.name for alias in node.names], root)
    return found


def closure(path: Path) -> set[Path]:
    """Return all modules in rooms that a file imports, directly or through others."""
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        for module in imported_modules(waiting.pop()) - seen:
            if module.parent.name in ROOMS:
                seen.add(module)
                waiting.append(module)
    return seen


def find_wrong_imports(root: Path) -> list[str]:
    """Imports from a room into one that comes after it, or into names for users."""
    wrong = []
    for position, room in enumerate(ROOMS):
        for path in sorted((root / "pipeline" / room).glob("*.py")):
            for module in sorted(imported_modules(path, root)):
                if module.parent.name not in ROOMS[: position + 1]:
                    wrong.append(f"{path.relative_to(root)} imports {module.relative_to(root)}")
    return wrong


def test_every_folder_of_the_library_is_a_room_that_opens_with_a_docstring_only():
    folders = {path.parent.name for path in (ROOT / "pipeline").glob("*/*.py")}
    assert folders == set(ROOMS)
    for room in ROOMS:
        modules = [path for path in (ROOT / "pipeline" / room).glob("*.py") if path.name != "__init__.py"]
        body = ast.parse((ROOT / "pipeline" / room / "__init__.py").read_text()).body
        assert len(body) == 1
        docstring = " ".join(ast.get_docstring(ast.Module(body, [])).split())
        assert "ay import from" in docstring or room == "runtime"
        assert not [path.stem for path in modules if path.stem == room], room


def test_rooms_have_one_order_and_no_module_imports_itself_through_others():
    assert find_wrong_imports(ROOT) == []
    for room in ROOMS:
        for path in (ROOT / "pipeline" / room).glob("*.py"):
            assert path not in closure(path), f"{path.name} imports itself, through others"


@pytest.mark.parametrize(
    "wrong", ["from pipeline.training.losses import LOSSES", "import pipeline.training.losses", "import pipeline.hf"]
)
def test_a_wrong_import_is_found(wrong, tmp_path):
    for name in ("training/losses.py", "numerics/gptq.py", "hf.py"):
        path = tmp_path / "pipeline" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((ROOT / "pipeline" / name).read_text())
    (tmp_path / "pipeline/numerics/gptq.py").write_text(f"{wrong}\n")
    (found,) = find_wrong_imports(tmp_path)
    assert found.startswith("pipeline/numerics/gptq.py imports pipeline/")


@pytest.mark.parametrize("name", [name for name in STAGES if name not in ALWAYS_RUN])
def test_stage_depends_on_the_fingerprint_of_its_code_and_on_no_source_file(name):
    dependencies = STAGES[name].get("do", STAGES[name])["deps"]
    assert [path for path in dependencies if path.startswith("artifacts/code")] == [f"artifacts/code/{name}.json"]
    assert not [path for path in dependencies if path.startswith(("stages/", "pipeline/"))]


@pytest.mark.parametrize("name", STAGES)
def test_stage_has_a_description_metrics_in_git_its_cost_in_dvc_and_no_runtime_setting(name):
    stage = STAGES[name].get("do", STAGES[name])
    assert stage["desc"]
    assert stage["cmd"].startswith(f"python -m stages.{name}")
    file = f"{name}/${{key}}.json" if "foreach" in STAGES[name] else f"{name}.json"
    results = stage.get("metrics", [])[:1]  # DVC saves no run of a stage that has other files in git than metrics
    cost = [out for out in stage["outs"] + stage.get("metrics", []) if "metrics/runtime/" in str(out)]
    assert results == ([] if name in ALWAYS_RUN else [{f"metrics/{file}": {"cache": False}}])
    assert cost == ([] if name in ALWAYS_RUN else [f"metrics/runtime/{file}"])
    assert not any(isinstance(out, dict) and "cache" in str(out) for out in stage["outs"])
    assert not any("runtime" in str(group) for group in stage.get("params", []))


def test_code_and_sources_always_run_and_each_reader_depends_on_its_own_source():
    """`sources` keeps its outs while it runs: the hub's last answer is in them."""
    assert {name for name, stage in STAGES.items() if "always_changed" in stage} == ALWAYS_RUN
    assert STAGES["sources"]["outs"] == [{"artifacts/sources": {"persist": True}}]
    read = {
        name: [path for path in stage.get("do", stage)["deps"] if path.startswith("artifacts/sources")]
        for name, stage in STAGES.items()
        if name not in ALWAYS_RUN
    }
    assert {name: paths for name, paths in read.items() if paths} == {
        "model": ["artifacts/sources/model.json"],
        "corpora": ["artifacts/sources/corpora/${key}.json"],
        "export": ["artifacts/sources/model.json"],
        "evaluation": ["artifacts/sources/tasks.json"],
    }


@pytest.mark.parametrize("name", STAGES)
def test_stage_lists_exactly_the_params_groups_its_script_reads(name):
    source = (ROOT / f"stages/{name}.py").read_text()
    read = set(re.findall(r"params\.(\w+)", source)) - {"runtime", "yaml"}
    variants = STAGES[name].get("foreach", {})
    variants = list(variants.values()) if isinstance(variants, dict) else []
    listed = {str(group).split(".")[0] for group in STAGES[name].get("do", STAGES[name]).get("params", [])}
    listed -= {"${item"}
    listed |= {variant["params"] for variant in variants}
    assert listed == read - ONLY_CHECKED.get(name, set())


def test_no_module_reads_params_or_arguments_or_the_environment():
    for path in (ROOT / "pipeline").rglob("*.py"):
        source = path.read_text()
        assert "sys.argv" not in source
        assert "os.environ" not in source or path.name in ("errors.py", "job_array.py")  # command lines
        # These are command lines that work on a project's folder.
        commands = ("presets.py", "experiments.py", "summary.py", "outdated.py", "explain.py", "stage_list.py")
        assert not re.search(r"""["']params\.yaml["']""", source) or path.name in commands


def test_plots_are_of_files_some_stage_writes_with_the_columns_it_writes():
    outs = {out.replace("${key}", key) for stage in STAGES.values() for out, key in _outs(stage)}
    pictures = [plot for plot in PLOTS if isinstance(plot, str)]
    assert len(pictures) == 6
    assert all(picture.startswith("artifacts/report/") for picture in pictures)
    assert len(CURVES) == 8
    for name, spec in CURVES:
        assert {"title", "x_label", "y_label", "template"} <= spec.keys()
        ((path, columns),) = spec["y"].items()
        assert outs & {path, *map(str, Path(path).parents)}, name
        kind = {"saturation": "share", "sqnr": "sqnr"}.get(name.partition("_")[0])
        expected = ["before", "after"] if name == "finetuning_blocks" else ["train", "validation"]
        assert columns == ([f"{site}_{kind}" for site in Site] if kind else expected)


def render(name, spec, revisions=("main", "workspace")):
    """Return a plot of dvc.yaml as DVC fills its template: rows 0 and 1, and no value of the first column in row 0."""
    ((path, columns),) = spec["y"].items()
    rows = [{spec["x"]: x} | {column: x + i for i, column in enumerate(columns)} for x in range(2)]
    rows[0][columns[0]] = None
    points = []
    for revision in revisions:
        found, properties = VegaConverter(name, {path: rows}, spec).flat_datapoints(revision)
        points += found
    renderer = VegaRenderer(points, name, **properties, template_dir=str(TEMPLATES), revs_with_datapoints=revisions)
    return renderer.get_filled_template()


@pytest.mark.parametrize(("name", "spec"), CURVES, ids=[name for name, _ in CURVES])
def test_columns_of_a_plot_are_told_apart_by_colour_and_revisions_by_dash(name, spec):
    ((_, columns),) = spec["y"].items()
    assert len(columns) > 1
    assert (TEMPLATES / f"{spec['template']}.json").is_file()
    drawn = render(name, spec)
    assert "<DVC_METRIC" not in json.dumps(drawn)
    values = drawn["data"]["values"]
    lines, pointed_at = drawn["layer"]
    assert lines["mark"]["type"] == "line"
    colour, dash = lines["encoding"]["color"], lines["encoding"]["strokeDash"]
    assert (colour["field"], colour["type"], colour["sort"]) == ("field", "nominal", None)
    assert list(dict.fromkeys(row["field"] for row in values)) == columns  # unsorted: in this order in the legend
    assert len(set(colour["scale"]["range"])) >= len(columns)
    assert (dash["field"], dash["scale"]["range"][0]) == ("rev", [1, 0])  # one revision alone: solid
    assert {row["rev"] for row in values} == {"main", "workspace"}
    assert len({tuple(pattern) for pattern in dash["scale"]["range"]}) >= 5
    x, y = drawn["encoding"]["x"], lines["encoding"]["y"]
    assert (x["field"], x["title"], y["title"]) == (spec["x"], spec["x_label"], spec["y_label"])
    assert drawn["title"]["text"] == spec["title"]
    assert [row[y["field"]] for row in values[:4]] == [None, 1, 1, 2]
    assert drawn["transform"] == [{"filter": f"isValid(datum['{y['field']}'])"}]
    assert pointed_at["mark"]["tooltip"] == {"content": "data"}
    assert pointed_at["transform"][1] == {"pivot": "curve", "value": y["field"], "groupby": [spec["x"]]}


def test_templates_are_in_git_and_keep_the_fields_that_dvc_fills():
    assert "/plots" not in (ROOT / ".dvc/.gitignore").read_text().splitlines()
    assert {path.stem for path in TEMPLATES.iterdir()} == {spec["template"] for _, spec in CURVES}
    anchors = {"DATA", "TITLE", "X", "Y", "X_LABEL", "Y_LABEL", "ZOOM_AND_PAN", "PLOT_WIDTH", "PLOT_HEIGHT"}
    for path in TEMPLATES.iterdir():
        text = path.read_text()
        assert json.loads(text)["data"] == {"values": "<DVC_METRIC_DATA>"}
        assert set(re.findall(r"<DVC_METRIC_(\w+)>", text)) == anchors


def _outs(stage):
    keys = list(stage.get("foreach", [""]))
    outs = [out for entry in stage.get("do", stage)["outs"] for out in ([entry] if isinstance(entry, str) else entry)]
    return [(out, key) for out in outs for key in keys]


def test_git_tracks_no_output_that_dvc_keeps():
    """DVC refuses to run a stage one of whose cached outputs is in git."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    tracked = subprocess.run(
        ["git", "ls-files", "artifacts", "data", "metrics"], cwd=ROOT, capture_output=True, text=True
    )
    files = tracked.stdout.split()
    assert "metrics/model.json" in files
    assert not [
        file for file in files if file.startswith("metrics/runtime/") or (file.count("/") > 1 and "artifacts" in file)
    ]

"""Commands, files, settings and links named in README and docs/ exist, and architecture.md agrees with the code."""

import ast
import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
from pathlib import Path
from typing import get_args

import pytest
import yaml
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

from benchmarks.workspace import expand_stages, override, read_params
from pipeline.evaluation import harness
from pipeline.params import Params, load_params, parse_params
from pipeline.pictures.summary import read_evaluations
from pipeline.pictures.tables import format_results
from pipeline.runtime.arguments import Parser
from pipeline.runtime.code import CodeReader, is_exempt
from prefixquant.command import SUBCOMMANDS, dispatch
from tests.conftest import ROOT
from tests.test_dvc_pipeline import ROOMS, STAGES

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
ALL = "\n".join(PAGES.values())
ARCHITECTURE = PAGES["docs/architecture.md"]
PARAMS = (ROOT / "params.yaml").read_text(encoding="utf-8")
FOLDERS = ("pipeline", "stages", "benchmarks", "tests", "docs", "presets", "metrics")
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b")  # NAME, VARIANT, … in a path or a command
PAGE = pytest.mark.parametrize("page", PAGES)


def find_rows(text, columns):
    """Return the rows of Markdown tables with this number of columns, without heads."""
    rows = [[cell.strip() for cell in line.split(" | ")] for line in re.findall(r"^\| (.+) \|$", text, re.MULTILINE)]
    return [row for row in rows if len(row) == columns and row[0].startswith("`")]


def find_section(text, title):
    """Return the text from a heading to the next one of any level."""
    return re.split(r"^#", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def find_source(reference):
    """Return the source of a function, method or class, from `file.py:name` or `file.py:Class.name`, or None."""
    path, _, dotted = reference.partition(":")
    source = (ROOT / path).read_text(encoding="utf-8")
    node = ast.parse(source)
    for name in dotted.split("."):
        named = [child for child in node.body if getattr(child, "name", None) == name]
        if not named:
            return None
        node = named[0]
    return ast.get_source_segment(source, node)


def find_anchors(text):
    """Return the headings of a page as links name them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_result_table_agrees_with_the_metrics_in_git():
    """Compare with the output of `make table`. The committed metrics belong to the default run."""
    assert format_results(read_evaluations(ROOT / "metrics")) in README


def test_every_page_is_linked_from_the_readme_and_every_note_from_the_list_of_notes():
    assert len(PAGES) > 10
    notes = {page for page in PAGES if page.startswith("docs/lab/")} - {"docs/lab/index.md"}
    for page in PAGES.keys() - {"README.md"} - notes:
        assert f"]({page})" in README, page
    for page in notes:
        assert f"]({page.removeprefix('docs/lab/')}" in PAGES["docs/lab/index.md"], page


def test_notes_are_dated_newest_first():
    """Check the list of notes, and in each page the sections that begin with a date."""
    dates = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[", PAGES["docs/lab/index.md"], re.MULTILINE)
    assert len(dates) > 10
    assert dates == sorted(dates, reverse=True)
    for page, text in PAGES.items():
        if page.startswith("docs/lab/"):
            dates = re.findall(r"^## .+\n\n(\d{4}-\d\d-\d\d)", text, re.MULTILINE)
            assert dates == sorted(dates, reverse=True), page


@PAGE
def test_each_page_opens_with_its_purpose_for_the_reader(page):
    if page != "README.md":
        assert re.match(r"# .+\n\nAfter reading this page you ", PAGES[page]), page


def test_settings_link_to_sections_of_pages_that_exist():
    links = re.findall(r"\bdocs/([\w/]+\.md)(?:#([\w-]+))?", PARAMS)
    assert len(links) > 5
    for page, anchor in links:
        assert not anchor or anchor in find_anchors(PAGES[f"docs/{page}"]), (page, anchor)


@PAGE
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.is_file(), link
        if anchor:
            assert anchor in find_anchors(path.read_text(encoding="utf-8")), link


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    targets |= set(re.search(r"^SWEEPS := (.+)$", makefile, re.MULTILINE)[1].split())
    named = {page: set(re.findall(r"(?:`|^    )make ([\w-]+)", text, re.MULTILINE)) for page, text in PAGES.items()}
    assert {"repro", "test"} <= named["README.md"]
    for page, names in named.items():
        assert names <= targets, page
    presets = re.findall(r"make preset\s+NAME=([\w.-]+)", ALL)
    assert len(presets) >= 3
    for name in presets:
        assert (ROOT / f"presets/{name}.yaml").is_file(), name


@PAGE
def test_modules_exist(page):
    for module in re.findall(r"python -m ([\w.]+)", PAGES[page]):
        if PLACEHOLDER.search(module):
            continue
        if module.split(".")[0] in FOLDERS:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
        elif not module.startswith("vllm."):  # it has an environment of its own, .venv-serving
            assert importlib.util.find_spec(module), module
    for module, variant in re.findall(r"python -m stages\.(\w+)(?: (\w+))?", PAGES[page]):
        if not PLACEHOLDER.search(module) and module != "run":  # which runs all stages
            assert (f"{module}@{variant}" if variant else module) in expand_stages(read_params()), module


class ParsedError(Exception):
    """Raised in place of the work of a command, after its arguments were accepted."""


def list_documented_commands():
    """Return the words of each `prefixquant …` in pages, docstrings and model cards, and whether it is a whole line."""
    helps = ("explain.py", "evaluation/texts.py", "inference/generation.py")
    sources = [*(ROOT / "prefixquant").glob("*.py"), *(ROOT / "pipeline" / name for name in helps)]
    sources.append(ROOT / "pipeline/export/model_card.py")
    text = "\n".join([ALL, *(path.read_text(encoding="utf-8") for path in sources)])
    lines = dict.fromkeys(re.findall(r"^    (prefixquant [a-z-].*)$", text, re.MULTILINE), True)
    inline = dict.fromkeys(re.findall(r"`(prefixquant [a-z-][^`…]*)`", text), False)
    commands = [(shlex.split(line, comments=True), whole) for line, whole in (inline | lines).items()]
    return [(words, whole) for words, whole in commands if "SUBCOMMAND" not in words]


def test_documented_commands_have_arguments_that_are_accepted(monkeypatch):
    def accept(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise ParsedError

    def accept_lm_eval(self):
        parse_lm_eval(self)
        raise ParsedError

    parse, parse_lm_eval = Parser.parse_args, harness.HarnessCLI.parse_args
    monkeypatch.setattr(Parser, "parse_args", accept)
    monkeypatch.setattr(harness.HarnessCLI, "parse_args", accept_lm_eval)
    commands = list_documented_commands()
    assert len(commands) > 25
    assert {words[1] for words, _ in commands} >= set(SUBCOMMANDS)
    for words, whole in commands:
        if len(words) == 2 and (not whole or words[1].startswith("-")):  # named in a sentence
            assert words[1] in (*SUBCOMMANDS, "--help", "--version"), words
            continue
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit if "--help" in words else ParsedError):
            dispatch()


@PAGE
def test_files_and_functions_exist(page):
    """Check paths in backticks, such as `stages/NAME.py`, `metrics/export.json`, `file.py:function`."""
    for reference in re.findall(rf"`(?!metrics/runtime/)((?:{'|'.join(FOLDERS)})/[^`\s]*)`", PAGES[page]):
        path = reference.partition(":")[0]
        assert list(ROOT.glob(PLACEHOLDER.sub("*", path).rstrip("/"))), reference
        if ":" in reference:
            assert find_source(reference), reference
    outs = {out for stage in expand_stages(read_params()).values() for out in list_outs(stage)}
    for path in re.findall(r"`((?:artifacts|data|metrics/runtime)/[^`\s]*)`", PAGES[page]):
        pattern = re.compile(PLACEHOLDER.sub(r"[^/]+", path.rstrip("/")))
        written = any(path.startswith(f"{out}/") or pattern.fullmatch(out) for out in outs)
        assert written or any(out.startswith(path) for out in outs), path


def test_files_are_named_where_they_are():
    """Check that no page names a module of the library by its place before there were rooms."""
    flat = {f"pipeline/{path.name}" for path in (ROOT / "pipeline").glob("*.py")}
    for path in re.findall(r"pipeline/\w+\.py", ALL + PARAMS):
        assert path in flat, path


def test_overrides_are_valid_params(tmp_path):
    """Apply them to params.yaml as DVC does."""
    written = r"(dvc exp run|pipeline\.experiments sweep) ([^`\n]+)"
    commands = {page: re.findall(written, text) for page, text in PAGES.items()}
    assert len(commands["README.md"]) >= 4
    file = tmp_path / "params.yaml"
    for page, program, command in [(page, *command) for page, listed in commands.items() for command in listed]:
        words = shlex.split(command, comments=True)
        overrides = {file: [word for flag, word in itertools.pairwise(words) if flag == "-S"]}
        if not overrides[file] and page == "docs/experiments.md":  # the program is named in a sentence
            continue
        assert overrides[file], (page, command)
        for combination in get_hydra_sweeps(overrides) if program.endswith("sweep") else [overrides]:
            shutil.copy(ROOT / "params.yaml", file)
            apply_overrides(file, combination[file])
            load_params(file)


def test_documented_experiments_do_not_add_up():
    """Check for --temp. Without it, `dvc exp run` changes params.yaml, and the next command starts from that."""
    commands = re.findall(r"^    dvc exp run .+", ALL, re.MULTILINE)
    assert len(commands) >= 6
    assert all(command.startswith("    dvc exp run --temp -S ") for command in commands)


def merge(params, changes):
    """Put `changes` into nested params, in place, and return them."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(params.get(key), dict):
            merge(params[key], value)
        else:
            params[key] = value
    return params


def test_the_yaml_examples_are_valid():
    examples = [yaml.safe_load(example) for example in re.findall(r"```yaml\n(.+?)```", ALL, re.DOTALL)]
    assert len(examples) >= 2
    changed = [parse_params(merge(read_params(), example)) for example in examples]
    assert [2, 11, 28] in [
        params.quantizer_init.overrides[0].blocks for params in changed if params.quantizer_init.overrides
    ]
    assert {"wikipedia", "news", "mine", "c4"} in [set(params.corpora) for params in changed]


def test_the_python_examples_import_existing_names():
    examples = re.findall(r"```python\n(.+?)```", ALL, re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.Import):
                assert all(importlib.import_module(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_stage_is_in_the_table():
    section = find_section(ARCHITECTURE, "The stages")
    for name in expand_stages(read_params()):
        stage, _, variant = name.partition("@")
        assert re.search(rf"\| `{stage}[`@]", section), name
        assert stage == "corpora" or variant in section


def test_arrows_of_the_picture_lead_from_a_stage_to_one_that_reads_its_files():
    picture = README.split("```mermaid")[1].split("```")[0]
    chains = [line.split(" --> ") for line in picture.splitlines() if "-->" in line]
    arrows = {pair for chain in chains for pair in itertools.pairwise(name.strip() for name in chain)}
    assert 9 <= len(arrows) <= 10
    for source, target in arrows:
        folders = (f"artifacts/{source}", f"metrics/{source}", "data" if source == "corpora" else "-")
        assert any(path.startswith(folders) for path in list_dependencies(target)), (source, target)


def list_dependencies(name: str) -> list[str]:
    """Return the paths that a stage reads, including the paths of its variants."""
    stage = STAGES[name]
    variants = stage.get("foreach", {})
    values = [value for item in (variants.values() if isinstance(variants, dict) else ()) for value in item.values()]
    return [*stage.get("do", stage)["deps"], *values]


def list_outs(stage: dict) -> list[str]:
    """Return the outs of a stage in dvc.yaml, where an out may have options."""
    return [path for out in stage["outs"] for path in ([out] if isinstance(out, str) else out)]


def read_data_flow():
    """Return stage -> the texts of its library calls and of its artifacts. A row without a stage continues the last."""
    flow = {}
    for line in find_section(ARCHITECTURE, "The flow of data").splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[0] in {"", *STAGES}:
            stage = cells[0] or list(flow)[-1]
            calls, artifacts = flow.setdefault(stage, ([], []))
            calls += [cells[1]] if cells[1] else []
            artifacts += [cells[2]] if cells[2] else []
    return flow


def test_the_code_a_stage_is_said_to_run_is_code_it_depends_on():
    flow = read_data_flow()
    assert list(flow) == list(STAGES)
    for stage, (calls, _) in flow.items():
        reached = CodeReader(ROOT).fingerprint_stage(f"stages/{stage}.py")
        for path in (call.partition(":")[0] for call in calls):
            assert path in reached or is_exempt(path), (stage, path)


def test_supported_families_agree_with_the_code():
    from pipeline.models.architectures import ARCHITECTURES, IMPORTED_AS

    (listed,) = re.findall(r"families: ([\w,\s]+)\.", README)
    assert [name.lower() for name in re.split(r",\s+", listed)] == sorted(ARCHITECTURES | IMPORTED_AS)


def test_the_architecture_names_every_room_in_its_order():
    rows = find_rows(find_section(ARCHITECTURE, "The rooms"), 3)
    assert [room.strip("`") for room, _, _ in rows] == ROOMS
    for room, _, first in rows:
        assert first.startswith(f"`pipeline/{room.strip('`')}/")


def test_scripts_call_the_functions_and_write_the_artifacts_of_the_data_flow():
    flow = read_data_flow()
    assert list(flow) == list(STAGES)
    for stage, (calls, artifacts) in flow.items():
        source = (ROOT / f"stages/{stage}.py").read_text(encoding="utf-8")
        assert calls
        assert artifacts
        for path, function in (call.split(".py:") for call in calls):
            (names,) = re.findall(rf"^from {path.replace('/', '.')} import (\([^)]+\)|.+)$", source, re.MULTILINE)
            assert function in re.findall(r"\w+", names)
            assert re.search(rf"\b{function}\(|partial\(\s*{function}\b", source), function
        outs = STAGES[stage]
        outs = " ".join(list_outs(outs.get("do", outs))).replace("${key}", "*")
        for artifact in artifacts:
            folder = PLACEHOLDER.sub("*", artifact).rstrip("/")
            assert folder in outs or str(Path(folder).parent) in outs, artifact


@pytest.mark.parametrize("key", ["quantizer_init.equalize", "finetuning.end_to_end.norm_lr", "runtime.offload"])
def test_a_setting_leads_to_its_line_in_three_files(key):
    override(read_params(), {key: None})  # it exists
    rows = find_rows(find_section(ARCHITECTURE, f"`{key}`"), 2)
    assert len(rows) >= 3
    sources = [find_source(where.strip("`")) for where, _ in rows]
    assert all(sources)
    assert key.rpartition(".")[2] in sources[0]
    assert len({where.partition(":")[0] for where, _ in rows}) <= 3


def test_where_settings_act():
    rows = find_rows(find_section(ARCHITECTURE, "Where is …"), 3)
    assert {"`prefix_search.outlier_threshold`", "`export.drop`", "`calibration.train.length`"} <= {
        row[0] for row in rows
    }
    sources = [path.read_text("utf-8") for room in ("pipeline", "stages") for path in (ROOT / room).rglob("*.py")]
    for key, way, where in rows:
        override(read_params(), {key.strip("`"): None})
        assert find_source(where.strip("`")), where
        for function in re.findall(r"`(\w+)`", way):
            assert any(f"def {function}(" in source for source in sources), function


@pytest.mark.parametrize("group", Params.model_fields)
def test_params_say_where_each_group_is_typed_and_used(group):
    comment = re.search(rf"((?:^#.*\n)+)^{group}:$", PARAMS, re.MULTILINE)[1]
    typed, used = re.search(r"# Typed in (\S+); used by ((?:.|\n)+)", comment).groups()
    annotation = Params.model_fields[group].annotation
    model = get_args(annotation)[-1] if get_args(annotation) else annotation
    assert typed == model.__module__.replace(".", "/") + ".py"
    folder = Path()
    for name in re.findall(r"[\w/]+\.py", used):
        folder = Path(name).parent if "/" in name else folder
        assert (ROOT / folder / Path(name).name).is_file(), name


def test_sweeps_set_keys_that_exist_to_values_they_take():
    makefile = (ROOT / "Makefile").read_text()
    sweeps = re.findall(r"^sweep-[\w-]+: SWEEP = (.+)$", makefile, re.MULTILINE)
    assert len(sweeps) == 4
    for sweep in sweeps:
        for key, values in re.findall(r"-S ([\w.]+)=(\S+)", sweep):
            for value in values.split(","):
                parse_params(override(read_params(), {key: yaml.safe_load(value)}))


def test_the_plots_page_needs_no_network():
    folder = ROOT / "docs/plots"
    template = (folder / "template.html").read_text()
    scripts = re.findall(r'<script src="([^"]+)">', template)
    assert len(scripts) == 3
    for script in scripts:
        assert script.startswith("../docs/plots/")
        assert (ROOT / script.removeprefix("../")).stat().st_size > 10_000
    assert "{plot_divs}" in template
    assert "{scripts}" not in template
    assert "html_template = ../docs/plots/template.html" in (ROOT / ".dvc/config").read_text()
    licences = (folder / "LICENSES.txt").read_text()
    assert all(f"== {name} " in licences for name in ("vega", "vega-lite", "vega-embed"))

"""Compare runs: a table of results, the settings in which they differ, and a page with both and with pictures.

    prefixquant compare first.work second.work
    prefixquant compare quantized-*
    prefixquant compare                           # the DVC experiments of this project

Arguments are work folders, or folders of quantized models, whose work folders have .work added. Without any, the
present results of the project in this folder are compared with its experiments since the last commit. Results are those
of the exported model. `ratio` is its perplexity over that of the original model.
"""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.pictures.page import format_page, format_table
from pipeline.runtime.arguments import ArgumentError, Parser
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import replacing
from pipeline.runtime.git import list_experiments, read_committed
from prefixquant.report import find_work_folder
from prefixquant.scatter import Point, draw_scatter

RESULTS = Path("metrics/report.json")
COST = Path("metrics/runtime/report.json")
PARAMS = Path("params.yaml")
LOCK = Path("dvc.lock")
CACHE = Path(".dvc/cache/files/md5")
PAGE = Path("comparison.html")
_ABSENT = "-"


@dataclass(frozen=True)
class RunRecord:
    """A run to compare.

    Attributes:
        name: its row's title.
        results: the figures of its report, with `minutes` where they are known.
        settings: dotted key of params.yaml -> value as text.
    """

    name: str
    results: dict[str, Any]
    settings: dict[str, str]


def main() -> None:
    """Run `prefixquant compare`."""
    parser = Parser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="WORK", help="a work folder, or the --out of a run")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"the page to write; default: {PAGE}")
    arguments = parser.parse_args()
    runs = read_runs(arguments.folders) if arguments.folders else read_experiments()
    with replacing(arguments.page) as temporary:
        temporary.write_text(build_comparison(runs), encoding="utf-8")
    print("\n".join([*compare_runs(runs), "", f"With pictures: {arguments.page}"]))


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Return the runs in work folders. A folder that is named twice has one row.

    Raises:
        PipelineError: a folder is none of a run, its run has not reached the report, or a file of it cannot be read.
    """
    places = list({find_work_folder(folder).resolve(): None for folder in folders})
    names = _name_folders(places)
    return [_read_run(name, str(place / RESULTS), _reader(place)) for name, place in zip(names, places, strict=True)]


def read_experiments() -> list[RunRecord]:
    """Return the present results of the project in this folder, and its experiments since the last commit.

    Raises:
        PipelineError: there are none.
    """
    runs = [_read_run("workspace", str(RESULTS), _reader(Path()))] if RESULTS.is_file() else []
    for name, revision in list_experiments().items():
        if read_committed(RESULTS, revision) is not None:
            runs.append(_read_run(name, f"experiment {name}: {RESULTS}", _committed_reader(revision)))
    if not runs:
        raise ArgumentError("no run to compare. Name work folders, or call this in a project with results.")
    return runs


def compare_runs(runs: Sequence[RunRecord]) -> list[str]:
    """Return the lines of a table of results and of a table of the settings that differ."""
    table = _align([["run", *_list_titles(runs)], *_list_rows(runs)])
    return [*table, "", *_describe_differences(runs)] if len(runs) > 1 else table


def build_comparison(runs: Sequence[RunRecord]) -> str:
    """Return a page with a scatter of quality against size, bits and time, and the tables of `compare_runs`."""
    places = {"MiB": "mib", "bits": "bits", "minutes": "minutes"}
    corpora = _list_corpora(runs)
    pictures = []
    for label, key in places.items():
        points = [
            Point(
                x=run.results[key],
                y=ratio,
                label=str(number),
                group=corpora.index(corpus),
                title=f"{run.name}, {corpus}",
            )
            for number, run in enumerate(runs, 1)
            if key in run.results
            for corpus, ratio in run.results["ratio"].items()
        ]
        if points:
            pictures.append(draw_scatter(points, x_label=label, y_label="perplexity, ratio to the original"))
    legend = ", ".join(
        f'<span class="group{place % 4}">●</span> {html.escape(corpus)}' for place, corpus in enumerate(corpora)
    )
    rows = [[f"{number}  {row[0]}", *row[1:]] for number, row in enumerate(_list_rows(runs), 1)]
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0].name
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        "<p>Lower and further left is better. A point has the number of its run, and a colour for each text: "
        f"{legend}.</p>",
        f'<div class="scatters">{"".join(pictures)}</div>',
        "<h2>Results</h2>",
        format_table(["run", *_list_titles(runs)], rows),
        "<h2>Settings that differ</h2>",
    ]
    differences = _list_differences(runs)
    names = [run.name for run in runs]
    parts.append(format_table(["setting", *names], differences) if differences else "<p>None.</p>")
    return format_page(html.escape(title), parts, _STYLE)


_STYLE = """
.scatters { display: flex; flex-wrap: wrap; gap: 1em; } .scatters svg { flex: 1 1 300px; max-width: 480px; }
svg text { fill: currentColor; font-size: 11px; } svg line { stroke: currentColor; opacity: .25; }
.group0 { color: #2f7ed8; fill: #2f7ed8; } .group1 { color: #d9822b; fill: #d9822b; }
.group2 { color: #3a9e5c; fill: #3a9e5c; } .group3 { color: #b05cc6; fill: #b05cc6; }
"""


def _list_titles(runs: Sequence[RunRecord]) -> list[str]:
    """Return the titles of the columns, with the unit where there is one."""
    return ["bits", "prefix", *(f"ratio {corpus}" for corpus in _list_corpora(runs)), "MiB", "minutes"]


def _list_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    corpora = _list_corpora(runs)
    return [
        [
            run.name,
            str(run.results["bits"]),
            str(run.results["prefix"]),
            *(str(run.results["ratio"].get(corpus, _ABSENT)) for corpus in corpora),
            str(run.results["mib"]),
            str(run.results.get("minutes", _ABSENT)),
        ]
        for run in runs
    ]


def _list_corpora(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(corpus for run in runs for corpus in run.results["ratio"]))


def _name_folders(places: Sequence[Path]) -> list[str]:
    """Return a name for each run: the name of its folder, or its path where names are not unique."""
    names = [place.name for place in places]
    return [name if names.count(name) == 1 else str(place) for name, place in zip(names, places, strict=True)]


def _reader(place: Path) -> Callable[[Path], str | None]:
    """Return a function that returns the text of a file in the folder of a run; None where it is missing."""

    def read(name: Path) -> str | None:
        path = place / name
        try:
            return path.read_text(encoding="utf-8") if path.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"{path}: cannot be read ({error}).") from None

    return read


def _committed_reader(revision: str) -> Callable[[Path], str | None]:
    """Return a function that returns the text of a file of an experiment. DVC's cache has those that git lacks."""

    def read(name: Path) -> str | None:
        if name != COST:
            return read_committed(name, revision)
        lock = yaml.safe_load(read_committed(LOCK, revision) or "{}") or {}
        outs = lock.get("stages", {}).get("report", {}).get("outs", [])
        hashes = [out["md5"] for out in outs if out["path"] == name.as_posix()]
        cached = [CACHE / md5[:2] / md5[2:] for md5 in hashes]
        return next((path.read_text(encoding="utf-8") for path in cached if path.is_file()), None)

    return read


def _read_run(name: str, place: str, read: Callable[[Path], str | None]) -> RunRecord:
    """Return a run, whose files `read` returns. Messages name its results as `place`."""
    text = read(RESULTS)
    if text is None:
        raise PipelineError(
            f"{place}: does not exist, because the run has not reached the stage report. Continue it, or leave it out."
        )
    try:
        results = json.loads(text) | json.loads(read(COST) or "{}")
        values = yaml.safe_load(read(PARAMS) or "")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ArgumentError(
            f"{place}, or the files next to it: cannot be read ({error}). Run the stage report again."
        ) from None
    if missing := [key for key in ("bits", "prefix", "ratio", "mib") if key not in results]:
        raise PipelineError(f"{place}: lacks {', '.join(missing)}. Run the stage report again.")
    if not isinstance(values, dict):
        raise ArgumentError(f"{name}: {PARAMS} holds no settings.")
    return RunRecord(name, results, _flatten(values))


def _flatten(values: dict[str, Any], path: str = "") -> dict[str, str]:
    """Return dotted key -> value as text: {"a": {"b": 4}} -> {"a.b": "4"}. An empty group keeps its key."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        dotted = f"{path}{key}"
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{dotted}.")
        else:
            flat[dotted] = yaml.safe_dump(value, default_flow_style=True, width=10**6).partition("\n")[0]
    return flat


def _list_differences(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Return a row for each setting that differs: its key, and its value in each run."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [[key, *(run.settings.get(key, _ABSENT) for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _describe_differences(runs: Sequence[RunRecord]) -> list[str]:
    rows = _list_differences(runs)
    names = [run.name for run in runs]
    return _align([["setting that differs", *names], *rows]) if rows else ["All settings are equal."]


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]

"""Compare runs: a table with the results of several work folders, and the settings in which they differ.

    prefixquant compare first.work second.work
    prefixquant compare quantized-*

Arguments are work folders, or folders of quantized models, whose work folders have .work added. Results are those of
the exported model. `ratio` is its perplexity over that of the original model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.runtime.arguments import ArgumentError, Parser
from pipeline.runtime.errors import PipelineError
from prefixquant.report import find_work_folder

RESULTS = Path("metrics/report.json")
PARAMS = Path("params.yaml")
_ABSENT = "-"


def main() -> None:
    """Run `prefixquant compare`."""
    parser = Parser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="WORK", help="a work folder, or the --out of a run")
    print("\n".join(compare_runs(parser.parse_args().folders)))


def compare_runs(folders: Sequence[Path]) -> list[str]:
    """Return the lines of a table of results and of a table of the settings that differ.

    Args:
        folders: work folders or folders of quantized models. One that is named twice has one row.

    Raises:
        PipelineError: a folder is none of a run, its run has not reached the report, or a file of it cannot be read.
    """
    places = list({find_work_folder(folder).resolve(): None for folder in folders})
    names = _name_folders(places)
    results = [_read_results(place) for place in places]
    settings = [_flatten(_read_params(place)) for place in places]
    table = _align([["run", *_list_titles(results)], *_list_rows(names, results)])
    return [*table, "", *_describe_differences(names, settings)] if len(places) > 1 else table


def _list_titles(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the titles of the columns, with the unit where there is one."""
    return ["bits", "prefix", *(f"ratio {corpus}" for corpus in _list_corpora(results)), "MiB", "minutes"]


def _list_rows(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[list[str]]:
    corpora = _list_corpora(results)
    return [
        [
            name,
            str(result["bits"]),
            str(result["prefix"]),
            *(str(result["ratio"].get(corpus, _ABSENT)) for corpus in corpora),
            str(result["mib"]),
            str(result["minutes"]),
        ]
        for name, result in zip(names, results, strict=True)
    ]


def _list_corpora(results: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(corpus for result in results for corpus in result["ratio"]))


def _name_folders(places: Sequence[Path]) -> list[str]:
    """Return a name for each run: that of its folder, or its path where names are not unique."""
    names = [place.name for place in places]
    return [name if names.count(name) == 1 else str(place) for name, place in zip(names, places, strict=True)]


def _read_results(work: Path) -> dict[str, Any]:
    from pipeline.runtime.artifacts import load_json

    path = work / RESULTS
    if not path.is_file():
        raise PipelineError(
            f"{path}: does not exist, because the run has not reached the stage report. Continue it, or leave it out."
        )
    results = load_json(path, "report")
    if missing := [key for key in ("bits", "prefix", "ratio", "mib", "minutes") if key not in results]:
        raise PipelineError(f"{path}: lacks {', '.join(missing)}. Run the stage report again.")
    return results


def _read_params(work: Path) -> dict[str, Any]:
    path = work / PARAMS
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(values, dict):
        raise ArgumentError(f"{path}: holds no settings.")
    return values


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


def _describe_differences(names: Sequence[str], settings: Sequence[dict[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for values in settings for key in values)
    rows = [[key, *(values.get(key, _ABSENT) for values in settings)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return _align([["setting that differs", *names], *rows]) if rows else ["All settings are equal."]


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]

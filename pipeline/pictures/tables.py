"""Markdown tables of results, and the error of a mean."""

import math
from collections.abc import Mapping
from typing import Any

import torch


def format_markdown(head: list[str], lines: list[list[str]], titles: int = 1) -> str:
    """Return a Markdown table. The first `titles` columns are aligned to the left, the others to the right."""
    texts = ["|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in (head, *lines)]
    return "\n".join([texts[0], "|" + " --- |" * titles + " ---: |" * (len(head) - titles), *texts[1:]])


def list_result_columns(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns of a table of evaluations: perplexity and its ratio for each corpus, accuracy for each task.

    Args:
        rows: a row's name -> metrics of `evaluation`. Ratios are to the row `original`, which must be there.

    Returns:
        The columns' titles, and the cells of each row.
    """
    original = rows["original"]
    tasks = [task for task, scores in original.get("tasks", {}).items() if "acc" in scores]
    head = [title for corpus in original["perplexity"] for title in (corpus, "ratio")] + tasks
    cells: dict[str, list[str]] = {}
    for name, metrics in rows.items():
        cells[name] = []
        for corpus, base in original["perplexity"].items():
            value = metrics["perplexity"][corpus]
            cells[name] += [f"{value:.2f}", f"{value / base:.2f}"]
        cells[name] += [f"{metrics['tasks'][task]['acc']:.3f}" for task in tasks]
    return head, cells


def format_results(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of evaluations; see `list_result_columns`."""
    head, cells = list_result_columns(rows)
    return format_markdown(["", *head], [[name, *row] for name, row in cells.items()])


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Return the mean of values [N] and its standard error, which is NaN for a single value."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))

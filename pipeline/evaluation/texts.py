"""Evaluate an exported folder outside the pipeline: perplexity of any text, and lm-eval tasks.

    python -m pipeline.evaluate artifacts/export --text my.txt --length 2048
    python -m pipeline.evaluate artifacts/export --tasks piqa,arc_easy --limit 200 --json results.json

Perplexity is the field's: documents joined by blank lines, consecutive windows; a last, shorter window is left out. In
front of each window stands what the folder says, a start token or nothing; it is no target. Windows and tasks are
computed as the pipeline computes them.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluation.params import TaskParams
from pipeline.evaluation.perplexity import evaluate_model
from pipeline.inference.loading import load
from pipeline.inference.text_interface import TextInterface, read_interface
from pipeline.runtime.arguments import ArgumentError, Parser, check_writable, device, whole
from pipeline.runtime.artifacts import write_json
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.progress import return_freed_memory
from pipeline.text.calibration import cut_documents
from pipeline.text.corpora import read_local_documents


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument("--text", type=Path, action="append", default=[], help=".txt, .jsonl, .json, .csv or .parquet")
    parser.add_argument("--text-field", default="text", help="of files with fields")
    parser.add_argument("--length", type=whole(2), default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=whole(1), help="so many windows of each text; all when left out")
    parser.add_argument("--tasks", default="", help="names of lm-eval tasks, or of this project's, with commas")
    parser.add_argument("--task-folder", help="folder with YAML files of tasks of your own")
    parser.add_argument("--num-fewshot", type=whole(0))
    parser.add_argument("--limit", type=whole(1), help="the first so many items of each task")
    parser.add_argument("--batch-size", type=whole(1), default=4)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--arithmetic", choices=("float", "integer"), default="float")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    arguments = parser.parse_args()
    return_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    names = [name for name in arguments.tasks.split(",") if name]
    if not names and not arguments.text:
        raise PipelineError("nothing to evaluate: give --text, --tasks, or both")
    if arguments.json:
        check_writable(arguments.json)
    results = evaluate_folder(arguments, names)
    print(json.dumps(results, indent=2))
    if arguments.json:
        write_json(arguments.json, results)


def evaluate_folder(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Return metrics as in `metrics/evaluation/`. Texts and tasks are read before the weights are."""
    interface = read_interface(arguments.folder)
    windows = cut_texts(arguments, interface) if arguments.text else {}
    asked = {name: TaskParams(num_fewshot=arguments.num_fewshot, limit=arguments.limit) for name in names}
    if asked:
        from pipeline.evaluation.harness import run_tasks
        from pipeline.evaluation.task_data import open_tasks

        tasks = open_tasks(asked, arguments.task_folder)
    model, tokenizer = load(arguments.folder, arguments.device, arguments.arithmetic)
    results: dict[str, Any] = {}
    if windows:
        results |= evaluate_model(model, windows, arguments.batch_size, None)[0]
    if asked:
        results |= run_tasks(model, tokenizer, tasks, arguments.batch_size)
    return results


def cut_texts(arguments: argparse.Namespace, interface: TextInterface) -> dict[str, torch.Tensor]:
    """Return text -> its windows [N, T].

    Raises:
        ArgumentError: windows of `--length` do not fit into the model.
        CorpusError: a text is missing, unreadable or empty.
        WindowsError: a text is too short.
    """
    check_length(interface, arguments.length)
    documents = {path: read_local_documents(path, arguments.text_field) for path in arguments.text}
    return {
        name: cut_documents(documents[path], arguments.windows, arguments.length, interface.tokenizer, str(path))
        for name, path in zip(name_texts(arguments.text), arguments.text, strict=True)
    }


def name_texts(paths: list[Path]) -> list[str]:
    """What each text's results are called: its file's name, or its path where others have the same name."""
    names = [path.name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def check_length(interface: TextInterface, length: int) -> None:
    """Raise ArgumentError where windows of `length` tokens do not fit into the positions of the model."""
    before, limit = interface.tokens_before_text, interface.max_positions
    if before + length > limit:
        raise ArgumentError(
            f"--length {length}: with {before} tokens in front this exceeds the {limit} positions of this model; use "
            f"at most {limit - before}"
        )

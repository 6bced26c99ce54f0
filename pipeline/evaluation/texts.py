"""Evaluate an exported folder outside of the pipeline: perplexity on any text, and lm-eval tasks.

    python -m pipeline.evaluate artifacts/export --text my.txt --length 2048
    python -m pipeline.evaluate artifacts/export --tasks piqa,arc_easy --limit 200 --json results.json

Perplexity is measured in the field's usual way: documents are joined by blank lines and cut into consecutive windows; a
last, shorter window is left out. Each window begins with a start token where the folder asks for one, which is not a
target. Windows and tasks are computed as in the pipeline.
"""

import argparse
import functools
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
from pipeline.runtime.progress import return_freed_memory
from pipeline.text.calibration import check_token_ids, cut_documents
from pipeline.text.corpora import read_local_documents

_FILES = "a .txt, .jsonl, .json, .csv or .parquet file, or a folder of them"


def main() -> None:
    """Run the command line `python -m pipeline.evaluate`."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        help=_FILES,
    )
    parser.add_argument("--text-field", default="text", help="the field that holds the text, in files with fields")
    parser.add_argument("--length", type=whole(2), default=2048, help="tokens in a window")
    parser.add_argument("--windows", type=whole(1), help="the first windows of each text; default: all")
    parser.add_argument("--tasks", default="", help="tasks of lm-eval or of this project, separated by commas")
    parser.add_argument("--task-folder", help="folder with YAML files of your own tasks")
    parser.add_argument("--num-fewshot", type=whole(0), help="examples in each prompt; default: the task's own number")
    parser.add_argument("--limit", type=whole(1), help="the first items of each task; default: all")
    parser.add_argument("--batch-size", type=whole(1), default=4, help="windows or requests at a time")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument(
        "--arithmetic",
        choices=("float", "integer"),
        default="float",
        help="integer: multiply integers, faster on a CPU",
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    return_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    names = [name for name in arguments.tasks.split(",") if name]
    if not names and not arguments.text:
        raise ArgumentError("there is nothing to evaluate. Give --text, --tasks, or both.")
    if arguments.json:
        check_writable(arguments.json)
    results = evaluate_folder(arguments, names)
    print(json.dumps(results, indent=2))
    if arguments.json:
        write_json(arguments.json, results)


def evaluate_folder(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Return the metrics that a metrics file of the stage `evaluation` holds.

    Texts and tasks are read and checked before the weights are loaded.
    """
    interface = read_interface(arguments.folder)
    windows = cut_texts(arguments, interface) if arguments.text else {}
    asked = {name: TaskParams(num_fewshot=arguments.num_fewshot, limit=arguments.limit) for name in names}
    ask = None
    if asked:
        from pipeline.evaluation.harness import run_tasks
        from pipeline.evaluation.task_data import open_tasks

        ask = functools.partial(run_tasks, tasks=open_tasks(asked, arguments.task_folder))
    model, tokenizer = load(arguments.folder, arguments.device, arguments.arithmetic)
    results: dict[str, Any] = {}
    if windows:
        results |= evaluate_model(model, windows, arguments.batch_size, None)[0]
    if ask is not None:
        results |= ask(model, tokenizer, batch_size=arguments.batch_size)
    return results


def cut_texts(arguments: argparse.Namespace, interface: TextInterface) -> dict[str, torch.Tensor]:
    """Return text -> its windows [N, T].

    Raises:
        ArgumentError: windows of `--length` do not fit into the model.
        CorpusError: a text is missing, unreadable or empty.
        WindowsError: a text is too short, or holds tokens that the model has no embedding for.
    """
    check_length(interface, arguments.length)
    documents = {path: read_local_documents(path, arguments.text_field) for path in arguments.text}
    windows = {}
    for name, path in zip(name_texts(arguments.text), arguments.text, strict=True):
        tokenizer = interface.tokenizer
        windows[name] = cut_documents(documents[path], arguments.windows, arguments.length, tokenizer, str(path))
        check_token_ids(windows[name], interface.vocab_size, tokenizer, str(path))
    return windows


def name_texts(paths: list[Path]) -> list[str]:
    """Return a name for each text's results: the name of its file, or its path where names are not unique."""
    names = [path.name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def check_length(interface: TextInterface, length: int) -> None:
    """Raise ArgumentError where windows of `length` tokens do not fit into the positions of the model."""
    before, limit = interface.tokens_before_text, interface.max_positions
    if before + length > limit:
        raise ArgumentError(
            f"--length={length}: with {before} tokens before each window this exceeds the {limit} positions of the "
            f"model. Use at most {limit - before}."
        )

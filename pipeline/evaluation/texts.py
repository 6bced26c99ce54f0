"""Evaluate a folder outside of the pipeline: perplexity on any text, and lm-eval tasks.

    prefixquant evaluate artifacts/export --text my.txt --length 2048
    prefixquant evaluate artifacts/export --tasks piqa,arc_easy --limit 200 --json results.json
    prefixquant evaluate artifacts/export --original path/to/original --text my.txt

The folder is an exported one, or a plain Hugging Face model (perplexity only). With --original both are evaluated on
the same windows. The results then hold the ratio of both perplexities, the KL divergence in nats per token and the
share of positions where both rank the same token first.

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

from pipeline.evaluation.folders import (
    Side,
    check_same_tokens,
    describe_comparison,
    describe_scores,
    is_plain,
    load_plain,
    open_exported,
    open_plain,
    read_plain_interface,
    score_sides,
)
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
    parser.add_argument("folder", type=Path, help="an exported model, or a plain one")
    parser.add_argument("--original", type=Path, metavar="FOLDER", help="the model to compare with, exported or plain")
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
    if arguments.original and not arguments.text:
        raise ArgumentError(f"--original={arguments.original}: models are compared on texts. Give --text.")
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
    folders = [arguments.folder, *([arguments.original] if arguments.original else [])]
    plain = [is_plain(folder) for folder in folders]
    interfaces = [
        read_plain_interface(folder) if alone else read_interface(folder)
        for folder, alone in zip(folders, plain, strict=True)
    ]
    if plain[0] and names:
        raise ArgumentError(f"--tasks: {arguments.folder} is a plain model. Use lm-eval's own --model hf for it.")
    if plain[0] and arguments.arithmetic == "integer":
        raise ArgumentError("--arithmetic=integer: a plain model has no integers. Leave it out.")
    if arguments.original:
        check_same_tokens(arguments.folder, interfaces[0], arguments.original, interfaces[1])
        check_length(interfaces[1], arguments.length)
    windows = cut_texts(arguments, interfaces[0]) if arguments.text else {}
    asked = {name: TaskParams(num_fewshot=arguments.num_fewshot, limit=arguments.limit) for name in names}
    ask = None
    if asked:
        from pipeline.evaluation.harness import run_tasks
        from pipeline.evaluation.task_data import open_tasks

        ask = functools.partial(run_tasks, tasks=open_tasks(asked, arguments.task_folder))
    results: dict[str, Any] = {}
    if plain[0]:
        side = open_plain(load_plain(arguments.folder, arguments.device), windows, interfaces[0].text_start_token_id)
    else:
        model, tokenizer = load(arguments.folder, arguments.device, arguments.arithmetic)
        tensors: dict[str, torch.Tensor] = {}
        if windows:
            results, tensors, _ = evaluate_model(model, windows, arguments.batch_size, None)
        if ask is not None:
            results |= ask(model, tokenizer, batch_size=arguments.batch_size)
        side = open_exported(model, tensors)
    if plain[0] or arguments.original:
        original = open_original(arguments, windows, plain[-1], interfaces[-1]) if arguments.original else None
        scores, original_scores = score_sides(windows, side, original)
        results |= describe_scores(scores)
        if original is not None:
            results |= describe_comparison(scores, original_scores)
    return results


def open_original(
    arguments: argparse.Namespace, windows: dict[str, torch.Tensor], plain: bool, interface: TextInterface
) -> Side:
    """Load the model that `--original` names, and return its side."""
    if plain:
        return open_plain(load_plain(arguments.original, arguments.device), windows, interface.text_start_token_id)
    model, _ = load(arguments.original, arguments.device, arguments.arithmetic)
    return open_exported(model, evaluate_model(model, windows, arguments.batch_size, None)[1])


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

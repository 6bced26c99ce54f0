"""Tasks of the LM Evaluation Harness (lm-eval) on models with a prefix.

    python -m pipeline.lm_eval_tasks run --model prefixquant --model_args path=artifacts/export --tasks piqa

This is lm-eval's own command line with two additions: the model type `prefixquant` and the tasks in
`evaluation/tasks/`. Stages call `run_tasks`. lm-eval makes the requests and scores them. `PrefixedLM` only corrects its
idea of a model for the prefix: the prefix takes up positions, and no start token may follow a prefix that ends in one.
Where texts begin with a start token, the tokenizer adds it.
"""

import inspect
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval import evaluator
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import register_model
from lm_eval.config import evaluate_config
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.task_data import FOLDER, Tasks
from pipeline.inference.loading import load
from pipeline.inference.text_interface import TextInterface, describe_interface, read_interface
from pipeline.models.special_tokens import read_token
from pipeline.runtime.arguments import check_writable, find_device_problem
from pipeline.runtime.errors import PipelineError, reading

logger = logging.getLogger(__name__)

MODEL = "prefixquant"  # lm-eval's name for `PrefixedLM`
COMMONSENSE = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
# Errors raised in these modules are about tasks and their data; "random" draws examples for prompts.
_TASK_MODULES = ("lm_eval", "datasets", "jinja2", "yaml", "random")
_REFUSED_ARGUMENTS = ("peft", "delta", "parallelize", "autogptq", "gptqmodel", "gguf_file", "tp_plan")
_METRICS = ("acc", "acc_norm", "exact_match", "word_perplexity", "perplexity")


class PrefixedLM(HFLM):
    """lm-eval's class for transformers models, for a model that may have a prefix."""

    def __init__(
        self,
        path: str | None = None,
        pretrained: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load an exported folder, or wrap a model in memory.

        Args:
            path: the exported folder.
            pretrained: the exported folder under the name that lm-eval has for it, or a model in memory.
            tokenizer: the tokenizer of a model in memory.
            device: lm-eval passes cuda:0 by default, so a device that does not exist is replaced by one that does.
            kwargs: arguments of lm-eval's class. `dtype` and those that it does not have are passed on to `load`.

        Raises:
            PipelineError: no folder is given, or an argument does not apply to exported models. lm-eval would ignore
                such an argument for a model in memory.
        """
        path = pretrained if isinstance(pretrained, str) else path
        if path is None and pretrained is None:
            raise PipelineError(
                "--model=prefixquant: no exported folder is given. Add --model_args path=artifacts/export."
            )
        for name in _REFUSED_ARGUMENTS:
            if kwargs.get(name):
                raise PipelineError(f"{name}={kwargs[name]!r}: not an argument of --model prefixquant. Leave it out.")
        check_batch_size(kwargs.get("batch_size", 1))
        if path is not None:
            interface = read_interface(Path(path))
        elif isinstance(pretrained, PreTrainedModel) and tokenizer is not None:
            interface = describe_interface(pretrained, tokenizer)
        else:
            raise PipelineError("a model in memory needs its tokenizer. Pass tokenizer=.")
        check_special_tokens(interface.tokenizer)
        if interface.prefix_tokens:
            kwargs["max_length"] = choose_max_length(interface, kwargs.get("max_length"))
        if path is not None:
            names = (kwargs.keys() - inspect.signature(HFLM).parameters.keys()) | (kwargs.keys() & {"dtype"})
            options = {name: kwargs.pop(name) for name in sorted(names)}
            pretrained, tokenizer = load(Path(path), choose_device(device), **options)
        assert pretrained is not None
        ends_in_start_token = interface.prefix_tokens > 0 and interface.text_start_token_id is None
        self.start_token = read_token(interface.tokenizer, "bos") if ends_in_start_token else None
        if ends_in_start_token:
            kwargs = {"add_bos_token": False} | kwargs
        super().__init__(pretrained, backend="causal", tokenizer=tokenizer, **kwargs)

    @property
    def prefix_token_id(self) -> int:
        """Return the token of an empty context: the start token, or a line break where the prefix ends in it."""
        if self.start_token is None or self.custom_prefix_token_id is not None:
            return super().prefix_token_id
        return self.tokenizer.encode("\n", add_special_tokens=False)[-1]

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Return the token ids of a text without a start token that the prefix has."""
        return super().tok_encode(self._strip(string), *args, **kwargs)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        """Return the token ids of texts without a start token that the prefix has."""
        return super().tok_batch_encode([self._strip(string) for string in strings], *args, **kwargs)

    def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
        """Return generated texts. Raise PipelineError where the tokenizer has no end token."""
        if self.tokenizer.eos_token_id is None:
            raise PipelineError(
                "eos_token=null in tokenizer_config.json: tasks that generate text need an end token. Set one."
            )
        return super().generate_until(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """Return a chat as text. Raise PipelineError where the template fails."""
        with reading(lambda why: PipelineError(f"the chat template fails ({why}). Leave out --apply_chat_template.")):
            return super().apply_chat_template(*args, **kwargs)

    def _strip(self, string: str) -> str:
        if not isinstance(string, str):  # the task takes a field of another type for text
            raise PipelineError(
                f"lm-eval: a task gives {string!r} ({type(string).__name__}) where text is expected. Correct the task."
            )
        return string if self.start_token is None else string.removeprefix(self.start_token)


register_model(MODEL)(PrefixedLM)  # a decorator without types would hide the class


def check_batch_size(batch_size: int | str | None) -> None:
    """Raise PipelineError unless lm-eval takes it: a whole number of at least 1, `auto`, or `auto:N`."""
    if not re.fullmatch(r"auto(:\d+(\.\d*)?)?|0*[1-9]\d*", str(batch_size)):
        raise PipelineError(f"batch_size={batch_size!r}: expected a whole number of at least 1, or auto, or auto:N.")


def check_special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise PipelineError unless a tokenizer has a start or end token, one of which lm-eval needs."""
    if tokenizer is not None and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise PipelineError(
            "bos_token=null and eos_token=null in tokenizer_config.json: lm-eval needs one of the two. Set one."
        )


def choose_max_length(interface: TextInterface, max_length: Any) -> int:
    """Return the longest text after the prefix, at most the one asked for (None: all that fits).

    Raises:
        PipelineError: `max_length` is not a whole number, or does not fit.
    """
    longest = interface.max_positions - interface.prefix_tokens
    length = longest if max_length is None else max_length
    if not isinstance(length, int) or not 1 <= length <= longest:
        raise PipelineError(f"max_length={length!r}: expected a whole number from 1 to {longest}, without the prefix.")
    return length


def choose_device(device: str | None) -> str | None:
    """Return the device, or a GPU or the CPU where that device does not exist."""
    if device is None or find_device_problem(str(device)) is None:
        return device
    present = "cuda" if torch.cuda.is_available() else "cpu"
    logger.warning("device=%s does not exist here, %s is used instead", device, present)
    return present


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, batch_size: int
) -> dict[str, Any]:
    """Ask a model all tasks.

    Returns:
        `tasks`: task -> metric -> value. `task_items`: task -> number of items. `average` of acc, and of acc_norm (acc
        where a task has none), if all five of `COMMONSENSE` were asked. `tasks_skipped`, if there are any.

    Raises:
        PipelineError: lm-eval cannot ask a task, or a metric is unknown or not finite; names the task.
    """
    lm = PrefixedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    scores: dict[str, dict[str, float]] = {}
    items: dict[str, int] = {}
    for name, params in tasks.asked.items():
        with reporting(f"lm-eval, task {name}"), leaving_out_environment():
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=[name],
                num_fewshot=params.num_fewshot,
                limit=params.limit,
                task_manager=tasks.manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        if results is None:
            raise PipelineError(f"lm-eval, task {name}: it returns results only on the first rank. Use one process.")
        scores[name] = _pick_metrics(results["results"][name])
        if not scores[name]:
            raise PipelineError(f"lm-eval, task {name}: none of its metrics is one of {', '.join(_METRICS)}.")
        if not all(map(math.isfinite, scores[name].values())):
            raise PipelineError(f"lm-eval, task {name}: {scores[name]}. The model or its quantizers are broken.")
        items[name] = sum(count["effective"] for count in results["n-samples"].values())
    metrics: dict[str, Any] = {"tasks": scores, "task_items": items} if scores else {}
    if set(COMMONSENSE) <= set(scores):
        five = [scores[name] for name in COMMONSENSE]
        values_of = {
            "acc": [metric["acc"] for metric in five],
            "acc_norm": [metric.get("acc_norm", metric["acc"]) for metric in five],
        }
        metrics["average"] = {name: round(sum(values) / len(values), 4) for name, values in values_of.items()}
    return metrics | ({"tasks_skipped": tasks.skipped} if tasks.skipped else {})


@contextmanager
def leaving_out_environment() -> Iterator[None]:
    """Have lm-eval add nothing about the machine and the repository to its results, which are not kept.

    It would take seconds for each task, and print a complaint of git where there is no repository.
    """
    present = {name: getattr(evaluator, name) for name in ("get_git_commit_hash", "add_env_info")}
    for name in present:
        setattr(evaluator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, function in present.items():
            setattr(evaluator, name, function)


def reporting(subject: str) -> AbstractContextManager[None]:
    """Turn errors of lm-eval and of the modules it reads tasks with into one message. Other errors pass unchanged."""
    return reading(lambda why: PipelineError(f"{subject}: {why}"), *_TASK_MODULES)


def _pick_metrics(results: Mapping[str, object]) -> dict[str, float]:
    """Return known metrics by their short names, of several filters the first: {"acc,none": 0.5} -> {"acc": 0.5}."""
    metrics: dict[str, float] = {}
    for key, value in results.items():
        metric = key.partition(",")[0]
        if metric in _METRICS and isinstance(value, int | float):
            metrics.setdefault(metric, round(float(value), 4))
    return metrics


class CheckedConfig(EvaluatorConfig):
    """lm-eval's settings of a run; everything that needs no weights is checked before lm-eval loads the model."""

    def process_tasks(self, metadata: dict[str, Any] | None = None) -> TaskManager:
        """Return lm-eval's manager of tasks, after loading all of them with their data.

        Raises:
            PipelineError: the exported folder is missing or damaged, or lacks the chat template that is asked for.
        """
        path = self.model_args.get("path", self.model_args.get("pretrained"))
        if self.model == MODEL and path is not None:
            interface = read_interface(Path(str(path)))
            if self.apply_chat_template:
                name = self.apply_chat_template if isinstance(self.apply_chat_template, str) else None
                with reading(lambda why: PipelineError(f"--apply_chat_template: there is none ({why}). Leave it out.")):
                    interface.tokenizer.get_chat_template(name)
        manager = super().process_tasks(metadata)
        manager.load(self.tasks)
        return manager


@contextmanager
def checking_first() -> Iterator[None]:
    """Have lm-eval's command line use `CheckedConfig` for its settings."""
    evaluate_config.EvaluatorConfig = CheckedConfig
    try:
        yield
    finally:
        evaluate_config.EvaluatorConfig = EvaluatorConfig


def run_command_line() -> None:
    """Run lm-eval's command line, with the tasks and the model type of this project."""
    parser = HarnessCLI()
    arguments = parser.parse_args()
    include_path = getattr(arguments, "include_path", None)
    arguments.include_path = [str(FOLDER), include_path] if include_path else str(FOLDER)
    if getattr(arguments, "output_path", None):  # lm-eval would only log after the work that it cannot write there
        path = Path(arguments.output_path)
        check_writable(path if path.suffix == ".json" else path / "results.json")
    with checking_first(), reporting("lm-eval"):
        parser.execute(arguments)

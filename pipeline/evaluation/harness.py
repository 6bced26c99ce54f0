"""Tasks of the LM Evaluation Harness (lm-eval) on models with a prefix.

    python -m pipeline.lm_eval_tasks run --model prefixquant --model_args path=artifacts/export --tasks piqa

takes lm-eval's own arguments: it adds the model type `prefixquant` and the tasks in `evaluation/tasks/`, and lm-eval
does the rest. Stages call `run_tasks`. Requests are lm-eval's own, log-likelihoods and texts those of
`inference/prefixed_model.py`; what is changed is what a prefix changes: it takes up some of the model's positions, and
no start token follows one that ends in it. Where texts begin with a start token, the tokenizer puts it there.
"""

import inspect
import logging
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import torch
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
from pipeline.runtime.arguments import check_writable, find_device_problem
from pipeline.runtime.errors import PipelineError, reading

logger = logging.getLogger(__name__)

MODEL = "prefixquant"  # lm-eval's name for `PrefixedLM`
COMMONSENSE = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
_READERS = ("lm_eval", "datasets", "jinja2", "yaml", "random")
_OF_OTHER_MODELS = ("peft", "delta", "parallelize", "autogptq", "gptqmodel", "gguf_file", "tp_plan")
_METRICS = ("acc", "acc_norm", "exact_match", "word_perplexity", "perplexity")


@register_model(MODEL)
class PrefixedLM(HFLM):
    """lm-eval's own class for transformers models, around a model that may begin with a prefix."""

    def __init__(
        self,
        path: str | None = None,
        pretrained: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Of an exported folder, `path` or, by the name lm-eval's own class has for it, `pretrained`; or of a model in
        memory. A device that is not there gives way to one that is, as in lm-eval's own: it names cuda:0 by itself.
        `dtype` and what lm-eval's own class does not know are options of loading; what it would do with another model
        only, and leave out without a word with this one, is refused.
        """
        path = pretrained if isinstance(pretrained, str) else path
        if path is None and pretrained is None:
            raise PipelineError("--model prefixquant needs the exported folder: --model_args path=artifacts/export")
        if unused := [name for name in _OF_OTHER_MODELS if kwargs.get(name)]:
            raise PipelineError(f"--model prefixquant takes no {unused[0]}={kwargs[unused[0]]!r}; leave it out")
        check_batch_size(kwargs.get("batch_size", 1))
        interface = describe_interface(pretrained, tokenizer) if path is None else read_interface(Path(path))
        if interface.prefix_tokens:
            kwargs["max_length"] = choose_max_length(interface, kwargs.get("max_length"))
        if path is not None:
            names = (kwargs.keys() - inspect.signature(HFLM).parameters.keys()) | (kwargs.keys() & {"dtype"})
            options = {name: kwargs.pop(name) for name in sorted(names)}
            pretrained, tokenizer = load(Path(path), choose_device(device), **options)
        replaced = interface.prefix_tokens > 0 and interface.text_start_token_id is None
        self.start_token = tokenizer.bos_token if replaced else None
        if replaced:
            kwargs = {"add_bos_token": False} | kwargs
        super().__init__(pretrained, backend="causal", tokenizer=tokenizer, **kwargs)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context consists of: the start token, or, where the prefix has that already, a line break."""
        if self.start_token is None or self.custom_prefix_token_id is not None:
            return super().prefix_token_id
        return self.tokenizer.encode("\n", add_special_tokens=False)[-1]

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        return super().tok_encode(self._strip(string), *args, **kwargs)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        return super().tok_batch_encode([self._strip(string) for string in strings], *args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        with reading(lambda why: PipelineError(f"the model's chat template cannot be applied ({why})")):
            return super().apply_chat_template(*args, **kwargs)

    def _strip(self, string: str) -> str:
        if not isinstance(string, str):  # a field of a row, taken for text
            raise PipelineError(f"lm-eval: a task gives {string!r} ({type(string).__name__}) where text is expected")
        return string if self.start_token is None else string.removeprefix(self.start_token)


def check_batch_size(batch_size: int | str | None) -> None:
    """Raise PipelineError unless lm-eval takes it: a whole number of at least 1, `auto`, or `auto:N`."""
    if not re.fullmatch(r"auto(:\d+(\.\d*)?)?|0*[1-9]\d*", str(batch_size)):
        raise PipelineError(f"batch_size={batch_size!r}: expected a whole number of at least 1, or auto, or auto:N")


def choose_max_length(interface: TextInterface, max_length: Any) -> int:
    """Return the longest text after the prefix, at most the one asked for (None: all that fits).

    Raises:
        PipelineError: `max_length` is no number, or does not fit.
    """
    longest = interface.max_positions - interface.prefix_tokens
    length = longest if max_length is None else max_length
    if not isinstance(length, int) or not 1 <= length <= longest:
        raise PipelineError(f"max_length={length!r} is none of the 1 to {longest} behind the prefix")
    return length


def choose_device(device: str | None) -> str | None:
    """The device, or, where it is not there, a GPU or the CPU."""
    if device is None or find_device_problem(str(device)) is None:
        return device
    found = "cuda" if torch.cuda.is_available() else "cpu"
    logger.warning("device %s is not there: going on with %s", device, found)
    return found


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, batch_size: int
) -> dict[str, Any]:
    """Ask a model everything.

    Returns:
        `tasks.<task>.<metric>`; `average`, of acc and of acc_norm (acc where a task has none), where all five of
        `COMMONSENSE` were asked; `task_items`, how many items each had; `tasks_skipped`, where there are any.
    """
    lm = PrefixedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found: dict[str, dict[str, float]] = {}
    items: dict[str, int] = {}
    for name, own in tasks.asked.items():
        with asking(f"lm-eval, task {name}"):
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=[name],
                num_fewshot=own.num_fewshot,
                limit=own.limit,
                task_manager=tasks.manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        found[name] = _pick_metrics(results["results"][name])
        if not found[name]:
            raise PipelineError(f"lm-eval, task {name}: none of its metrics is one of {', '.join(_METRICS)}")
        if not all(map(math.isfinite, found[name].values())):
            raise PipelineError(f"lm-eval, task {name}: {found[name]}; the model or its quantizers are broken")
        items[name] = sum(count["effective"] for count in results["n-samples"].values())
    metrics: dict[str, Any] = {"tasks": found, "task_items": items} if found else {}
    if set(COMMONSENSE) <= set(found):
        five = [found[name] for name in COMMONSENSE]
        means = {"acc": [own["acc"] for own in five], "acc_norm": [own.get("acc_norm", own["acc"]) for own in five]}
        metrics["average"] = {name: round(sum(values) / len(values), 4) for name, values in means.items()}
    return metrics | ({"tasks_skipped": tasks.skipped} if tasks.skipped else {})


def asking(what: str) -> AbstractContextManager[None]:
    """What lm-eval refuses, or what it reads tasks with, is one message; an error of ours or the model's stays one."""
    return reading(lambda why: PipelineError(f"{what}: {why}"), *_READERS)


def _pick_metrics(results: dict[str, Any]) -> dict[str, float]:
    """{"acc,none": 0.5, "acc_stderr,none": …} -> {"acc": 0.5}; of several filters the first."""
    found: dict[str, float] = {}
    for key, value in results.items():
        metric = key.partition(",")[0]
        if metric in _METRICS and isinstance(value, int | float):
            found.setdefault(metric, round(float(value), 4))
    return found


class CheckedConfig(EvaluatorConfig):
    """lm-eval's settings of a run, with everything checked that needs no weights before lm-eval loads the model."""

    def process_tasks(self, metadata: dict[str, Any] | None = None) -> TaskManager:
        """Return lm-eval's manager of tasks, once every task has its data and the exported folder can be asked.

        Raises:
            PipelineError: the folder is none, or has no chat template although one is to be applied.
        """
        path = self.model_args.get("path", self.model_args.get("pretrained"))
        if self.model == MODEL and path is not None:
            interface = read_interface(Path(str(path)))
            if self.apply_chat_template:
                name = self.apply_chat_template if isinstance(self.apply_chat_template, str) else None
                with reading(lambda why: PipelineError(f"--apply_chat_template: the model has none ({why})")):
                    interface.tokenizer.get_chat_template(name)
        manager = super().process_tasks(metadata)
        manager.load(self.tasks)
        return manager


@contextmanager
def checking_first() -> Iterator[None]:
    """Let lm-eval's command line read its settings with `CheckedConfig` inside of the frame."""
    evaluate_config.EvaluatorConfig = CheckedConfig
    try:
        yield
    finally:
        evaluate_config.EvaluatorConfig = EvaluatorConfig


def run_command_line() -> None:
    """Run lm-eval's command line, with our tasks and the model type `prefixquant`. lm-eval's errors are one message."""
    parser = HarnessCLI()
    arguments = parser.parse_args()
    own = getattr(arguments, "include_path", None)
    arguments.include_path = [str(FOLDER), own] if own else str(FOLDER)
    if getattr(arguments, "output_path", None):  # lm-eval would find that out behind the work, and only log it
        path = Path(arguments.output_path)
        check_writable(path if path.suffix == ".json" else path / "results.json")
    with checking_first(), asking("lm-eval"):
        parser.execute(arguments)

"""Evaluate a plain Hugging Face folder, or any two folders next to each other on the same windows.

A plain folder is one that transformers loads without this project. It is read with the start token that its
tokenizer adds, and its own class computes the logits. An exported folder is evaluated as in the pipeline. Perplexity,
divergence and agreement are defined in `perplexity.py`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.evaluation.perplexity import LOGIT_POSITIONS, Scores, add_scores_
from pipeline.inference.manifest import MANIFEST, METHOD, ExportError
from pipeline.inference.text_interface import TextInterface
from pipeline.models.architectures import find_logit_cap, find_max_positions
from pipeline.models.lm_head import find_head
from pipeline.runtime.arguments import ArgumentError
from pipeline.runtime.errors import reading
from pipeline.runtime.progress import hide_bars, show_progress
from pipeline.text.start_token import find_added_token
from pipeline.text.windows import prepend_start_token

Logits = Callable[[slice], torch.Tensor]  # positions of one window -> their logits [N, V], float32


@dataclass(frozen=True)
class Side:
    """A model with the windows that it has been, or will be, evaluated on.

    Attributes:
        open_window: text and row of a window -> its logits.
        device: the device of the logits.
    """

    open_window: Callable[[str, int], Logits]
    device: torch.device


def is_plain(folder: Path) -> bool:
    """Return whether a folder holds a model that this project did not export."""
    if (folder / MANIFEST).exists() or not (folder / "config.json").is_file():
        return False
    with reading(lambda why: ExportError(f"{folder} cannot be loaded ({why}).")):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return (config.get("quantization_config") or {}).get("quant_method") != METHOD


def read_plain_interface(folder: Path) -> TextInterface:
    """Return how texts are put to a plain model. No weights are read.

    Raises:
        ExportError: config or tokenizer cannot be read.
    """
    with reading(lambda why: ExportError(f"{folder} cannot be loaded ({why}).")):
        config = AutoConfig.from_pretrained(folder).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return TextInterface(
        tokenizer,
        prefix_tokens=0,
        start_token_id=None,
        text_start_token_id=find_added_token(tokenizer),
        max_positions=find_max_positions(config),
        vocab_size=config.vocab_size,
    )


def check_same_tokens(
    folder: Path, interface: TextInterface, original: Path, original_interface: TextInterface
) -> None:
    """Raise ArgumentError unless both models read and rank the same tokens."""
    if interface.tokenizer.get_vocab() != original_interface.tokenizer.get_vocab():
        raise ArgumentError(f"--original={original}: its tokenizer differs from that of {folder}. Name its original.")
    if interface.vocab_size != original_interface.vocab_size:
        raise ArgumentError(
            f"--original={original}: it ranks {original_interface.vocab_size} tokens, and {folder} ranks "
            f"{interface.vocab_size}. Name its original."
        )


def load_plain(folder: Path, device: torch.device | str) -> PreTrainedModel:
    """Load a plain model in the dtype of its weights.

    Raises:
        ExportError: transformers cannot load it, or weights are missing.
    """
    hide_bars()
    with reading(lambda why: ExportError(f"{folder} cannot be loaded ({why}).")):
        # With loading info this is a pair, which the stubs do not say.
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ExportError(f"{folder} cannot be loaded (weights are missing: {', '.join(missing[:3])}).")
    return model.eval().to(device)


def open_plain(model: PreTrainedModel, windows: dict[str, torch.Tensor], text_start_token_id: int | None) -> Side:
    """Return the side of a plain model, which runs one window at a time.

    Args:
        windows: text -> token ids [N, T] of content.
    """

    def open_window(name: str, row: int) -> Logits:
        content = windows[name][row : row + 1]
        ids = prepend_start_token(content, text_start_token_id).to(model.device)
        logits = model(ids, use_cache=False).logits[0, -content.shape[1] :]
        return lambda part: logits[part].float()

    return Side(open_window, model.device)


def open_exported(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> Side:
    """Return the side of an exported model that `evaluate_model` has evaluated, with the tensors that it returned."""
    lm_head = find_head(model.lm_head, find_logit_cap(model.config))

    def open_window(name: str, row: int) -> Logits:
        hidden = tensors[f"hidden.{name}"][row]
        return lambda part: lm_head.logits(hidden[part].to(model.device))

    return Side(open_window, model.device)


@torch.no_grad()
def score_sides(
    windows: dict[str, torch.Tensor], side: Side, original: Side | None = None
) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Return text -> the scores of a model, compared with the original where there is one, and the original's scores.

    Args:
        windows: text -> token ids [N, T] of content.
    """
    scores, original_scores = {}, {}
    for name, token_ids in windows.items():
        count, targets_per_window = len(token_ids), token_ids.shape[1] - 1
        totals, original_totals = torch.zeros(2, 3, count, dtype=torch.float64)
        for row in show_progress(range(count), count, f"scoring {name}", "window"):
            ids, logits = token_ids[row].to(side.device), side.open_window(name, row)
            original_logits = original.open_window(name, row) if original else None
            for start in range(0, targets_per_window, LOGIT_POSITIONS):
                part = slice(start, min(start + LOGIT_POSITIONS, targets_per_window))
                targets = ids[part.start + 1 : part.stop + 1]
                log_p, original_log_p = logits(part).log_softmax(dim=-1), None
                if original_logits is not None:
                    original_log_p = original_logits(part).to(side.device).log_softmax(dim=-1)
                    add_scores_(original_totals[:, row], original_log_p, targets, None)
                add_scores_(totals[:, row], log_p, targets, original_log_p)
        losses, divergences, agreements = totals / targets_per_window
        scores[name] = Scores(losses, divergences if original else None, agreements if original else None)
        if original:
            original_scores[name] = Scores(original_totals[0] / targets_per_window, None, None)
    return scores, original_scores


def describe_scores(scores: dict[str, Scores]) -> dict[str, Any]:
    """Return perplexity and its standard error by text, rounded as in the metrics of the stage `evaluation`."""
    errors = {name: part.standard_error for name, part in scores.items()}
    return {
        "perplexity": {name: round(part.perplexity, 4) for name, part in scores.items()},
        "standard_error": {name: round(error, 4) for name, error in errors.items() if error is not None},
    }


def describe_comparison(scores: dict[str, Scores], original: dict[str, Scores]) -> dict[str, Any]:
    """Return the original's perplexity, and by text: ratio, divergence in nats per token, and agreement."""
    return {
        "original": describe_scores(original),
        "ratio": {name: round(part.perplexity / original[name].perplexity, 4) for name, part in scores.items()},
        "kl": {name: round(part.kl, 5) for name, part in scores.items() if part.kl is not None},
        "top1_agreement": {
            name: round(part.top1_agreement, 4) for name, part in scores.items() if part.top1_agreement is not None
        },
    }

"""Perplexity and router agreement of a quantized mixture of experts, against a dense model of the same function.

    python -m benchmarks.quality.routing --dense FOLDER --text wiki.txt --text c4.jsonl    # artifacts/ of this folder

The experts must be made from the MLPs of the dense model. In full precision each of them computes the dense MLP, so the
router changes nothing, and the quality to reach is that of the dense model, quantized with the same settings.

For each variant, the table has the perplexity of both models and the share of tokens with the same set of experts as in
the original mixture:

    experts    the routers of the quantized mixture, which read its own hidden states
    dense      the original routers on the hidden states of the dense model, quantized in the same way
    exact      the original routers on the hidden states of the dense model in full precision (100 %, up to rounding)

The dense run needs `rotation.r1: online` or `identity`, because a merged R1 also turns the hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.quality.positions import Losses, cut_texts, score_windows
from benchmarks.workspace import find_device
from pipeline.blocks.prefix_kv import PREFIX, load_prefix_kv
from pipeline.blocks.quantized import load_block
from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.evaluation.perplexity import compute_final_hidden
from pipeline.inspection.routing import average_agreement, measure_agreement, stack_choices
from pipeline.models.architectures import Architecture
from pipeline.models.checkpoint import Checkpoint
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.text.windows import load_start_token, load_windows, prepend_start_token

Windows = dict[str, torch.Tensor]  # text -> token ids [N, T]
Chosen = dict[str, torch.Tensor]  # text -> sorted numbers of the chosen experts, [N, T, L, k]
VARIANTS = ("quantizer_init", "finetuning")


@dataclass(frozen=True)
class Measured:
    """One model on all texts: -log p of every target in nats, [N, T - 1] each, and the experts that were chosen."""

    losses: Losses
    chosen: Chosen


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--text", type=Path, action="append", required=True, help=".txt, .jsonl, .json, .csv, .parquet")
    parser.add_argument("--dense", type=Path, required=True, help="folder with artifacts/ of the dense model")
    parser.add_argument("--run", type=Path, default=Path(), help="folder with artifacts/ (default: this one)")
    parser.add_argument("--variant", action="append", help="quantizer_init, finetuning (default: both)")
    parser.add_argument("--length", type=whole(2), default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=whole(1), default=4, help="of each text")
    arguments = parser.parse_args()
    original = Checkpoint(arguments.run / "artifacts/model", "model")
    windows = cut_texts(arguments.text, arguments.windows, arguments.length, original)
    routers = load_routers(original)
    exact = measure_experts(arguments.run, "model", windows)
    rows = {"dense, exact": measure_dense(arguments.dense, "model", windows, routers)}
    for variant in arguments.variant or VARIANTS:
        rows[f"dense, {variant}"] = measure_dense(arguments.dense, variant, windows, routers)
        rows[f"experts, {variant}"] = measure_experts(arguments.run, variant, windows)
    print(format_table(exact, rows))
    print()
    print(format_blocks(exact, rows))


def load_routers(original: Checkpoint) -> list[nn.Module]:
    """Return the router of each block of a model in full precision."""
    name = original.architecture.router
    return [load_block(original, index).get_submodule(name) for index in range(original.block_count)]


def find_prefix(run: Path, variant: str) -> tuple[torch.Tensor | None, int | None]:
    """Return the prefix's keys and values of a variant, and the start token after it; the original has no prefix."""
    folder = run / "artifacts" / variant
    if variant == "model":
        return None, load_windows(run / "artifacts/calibration/train.safetensors").text_start_token_id
    return load_prefix_kv(folder, variant), load_start_token(folder / PREFIX, variant)


@torch.no_grad()
def measure_experts(run: Path, variant: str, windows: Windows) -> Measured:
    """Measure a mixture of experts, whose own routers choose."""
    checkpoint = Checkpoint(run / "artifacts" / variant, variant)
    prefix_kv, start_token = find_prefix(run, variant)
    result = compute_final_hidden(
        checkpoint, windows, BlockRunner(checkpoint, find_device(), 1), prefix_kv, start_token
    )
    chosen = {text: choices for text, choices in result.choices.items() if choices is not None}
    if chosen.keys() != windows.keys():
        raise ValueError(f"{checkpoint.folder}: the model has no experts. Name the dense model by --dense.")
    return Measured(_score(checkpoint, result.hidden, windows), chosen)


@torch.no_grad()
def measure_dense(run: Path, variant: str, windows: Windows, routers: list[nn.Module]) -> Measured:
    """Measure a dense model, for whose hidden states `routers` choose, one for each block."""
    checkpoint = Checkpoint(run / "artifacts" / variant, variant)
    prefix_kv, start_token = find_prefix(run, variant)
    to_original = [torch.ones(())] * checkpoint.block_count if variant == "model" else find_norm_changes(run)
    runner = BlockRunner(checkpoint, find_device(), 1)
    hidden = {text: checkpoint.embed(prepend_start_token(ids, start_token)) for text, ids in windows.items()}
    chosen: dict[str, list[torch.Tensor | None]] = {text: [] for text in windows}
    for index, block in enumerate(load_blocks(checkpoint, runner.device)):
        router = routers[index]
        for text, states in hidden.items():
            parts: list[torch.Tensor] = []
            with recording_mlp_input(block, checkpoint.architecture, parts):
                runner.advance_(block, states, runner.take_prefix(prefix_kv, index))
            x = torch.cat(parts)[:, -windows[text].shape[1] :] * to_original[index]
            choices = router(x.flatten(0, 1))[2].sort(-1).values.to(torch.int32)
            chosen[text].append(choices.unflatten(0, x.shape[:2]))
    hidden = {text: states[:, -windows[text].shape[1] :] for text, states in hidden.items()}
    for states in hidden.values():
        checkpoint.apply_final_norm_(states)
    stacked = {text: stack_choices(by_block) for text, by_block in chosen.items()}
    return Measured(
        _score(checkpoint, hidden, windows), {text: choices for text, choices in stacked.items() if choices is not None}
    )


def find_norm_changes(run: Path) -> list[torch.Tensor]:
    """Return, for each block, the original gain of the norm before the MLP over that of the quantized model, [D].

    Rotation folds the gains into the linears, and equalization puts scales in their place. Fine-tuning starts from
    these, so that only its own change of the norm remains.
    """
    original = Checkpoint(run / "artifacts/model", "model")
    quantized = Checkpoint(run / "artifacts/quantizer_init", "quantizer_init")
    name, offset = f"{original.architecture.mlp_norm}.weight", original.architecture.norm_offset
    return [
        (original.load_block_tensors(index)[name] + offset) / (quantized.load_block_tensors(index)[name] + offset)
        for index in range(original.block_count)
    ]


def _score(checkpoint: Checkpoint, hidden: dict[str, torch.Tensor], windows: Windows) -> Losses:
    lm_head = checkpoint.load_lm_head()
    return {text: score_windows(hidden[text], ids, lm_head) for text, ids in windows.items()}


@contextmanager
def recording_mlp_input(block: nn.Module, architecture: Architecture, parts: list[torch.Tensor]) -> Iterator[None]:
    """Append the outputs [B, T, D] of the norm before the MLP to `parts`, before they are rotated and quantized."""
    norm = block.get_submodule(str(architecture.mlp_norm))
    handle = norm.register_forward_hook(lambda module, args, output: parts.append(output), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def format_table(exact: Measured, rows: dict[str, Measured]) -> str:
    """Return a Markdown table: perplexity, its ratio to the original's, and router agreement in percent."""
    lines = ["| text | | perplexity | ratio | same experts, % |", "| --- | --- | ---: | ---: | ---: |"]
    for text, reference in exact.losses.items():
        lines.append(f"| {text} | experts, exact | {reference.mean().exp():.3f} | 1.0000 | 100.00 |")
        for name, row in rows.items():
            loss = row.losses[text].mean()
            agreement = average_agreement(measure_agreement(row.chosen[text], exact.chosen[text]))
            ratio = (loss - reference.mean()).exp()
            lines.append(f"| {text} | {name} | {loss.exp():.3f} | {ratio:.4f} | {100 * agreement:.2f} |")
    return "\n".join(lines)


def format_blocks(exact: Measured, rows: dict[str, Measured]) -> str:
    """Return a Markdown table of the router agreement by block in percent, over all texts."""
    expected = torch.cat(list(exact.chosen.values()))
    shares = {name: measure_agreement(torch.cat(list(row.chosen.values())), expected) for name, row in rows.items()}
    lines = [f"| block | {' | '.join(shares)} |", f"| ---: |{' ---: |' * len(shares)}"]
    for index, by_row in enumerate(zip(*shares.values(), strict=True)):
        cells = ("-" if share is None else f"{100 * share:.1f}" for share in by_row)
        lines.append(f"| {index} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)

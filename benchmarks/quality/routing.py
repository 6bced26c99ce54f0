"""Router agreement of a quantized mixture of experts, against the same routers on a quantized dense model.

    python -m benchmarks.quality.routing --dense FOLDER --text wiki.txt --text c4.jsonl    # artifacts/ of this folder

Both runs must be of the same function: the experts of one were made from the MLPs of the other, so that every expert
computes the dense MLP and the router changes nothing in full precision. Then three choices of experts are compared
with those of the original mixture, as the share of tokens with the same set:

    experts    the routers of the quantized mixture, which read its own hidden states
    dense      the original routers on the hidden states of the dense model, quantized in the same way
    exact      the original routers on the hidden states of the dense model in full precision (1, up to rounding)

The dense run needs `rotation.r1: online` or `identity`, because a merged R1 also turns the hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from benchmarks.quality.positions import cut_texts
from benchmarks.workspace import find_device
from pipeline.blocks.prefix_kv import PREFIX, load_prefix_kv
from pipeline.blocks.quantized import load_block
from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.evaluation.perplexity import compute_final_hidden
from pipeline.inspection.routing import average_agreement, measure_agreement, stack_choices
from pipeline.models.architectures import Architecture
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import Site
from pipeline.quantization.equalization import EQUALIZATION, select_block
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.artifacts import load_tensors
from pipeline.runtime.errors import run_main
from pipeline.text.windows import load_start_token, load_windows, prepend_start_token

Windows = dict[str, torch.Tensor]  # text -> token ids [N, T]
Chosen = dict[str, torch.Tensor]  # text -> sorted numbers of the chosen experts, [N, T, L, k]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--text", type=Path, action="append", required=True, help=".txt, .jsonl, .json, .csv, .parquet")
    parser.add_argument("--dense", type=Path, required=True, help="folder with artifacts/ of the dense model")
    parser.add_argument("--run", type=Path, default=Path(), help="folder with artifacts/ (default: this one)")
    parser.add_argument("--variant", action="append", help="quantizer_init, finetuning (default: both)")
    parser.add_argument("--length", type=whole(2), default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=whole(1), default=4, help="of each text")
    arguments = parser.parse_args()
    sparse, dense = arguments.run / "artifacts", arguments.dense / "artifacts"
    original = Checkpoint(sparse / "model", "model")
    windows = cut_texts(arguments.text, arguments.windows, arguments.length, original)
    start_token = load_windows(sparse / "calibration/train.safetensors").text_start_token_id
    routers = load_routers(original)
    expected = choose_experts(original, windows, None, start_token)
    exact = choose_for_dense(Checkpoint(dense / "model", "model"), windows, routers, None, start_token, {})
    print(format_table("dense, exact", exact, expected))
    for variant in arguments.variant or ("quantizer_init", "finetuning"):
        folder, other = sparse / variant, dense / variant
        tokens = load_start_token(folder / PREFIX, variant), load_start_token(other / PREFIX, variant)
        chosen = choose_experts(Checkpoint(folder, variant), windows, load_prefix_kv(folder, variant), tokens[0])
        print(format_table(f"experts, {variant}", chosen, expected))
        scales, _ = load_tensors(dense / "quantizer_init" / EQUALIZATION, "quantizer_init")
        kv = load_prefix_kv(other, variant)
        bar = choose_for_dense(Checkpoint(other, variant), windows, routers, kv, tokens[1], scales)
        print(format_table(f"dense, {variant}", bar, expected))


def load_routers(original: Checkpoint) -> list[nn.Module]:
    """Return the router of each block of a model in full precision."""
    name = original.architecture.routers[0]
    return [load_block(original, index).get_submodule(name) for index in range(original.block_count)]


def choose_experts(
    checkpoint: Checkpoint, windows: Windows, prefix_kv: torch.Tensor | None, start_token: int | None
) -> Chosen:
    """Return the experts that a mixture's own routers choose."""
    run = compute_final_hidden(checkpoint, windows, BlockRunner(checkpoint, find_device(), 1), prefix_kv, start_token)
    chosen = {text: choices for text, choices in run.choices.items() if choices is not None}
    if chosen.keys() != windows.keys():
        raise ValueError(f"{checkpoint.folder}: the model has no experts. Name the dense model by --dense.")
    return chosen


@torch.no_grad()
def choose_for_dense(
    checkpoint: Checkpoint,
    windows: Windows,
    routers: list[nn.Module],
    prefix_kv: torch.Tensor | None,
    start_token: int | None,
    scales: dict[str, torch.Tensor],
) -> Chosen:
    """Return the experts that `routers`, one for each block, choose on the hidden states of a dense model.

    Args:
        scales: "INDEX.SITE" -> the scales of equalized channels, which are taken out of the MLP's input.
    """
    runner = BlockRunner(checkpoint, find_device(), 1)
    hidden = {text: checkpoint.embed(prepend_start_token(ids, start_token)) for text, ids in windows.items()}
    chosen: dict[str, list[torch.Tensor | None]] = {text: [] for text in windows}
    for index, block in enumerate(load_blocks(checkpoint, runner.device)):
        router, s = routers[index], select_block(scales, index).get(Site.MLP_INPUT)
        for text, states in hidden.items():
            parts: list[torch.Tensor] = []
            with recording_mlp_input(block, checkpoint.architecture, parts):
                runner.advance_(block, states, runner.take_prefix(prefix_kv, index))
            x = torch.cat(parts)[:, -windows[text].shape[1] :]
            x = x if s is None else x / s
            choices = router(x.flatten(0, 1))[2].sort(-1).values.to(torch.int32)
            chosen[text].append(choices.unflatten(0, x.shape[:2]))
    stacked = {text: stack_choices(by_block) for text, by_block in chosen.items()}
    return {text: choices for text, choices in stacked.items() if choices is not None}


@contextmanager
def recording_mlp_input(block: nn.Module, architecture: Architecture, parts: list[torch.Tensor]) -> Iterator[None]:
    """Append the outputs [B, T, D] of the norm before the MLP to `parts`, before they are rotated and quantized."""
    norm = block.get_submodule(str(architecture.mlp_norm))
    handle = norm.register_forward_hook(lambda module, args, output: parts.append(output), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def format_table(name: str, chosen: Chosen, expected: Chosen) -> str:
    """Return a line for each text: the average, then the share of tokens with the same experts by block, in percent."""
    lines = []
    for text, choices in chosen.items():
        shares = measure_agreement(choices, expected[text])
        by_block = " ".join("-" if share is None else f"{100 * share:.1f}" for share in shares)
        lines.append(f"| {name} | {text} | {100 * average_agreement(shares):.2f} | {by_block} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)

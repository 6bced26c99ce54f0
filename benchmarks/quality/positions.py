"""Perplexity of a finished run on other text, relative to the original's, by position in the window.

    python -m benchmarks.quality.positions --text wiki.txt --text c4.jsonl            # artifacts/ of this folder
    python -m benchmarks.quality.positions --text wiki.txt --run FOLDER --run OTHER   # others, paired with the first

Windows are cut as `pipeline.evaluate` cuts them: the first `--windows` of `--length` tokens of each text. The column
`less the first` is the mean difference of the loss on the same windows in nats per token, ± its standard error.
"""

import math
from pathlib import Path

import torch

from benchmarks.quality.variants import pair_losses
from benchmarks.workspace import find_device
from pipeline.blocks.prefix_kv import PREFIX, load_prefix_kv
from pipeline.blocks.walk import BlockRunner
from pipeline.evaluation.perplexity import compute_final_hidden
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.lm_head import LmHead
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.text.calibration import cut_documents
from pipeline.text.corpora import read_local_documents
from pipeline.text.windows import load_start_token, load_windows

_POSITIONS = 256  # number of positions whose logits are in memory at a time
Losses = dict[str, torch.Tensor]  # text -> [N, T - 1]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--text", type=Path, action="append", required=True, help=".txt, .jsonl, .json, .csv, .parquet")
    parser.add_argument("--run", type=Path, action="append", help="folder with artifacts/ (default: this one)")
    parser.add_argument("--variant", action="append", help="quantizer_init, finetuning (default: both)")
    parser.add_argument("--length", type=whole(2), default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=whole(1), default=5, help="of each text")
    arguments = parser.parse_args()
    runs = [folder / "artifacts" for folder in arguments.run or [Path()]]
    original = Checkpoint(runs[0] / "model", "model")
    windows = cut_texts(arguments.text, arguments.windows, arguments.length, original)
    start_token = load_windows(runs[0] / "calibration/train.safetensors").text_start_token_id
    exact = measure_losses(original, windows, None, start_token)
    rows = {}
    for run in runs:
        for variant in arguments.variant or ("quantizer_init", "finetuning"):
            if (run / variant).is_dir():
                checkpoint = Checkpoint(run / variant, variant)
                start_token = load_start_token(run / variant / PREFIX, variant)
                prefix_kv = load_prefix_kv(checkpoint.folder, variant)
                name = variant if len(runs) == 1 else f"{run.parent}: {variant}"
                rows[name] = measure_losses(checkpoint, windows, prefix_kv, start_token)
    print(format_table(exact, rows))


def cut_texts(paths: list[Path], count: int, length: int, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the first windows of each text by the name of its file: token ids [count, length]."""
    return {
        path.stem: cut_documents(read_local_documents(path, "text"), count, length, checkpoint.tokenizer, str(path))
        for path in paths
    }


@torch.no_grad()
def measure_losses(
    checkpoint: Checkpoint, windows: dict[str, torch.Tensor], prefix_kv: torch.Tensor | None, start_token: int | None
) -> Losses:
    """Return -log p of every target in nats, for each text: [N, T - 1] from token ids [N, T]."""
    runner = BlockRunner(checkpoint, find_device(), 1)
    hidden = compute_final_hidden(checkpoint, windows, runner, prefix_kv, start_token).hidden
    lm_head = checkpoint.load_lm_head()
    return {text: score_windows(hidden[text], ids, lm_head) for text, ids in windows.items()}


def score_windows(hidden: torch.Tensor, token_ids: torch.Tensor, lm_head: LmHead) -> torch.Tensor:
    """Return -log p of every target, [N, T - 1], from final hidden states [N, T, D] and token ids [N, T]."""
    return torch.stack([score_targets(*pair, lm_head) for pair in zip(hidden, token_ids, strict=True)])


def score_targets(hidden: torch.Tensor, token_ids: torch.Tensor, lm_head: LmHead) -> torch.Tensor:
    """Return -log p of the targets of one window, [T - 1], from hidden states [T, D] and token ids [T]."""
    parts = zip(hidden[:-1].split(_POSITIONS), token_ids[1:].split(_POSITIONS), strict=True)
    return torch.cat(
        [-lm_head.logits(x).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1) for x, targets in parts]
    )


def split_positions(length: int) -> list[slice]:
    """Return the ranges of targets 0-255, 256-511, 512-1023, 1024-1535 and above, as far as a window has them."""
    ends = [end for end in (256, 512, 1024, 1536) if end < length]
    return [slice(*pair) for pair in zip([0, *ends], [*ends, length], strict=True)]


def format_table(exact: Losses, rows: dict[str, Losses]) -> str:
    """Return a Markdown table with a line for each text and row: ratios of perplexities, in all and by position."""
    length = next(iter(exact.values())).shape[1]
    places = split_positions(length)
    heads = [f"{place.start}-{place.stop - 1}" for place in places]
    lines = ["| text | | perplexity | ratio | " + " | ".join(heads) + " | less the first |"]
    lines.append("| --- | --- |" + " ---: |" * (3 + len(places)))
    for text, reference in exact.items():
        lines.append(f"| {text} | original | {reference.mean().exp():.2f} | 1.00 |" + " |" * (len(places) + 1))
        first = next(iter(rows.values()), None)
        for name, losses in rows.items():
            change = losses[text] - reference
            ratios = [f"{math.exp(change[:, place].mean()):.2f}" for place in places]
            paired = "" if losses is first else pair_losses(losses[text].mean(1).tolist(), first[text].mean(1).tolist())
            cells = [f"{losses[text].mean().exp():.2f}", f"{math.exp(change.mean()):.3f}", *ratios, paired]
            lines.append(f"| {text} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)

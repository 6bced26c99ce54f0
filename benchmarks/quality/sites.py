"""The cost of each kind of quantizer: a quantized model of a run with some of its activation quantizers switched off.

    python -m benchmarks.quality.sites --text wiki.txt --text c4.jsonl      # artifacts/quantizer_init of this folder
    python -m benchmarks.quality.sites --text wiki.txt --run FOLDER --variant finetuning

Rows: everything quantized; weights alone; everything but one site; weights and one site alone. Columns: the increase of
the loss over the original's, in nats per token, ± the standard error over windows. Costs do not add up, because the
cost of one quantizer depends on the errors of the others. All rows walk together, with one block in memory at a time.
"""

from pathlib import Path

import torch

from benchmarks.quality.positions import cut_texts, measure_losses, score_windows
from pipeline.blocks.prefix_kv import PREFIX, load_prefix_kv
from pipeline.blocks.quantized import find_site_quantizers
from pipeline.blocks.walk import BlockRunner, load_blocks
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import Site
from pipeline.pictures.tables import format_markdown, mean_and_error
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.runtime.progress import show_progress
from pipeline.text.windows import load_start_token, load_windows, prepend_start_token

_CPU = torch.device("cpu")
EVERY = frozenset(Site)
ROWS = {"everything": EVERY, "weights alone": frozenset()}  # row -> sites that are quantized
ROWS |= {f"all but {site}": EVERY - {site} for site in Site}
ROWS |= {f"weights and {site}": frozenset({site}) for site in Site}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--text", type=Path, action="append", required=True, help=".txt, .jsonl, .json, .csv, .parquet")
    parser.add_argument("--run", type=Path, default=Path(), help="folder with artifacts/ (default: this one)")
    parser.add_argument("--variant", default="quantizer_init", choices=("quantizer_init", "finetuning"))
    parser.add_argument("--length", type=whole(2), default=512, help="tokens of a window")
    parser.add_argument("--windows", type=whole(2), default=8, help="of each text")
    arguments = parser.parse_args()
    artifacts = arguments.run / "artifacts"
    original = Checkpoint(artifacts / "model", "model")
    quantized = Checkpoint(artifacts / arguments.variant, arguments.variant)
    windows = cut_texts(arguments.text, arguments.windows, arguments.length, original)
    start_token = load_windows(artifacts / "calibration/train.safetensors").text_start_token_id
    exact = measure_losses(original, windows, None, start_token)
    lines = []
    for row, losses in measure_rows(quantized, windows).items():
        pairs = [mean_and_error((losses[text] - exact[text]).mean(1)) for text in windows]
        lines.append([row, *(f"{mean:.3f} ± {error:.3f}" for mean, error in pairs)])
    print(format_markdown(["quantized", *windows], lines, titles=1))


@torch.no_grad()
def measure_rows(checkpoint: Checkpoint, windows: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return -log p of every target in nats by row and text: [N, T - 1] from token ids [N, T]."""
    architecture, runner = checkpoint.architecture, BlockRunner(checkpoint, _CPU, 1)
    prefix_kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    start_token = load_start_token(checkpoint.folder / PREFIX, checkpoint.stage)
    embedded = {text: checkpoint.embed(prepend_start_token(ids, start_token)) for text, ids in windows.items()}
    hidden = {row: {text: states.clone() for text, states in embedded.items()} for row in ROWS}
    blocks = load_blocks(checkpoint, runner.device)
    for index in show_progress(range(checkpoint.block_count), checkpoint.block_count, "sites"):
        block, block_prefix = next(blocks), runner.take_prefix(prefix_kv, index)
        for row, sites in ROWS.items():
            for site, quantizer in find_site_quantizers(block, architecture).items():
                quantizer.calibrated = quantizer.spec.enabled and site in sites
            for states in hidden[row].values():
                runner.advance_(block, states, block_prefix)
        del block
    lm_head, losses = checkpoint.load_lm_head(), {}
    for row, texts in hidden.items():
        losses[row] = {}
        for text, states in texts.items():
            states = states[:, -windows[text].shape[1] :]
            checkpoint.apply_final_norm_(states)
            losses[row][text] = score_windows(states, windows[text], lm_head)
    return losses


if __name__ == "__main__":
    run_main(main)

"""The error that GPTQ leaves at the layers' outputs, on the text of its Hessians and on other text.

    python -m benchmarks.quality.rounding                           # artifacts/ of this folder, blocks 1, 7, 13, …
    python -m benchmarks.quality.rounding --run FOLDER --block 1 --block 6

A row is a choice of a weight's scales (`range`) and of the amount added to the Hessian (`damping`). Hessians come from
calibration.train, in the rotated and equalized model in full precision, after the prefix. Each row is judged on that
text and on the held-out windows of every corpus. Figures are means over the linears of the blocks. Those of the first
row are relative to the energy of the outputs, all others to the first row.
"""

from pathlib import Path
from statistics import fmean

import torch

from pipeline.blocks.prefix_kv import PREFIX, load_prefix_kv
from pipeline.blocks.quantized import QuantizedLinear, block_settings, fill_block
from pipeline.blocks.walk import BlockRunner
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.gptq import InverseFactor, factor_inverse, round_gptq
from pipeline.numerics.quantizer import dequantize_weight, group, measure_range
from pipeline.pictures.tables import format_markdown
from pipeline.quantization.equalization import Equalizer, select_block
from pipeline.quantization.scale_search import Candidate, make_weight_objective, search_factors
from pipeline.quantization.statistics import SiteStatistics, record_block
from pipeline.rotation.matrices import load_rotation
from pipeline.runtime.arguments import Parser, whole
from pipeline.runtime.errors import run_main
from pipeline.runtime.progress import show_progress
from pipeline.text.windows import load_start_token, load_windows, prepend_start_token
from pipeline.training.block_wise import load_scales

CALIBRATION = "its own"
ROWS = [("layer", 0.01)] + [("tensor", damping) for damping in (0.003, 0.01, 0.03, 0.1, 0.3)] + [("layer", 0.1)]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(), help="folder with artifacts/ (default: this one)")
    parser.add_argument("--block", type=whole(0), action="append", help="default: every sixth")
    parser.add_argument("--windows", type=whole(1), default=4, help="of each held-out corpus, at most")
    arguments = parser.parse_args()
    artifacts = arguments.run / "artifacts"
    texts = {CALIBRATION: load_windows(artifacts / "calibration/train.safetensors").token_ids}
    for path in sorted((artifacts / "calibration/evaluation").glob("*.safetensors")):
        texts[path.stem] = load_windows(path).token_ids[: arguments.windows]
    rotated = Checkpoint(artifacts / "rotation", "rotation")
    blocks = arguments.block or list(range(1, rotated.block_count, 6))
    errors = measure_rounding(rotated, Checkpoint(artifacts / "quantizer_init", "quantizer_init"), texts, blocks)
    lines = []
    for range_, damping in ROWS:
        row, first = errors[range_, damping], errors[ROWS[0]]
        values = [f"{row[text]:.5f}" if row is first else f"{row[text] / first[text]:.3f}" for text in texts]
        lines.append([range_, str(damping), *values])
    print(format_markdown(["range", "damping", *texts], lines, titles=2))


@torch.no_grad()
def measure_rounding(
    rotated: Checkpoint, quantized: Checkpoint, texts: dict[str, torch.Tensor], blocks: list[int]
) -> dict[tuple[str, float], dict[str, float]]:
    """Return, by row and text, the error of the outputs relative to their energy: mean over the linears of `blocks`.

    Args:
        rotated: the rotated model in full precision.
        quantized: provides the scales of equalized channels, the prefix, and each weight's settings.
        texts: token ids [N, T] by text. Hessians come from the text `CALIBRATION`.
        blocks: indices.
    """
    runner, architecture = BlockRunner(rotated, torch.device("cpu"), 4), rotated.architecture
    prefix_kv = load_prefix_kv(quantized.folder, quantized.stage)
    start_token = load_start_token(quantized.folder / PREFIX, quantized.stage)
    scales, r2 = load_scales(quantized), load_rotation(rotated.folder, "r2")
    hidden = {text: rotated.embed(prepend_start_token(ids, start_token)) for text, ids in texts.items()}
    errors: dict[tuple[str, float], dict[str, list[float]]] = {row: {text: [] for text in texts} for row in ROWS}

    def open_block(index: int) -> torch.nn.Module:
        settings = block_settings(quantized, index)
        block = fill_block(rotated, index, rotated.load_block_tensors(index), settings)
        Equalizer(block, architecture, settings, r2).scale_(select_block(scales, index))
        return block

    for index in show_progress(range(max(blocks) + 1), max(blocks) + 1, "rounding"):
        block_prefix = runner.take_prefix(prefix_kv, index)
        block = open_block(index)
        if index in blocks:
            recorded = {
                text: record_block(block, architecture, states, block_prefix, runner=runner, mse_samples=1).sites
                for text, states in hidden.items()
            }
            for site, readers in architecture.site_readers.items():
                hessians = _take_hessians({text: sites[site] for text, sites in recorded.items()})
                for row in ROWS:
                    factor = factor_inverse(hessians[CALIBRATION], row[1])
                    for name in readers:
                        linear = block.get_submodule(name)
                        weight, change = linear.weight.float(), _round(linear, row[0], hessians[CALIBRATION], factor)
                        for text, hessian in hessians.items():
                            error, energy = (((w @ hessian) * w).sum().item() for w in (change, weight))
                            errors[row][text].append(error / energy)
        for states in hidden.values():
            runner.advance_(block, states, block_prefix)
    return {row: {text: fmean(values) for text, values in by_text.items()} for row, by_text in errors.items()}


def _take_hessians(sites: dict[str, SiteStatistics]) -> dict[str, torch.Tensor]:
    """Return by text the mean of (x - m)^T (x - m), [C, C]. m is the mean of `CALIBRATION`, as for centered weights."""
    mean, hessians = sites[CALIBRATION].channels.mean, {}
    for text, site in sites.items():
        cross = torch.outer(site.channels.mean, mean)
        hessians[text] = site.take_hessian() - cross - cross.T + torch.outer(mean, mean)
    return hessians


def _round(linear: QuantizedLinear, range_: str, hessian: torch.Tensor, factor: InverseFactor) -> torch.Tensor:
    """Return the change that GPTQ makes to a weight, [out, in], float32."""
    weight, spec = linear.weight.float(), linear.spec
    low, high = measure_range(group(weight, spec.group_size))
    candidate = Candidate(spec, low, high, tuple(low.shape))
    search = search_factors(make_weight_objective(weight, candidate, hessian if range_ == "layer" else None))
    scale, zero_point = candidate.find_parameters(search.factor)
    codes = round_gptq(weight, factor, scale, zero_point, spec.grid)
    return dequantize_weight(codes, scale, zero_point, spec.grid) - weight


if __name__ == "__main__":
    run_main(main)

"""What GPTQ leaves at the layers' outputs, on the text of its Hessians and on other text.

    python -m benchmarks.rounding                                   # artifacts/ of this folder, blocks 1, 7, 13, …
    python -m benchmarks.rounding --run FOLDER --block 1 --block 6

A row is a way to choose a weight's scales (`range`) and how much is added to the Hessian (`damping`). Hessians are of
calibration.train, in the rotated and equalized model in full precision behind the prefix; each row is judged on that
and on the held-out windows of every corpus. The first row is absolute, relative to the energy of the outputs; all
others are relative to it. Means over the linears of the blocks.
"""

from pathlib import Path

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

OWN = "its own"
ROWS = [("layer", 0.01)] + [("tensor", damping) for damping in (0.003, 0.01, 0.03, 0.1, 0.3)] + [("layer", 0.1)]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(), help="folder with artifacts/ (default: this one)")
    parser.add_argument("--block", type=whole(0), action="append", help="default: every sixth")
    parser.add_argument("--windows", type=whole(1), default=4, help="of each held-out corpus, at most")
    arguments = parser.parse_args()
    artifacts = arguments.run / "artifacts"
    texts = {OWN: load_windows(artifacts / "calibration/train.safetensors").token_ids}
    for path in sorted((artifacts / "calibration/evaluation").glob("*.safetensors")):
        texts[path.stem] = load_windows(path).token_ids[: arguments.windows]
    rotated = Checkpoint(artifacts / "rotation", "rotation")
    blocks = arguments.block or list(range(1, rotated.block_count, 6))
    errors = measure_rounding(rotated, Checkpoint(artifacts / "quantizer_init", "quantizer_init"), texts, blocks)
    lines = []
    for range_, damping in ROWS:
        own = errors[range_, damping]
        first = errors[ROWS[0]]
        values = [f"{own[t]:.5f}" if own is first else f"{own[t] / first[t]:.3f}" for t in texts]
        lines.append([range_, str(damping), *values])
    print(format_markdown(["range", "damping", *texts], lines, titles=2))


@torch.no_grad()
def measure_rounding(
    rotated: Checkpoint, quantized: Checkpoint, texts: dict[str, torch.Tensor], blocks: list[int]
) -> dict[tuple[str, float], dict[str, float]]:
    """Row -> text -> error of the outputs relative to their energy, mean over the linears of some blocks.

    Args:
        quantized: gives the scales of equalized channels, the prefix, and each weight's settings.
        texts: token ids [N, T]; Hessians are of those of `OWN`.
    """
    runner, architecture = BlockRunner(rotated, torch.device("cpu"), 4), rotated.architecture
    prefix_kv = load_prefix_kv(quantized.folder, quantized.stage)
    start_token = load_start_token(quantized.folder / PREFIX, quantized.stage)
    scales, r2 = load_scales(quantized), load_rotation(rotated.folder, "r2")
    hidden = {text: rotated.embed(prepend_start_token(ids, start_token)) for text, ids in texts.items()}
    found: dict[tuple[str, float], dict[str, list[float]]] = {row: {text: [] for text in texts} for row in ROWS}

    def open_block(index: int) -> torch.nn.Module:
        settings = block_settings(quantized, index)
        block = fill_block(rotated, index, rotated.load_block_tensors(index), settings)
        Equalizer(block, architecture, settings, r2).scale_(select_block(scales, index))
        return block

    for index in show_progress(range(max(blocks) + 1), max(blocks) + 1, "rounding"):
        own_prefix = runner.take_prefix(prefix_kv, index)
        block = open_block(index)
        if index in blocks:
            recorded = {
                text: record_block(block, architecture, states, own_prefix, runner=runner, mse_samples=1).sites
                for text, states in hidden.items()
            }
            for site, readers in architecture.site_readers.items():
                hessians = _take_hessians({text: sites[site] for text, sites in recorded.items()})
                for row in ROWS:
                    factor = factor_inverse(hessians[OWN], row[1])
                    for name in readers:
                        linear = block.get_submodule(name)
                        weight, change = linear.weight.float(), _round(linear, row[0], hessians[OWN], factor)
                        for text, hessian in hessians.items():
                            error, energy = (((w @ hessian) * w).sum().item() for w in (change, weight))
                            found[row][text].append(error / energy)
        for states in hidden.values():
            runner.advance_(block, states, own_prefix)
    return {row: {text: sum(own) / len(own) for text, own in texts.items()} for row, texts in found.items()}


def _take_hessians(kept: dict[str, SiteStatistics]) -> dict[str, torch.Tensor]:
    """Text -> mean of (x - m)^T (x - m), [C, C], with m the mean of `OWN`: what centered weights multiply."""
    mean, hessians = kept[OWN].channels.mean, {}
    for text, site in kept.items():
        own = site.channels.mean
        hessians[text] = site.take_hessian() - torch.outer(own, mean) - torch.outer(mean, own) + torch.outer(mean, mean)
    return hessians


def _round(linear: QuantizedLinear, range_: str, hessian: torch.Tensor, factor: InverseFactor) -> torch.Tensor:
    """What GPTQ adds to a weight, [out, in], float32."""
    weight, spec = linear.weight.float(), linear.spec
    low, high = measure_range(group(weight, spec.group_size))
    candidate = Candidate(spec, low, high, tuple(low.shape))
    search = search_factors(make_weight_objective(weight, candidate, hessian if range_ == "layer" else None))
    scale, zero_point = candidate.find_parameters(search.factor)
    codes = round_gptq(weight, factor, scale, zero_point, spec.grid)
    return dequantize_weight(codes, scale, zero_point, spec.grid) - weight


if __name__ == "__main__":
    run_main(main)

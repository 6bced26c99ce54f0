"""Perplexity of number formats by rotation and prefix, untrained, with bits per weight and activation.

    python -m benchmarks.quality.formats --artifacts artifacts --json formats.json
    python -m benchmarks.quality.formats --rows "NVFP4/none/none" "NVFP4/none/found"

A row is FORMAT/ROTATION/PREFIX. `original` has no quantizers. Rotations are none, block (R1, R2 and R4 over 16 or 32
channels, the format's block) and global. R4 and R5 are online, so rows with a rotation need this project to run, and
rows without one are like exported folders.

Ranges are searched in the values themselves (ranges of weights only for INT4 and W4A16) and weights are rounded to
nearest, so that formats are compared and not rounding. INT4 is the headline's W4A4KV4. All other formats leave keys and
values unquantized and center nothing.

Model, calibration and prefixes come from a finished run in --artifacts. Finished rows are kept in --json and skipped
later.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.workspace import append_row, find_device, make_parser, override, read_params, read_rows
from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.blocks.walk import BlockRunner
from pipeline.evaluation.perplexity import evaluate_windows
from pipeline.models.checkpoint import Checkpoint
from pipeline.pictures.tables import format_markdown
from pipeline.prefix.candidates import load_prefix
from pipeline.quantization.params import QuantizerInitParams
from pipeline.quantization.quantizer_init import init_quantizers
from pipeline.rotation.merging import rotate_model
from pipeline.runtime.arguments import whole
from pipeline.runtime.artifacts import make_header
from pipeline.runtime.errors import run_main
from pipeline.text.windows import find_text_start_token, load_windows

GROUPS = ("weights", "activations", "keys", "values")
PLAIN = {
    "equalize": [],
    "keys.bits": 16,
    "values.bits": 16,
    "weights.centered": False,
    "activations.centered": False,
}
FLOATS = {"fp8_e4m3": 8, "mxfp4": 4, "nvfp4": 4}


def use_format(name: str) -> dict[str, object]:
    """Return changes that put weights and activations into a float format."""
    changes = {
        f"{group}.{key}": value for group in GROUPS[:2] for key, value in (("format", name), ("bits", FLOATS[name]))
    }
    return PLAIN | changes


# Format -> bits per weight and activation with the scales of blocks, its block, changes to quantizer_init.
FORMATS = {
    "original": ("16 / 16", 32, PLAIN | {"weights.bits": 16, "activations.bits": 16}),
    "W4A16": ("4.5 / 16", 32, PLAIN | {"weights.group_size": 64, "activations.bits": 16}),
    "W8A8": ("8 / 8", 32, PLAIN | {"weights.bits": 8, "activations.bits": 8}),
    "FP8": ("8 / 8", 32, use_format("fp8_e4m3")),
    "NVFP4": ("4.5 / 4.5", 16, use_format("nvfp4")),
    "MXFP4": ("4.25 / 4.25", 32, use_format("mxfp4") | {"activations.mode": "dynamic", "activations.clipping": False}),
    "INT4": ("4 / 4", 32, {}),
}
SEARCHED = ("INT4", "W4A16")  # formats whose ranges of weights are searched
_NAMES = ("r1", "r2", "r3", "r4", "r5")
ROTATIONS = {
    "none": dict.fromkeys(_NAMES, "identity"),
    "block": dict.fromkeys(_NAMES, "block_hadamard") | {"r3": "identity", "r5": "identity"},
    "global": dict.fromkeys(_NAMES, "hadamard"),
}
MERGED = dict.fromkeys(_NAMES, "identity") | {"r1": "hadamard", "r2": "hadamard"}  # nothing acts online
ROWS = [
    f"{name}/{rotation}/{prefix}"
    for name in FORMATS
    for rotation in (ROTATIONS if name != "original" else ("none",))
    for prefix in ("none", "found")
]


def main() -> None:
    parser = make_parser(__doc__, ROWS)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="of a finished run")
    parser.add_argument("--windows", type=whole(1), default=4, help="of each corpus, at most")
    parser.add_argument("--calibration", type=whole(1), default=16, help="windows, at most")
    parser.add_argument("--length", type=whole(2), default=1024, help="tokens of a window that are read, at most")
    options = parser.parse_args()
    rows = read_rows(options.json)
    bench = Bench(options.artifacts, options.work / "formats", options.windows, options.calibration, options.length)
    for row in options.rows:
        if row not in rows:
            append_row(options.json, rows, row, bench.measure(row))
    shutil.rmtree(bench.work, ignore_errors=True)
    lines = [
        [*row.split("/"), FORMATS[row.split("/")[0]][0], *(f"{value:.2f}" for value in rows[row].values())]
        for row in ROWS
        if row in rows
    ]
    corpora = [] if not lines else list(rows[next(row for row in ROWS if row in rows)])
    print(format_markdown(["format", "rotation", "prefix", "bits W / A", *corpora], lines, titles=4))


@dataclass
class Bench:
    """Measures rows on a finished run.

    Attributes:
        artifacts: folder of the run.
        work: folder of rotated models, which rows share.
        windows: held-out windows per corpus, at most.
        calibration: calibration windows, at most.
        length: tokens that are read of each window, at most.
    """

    artifacts: Path
    work: Path
    windows: int
    calibration: int
    length: int
    models: dict[tuple[str, int], Checkpoint] = field(default_factory=dict)
    device: torch.device = field(default_factory=find_device)

    def measure(self, row: str) -> dict[str, float]:
        """Return the perplexity of a row for each corpus."""
        name, rotation, use = row.split("/")
        _, block, changes = FORMATS[name]
        quantized, start_token = self.quantize(rotation, block, use, changes, searches_weights=name in SEARCHED)
        metrics = self.evaluate(quantized, start_token)
        shutil.rmtree(quantized.folder.parent)
        return metrics["perplexity"]

    def quantize(
        self, rotation: str, block: int, use: str, changes: dict[str, object], *, searches_weights: bool
    ) -> tuple[Checkpoint, int | None]:
        """Return a quantized model and the start token between its prefix and every text, or None.

        Args:
            rotation: a name in `ROTATIONS`, or merged.
            block: see `rotate`.
            use: prefix.use.
            changes: to `quantizer_init`, by dotted key.
            searches_weights: whether ranges of weights are searched in the values; otherwise they are the maxima.
        """
        rotated = self.rotate(rotation, block)
        runner = BlockRunner(rotated, self.device, 4)
        cheap = {"weights.rounding": "rtn", "mse_samples": 2} | {f"{group}.range": "tensor" for group in GROUPS}
        cheap |= {} if searches_weights else {"weights.range": "max"}
        params = QuantizerInitParams.model_validate(override(read_params()["quantizer_init"], cheap | changes))
        prefix = load_prefix(self.artifacts / "prefix_training" / "prefix.safetensors", use)
        train = load_windows(self.artifacts / "calibration" / "train.safetensors")
        start_token = find_text_start_token(train.text_start_token_id, prefix.initial_token_ids)
        folder = self.work / "quantized"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        init_quantizers(
            rotated,
            folder / "model",
            params=params,
            prefix_token_ids=prefix.token_ids,
            prefix_embeddings=prefix.embeddings,
            token_ids=train.token_ids[: self.calibration, : self.length],
            runner=runner,
            work_folder=folder / "blocks",
            header=make_header("quantizer_init", {}),
            text_start_token_id=start_token,
        )
        return Checkpoint(folder / "model", "quantizer_init"), start_token

    def load_held_out(self) -> dict[str, torch.Tensor]:
        """Return corpus -> token ids [N, T]."""
        return {
            path.stem: load_windows(path).token_ids[: self.windows, : self.length]
            for path in sorted((self.artifacts / "calibration" / "evaluation").glob("*.safetensors"))
        }

    def evaluate(self, quantized: Checkpoint, start_token: int | None) -> dict[str, Any]:
        """Return the metrics of a quantized model on the held-out windows."""
        kv = load_prefix_kv(quantized.folder, quantized.stage)
        runner = BlockRunner(quantized, self.device, 4)
        metrics, _, _ = evaluate_windows(
            quantized, self.load_held_out(), runner, prefix_kv=kv, text_start_token_id=start_token
        )
        return metrics

    def rotate(self, rotation: str, block: int) -> Checkpoint:
        """Return the rotated model. `block`: number of channels per block of the rotation "block"."""
        key = rotation, block if rotation == "block" else 0
        if key not in self.models:
            folder = self.work / f"{rotation}-{key[1]}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            model = Checkpoint(self.artifacts / "model", "model")
            rotate_model(
                model,
                folder,
                **(MERGED if rotation == "merged" else ROTATIONS[rotation]),
                seed=0,
                dtype=torch.float32,
                device=self.device,
                block_size=block,
            )
            self.models[key] = Checkpoint(folder, "rotation")
        return self.models[key]


if __name__ == "__main__":
    run_main(main)
